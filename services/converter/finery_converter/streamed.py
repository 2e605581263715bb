"""A forward pass whose weights are read as it goes: what a model folder of any size says, in the memory of its largest parts.

Owns a causal language model of transformers' own modules without weights, in which linear layers multiply by blocks of rows straight from
the files, embeddings read the rows that are asked for, and every other module gets its parameters before its turn and loses them after it.
A LoRA adapter is applied as it was trained, y = W x + scale * B (A x), never merged. Arithmetic is float32 on the CPU: exact enough to
judge 16-bit weights by, and many times faster there than bfloat16. Leaves sources to `weights`, names to `parameters`, and what is made of
logits to `parity`.

    model = StreamedModel(base_dir, adapter_dir=adapter_dir)
    states = model.states([[1, 5, 7], [1, 9]])      # a walk through all weights for each `max_tokens`
    logits_NV = model.logits(states[0])             # reads the head only

Memory: one block of rows in each type, activations of `max_tokens` tokens, and of one decoder layer what is neither linear layer nor
embedding (norms; fused experts, which take twice their size while they are put together). A walk reads every weight once.

Letters: N tokens, B sequences, T tokens of the longest, H hidden size, V vocabulary, I and O a linear layer's inputs and outputs, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from finery_common.errors import InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from finery_converter.changes import AdaptedWeights, LoraPair, place, read_adapter
from finery_converter.parameters import Parameters, skeleton
from finery_converter.weights import Weights, folder_weights

MAX_TOKENS = 2048
_NO_MEMORY = "can't allocate memory"
"""In the words of torch's allocator for CPUs."""
Observer = Callable[[str, torch.Tensor], None]
"""Called with a linear layer's name and its inputs (N, I), padding left out."""


class StreamedModel:
    """The model in `folder`, whose weights stay there.

    `weights` stand for the folder's own where those are stored otherwise or changed. With `adapter_dir` linear layers apply its pairs as
    they go; what it changes elsewhere is added as it is read, in float32. `observer` hears the inputs of every linear layer.

    Raises InvalidArgumentError (code `unmatched_adapter_tensor`) for an adapter's tensor that has no place in the model, and as
    `Parameters`, `read_adapter` and `skeleton` do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        weights: Weights | None = None,
        adapter_dir: Path | None = None,
        observer: Observer | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self._max_tokens = max_tokens
        self._model = skeleton(folder)
        self._observer = observer
        self._kept: torch.Tensor | None = None
        weights = weights or folder_weights(folder)
        self.parameters = Parameters(self._model, weights)
        self.adapted_weights: Weights = weights
        """With everything that the adapter changes: what an exact merge would hold."""
        pairs = self._adapt(weights, adapter_dir) if adapter_dir else {}
        self._fill_buffers()
        self._stream_modules(pairs)

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def linear_names(self) -> list[str]:
        """The modules that an observer hears."""
        return [name for name, module in self._model.named_modules() if isinstance(module, _StreamedLinear)]

    def states(self, sequences: Sequence[Sequence[int]], *, on_progress: Callable[[float], None] | None = None) -> list[torch.Tensor]:
        """The last hidden states (N, H) of each sequence of token ids, each on its own; every group of `max_tokens` is a walk.

        Raises InvalidArgumentError for an empty sequence or an id beyond the vocabulary, UnimplementedError where the architecture
        reaches for weights outside their module's turn.
        """
        self._check(sequences)
        states: dict[int, torch.Tensor] = {}
        for group in _groups(sequences, max_tokens=self._max_tokens):
            hidden_BTH = self._walk([sequences[index] for index in group])
            for row, index in enumerate(group):
                states[index] = hidden_BTH[row, : len(sequences[index])].clone()
            if on_progress:
                on_progress(len(states) / len(sequences))
        return [states[index] for index in range(len(sequences))]

    def logits(self, states_NH: torch.Tensor) -> torch.Tensor:
        """(N, V) in float32 of `states_NH`: the head and whatever the architecture does after it. Reads the head once."""
        outputs = self._outputs
        outputs.last_hidden_state = states_NH.unsqueeze(0)
        prefix = self._model.base_model_prefix
        base = getattr(self._model, prefix)
        setattr(self._model, prefix, _Given(outputs, body=base))
        try:
            with torch.no_grad():
                return self._model(input_ids=torch.zeros(1, len(states_NH), dtype=torch.int64), use_cache=False).logits[0]
        finally:
            setattr(self._model, prefix, base)

    def _adapt(self, weights: Weights, adapter_dir: Path) -> dict[str, LoraPair]:
        """Puts the adapter's changes in place but for the pairs of linear layers; answers those, by the layers' names."""
        placed = place(read_adapter(adapter_dir), self._model, self.parameters)
        self.adapted_weights = AdaptedWeights(weights, pairs=placed.pairs, replaced=placed.replaced)
        elsewhere = {name: pair for name, pair in placed.pairs.items() if name not in placed.linears}
        if elsewhere or placed.replaced:
            self.parameters = Parameters(self._model, AdaptedWeights(weights, pairs=elsewhere, replaced=placed.replaced))
        return {module: placed.pairs[name] for name, module in placed.linears.items()}

    def _walk(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B, T, H). Padding stands on the right, where nothing that counts can see it."""
        longest = max(map(len, sequences))
        ids_BT = torch.tensor([[*sequence, *[sequence[-1]] * (longest - len(sequence))] for sequence in sequences])
        self._kept = torch.tensor([[place < len(sequence) for place in range(longest)] for sequence in sequences])
        base = getattr(self._model, self._model.base_model_prefix)
        try:
            with torch.no_grad():
                self._outputs = base(input_ids=ids_BT, use_cache=False)
        except (NotImplementedError, AttributeError, TypeError, RuntimeError, StopIteration) as error:
            if _NO_MEMORY in str(error):
                raise ResourceExhaustedError(f"There is no memory for a pass of {longest} tokens: {error}", code="out_of_memory") from error
            raise UnimplementedError(
                f"{type(self._model).__name__} uses weights in a way that a streamed pass does not follow: {error}"
            ) from error
        finally:
            self._kept = None
        hidden_BTH = cast("torch.Tensor", self._outputs.last_hidden_state)
        self._outputs.last_hidden_state = None
        return hidden_BTH

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        for sequence in sequences:
            if not sequence or not 0 <= min(sequence) <= max(sequence) < self.vocab_size:
                raise InvalidArgumentError(
                    f"Token ids: got {len(sequence)} from {min(sequence, default=0)} to {max(sequence, default=0)}, "
                    f"wanted at least one and all below {self.vocab_size}, the model's vocabulary."
                )

    def _observe(self, name: str, x: torch.Tensor) -> None:
        if self._observer is None or self._kept is None:
            return
        kept = self._kept
        if x.shape[:2] == kept.shape:
            x = x[kept]
        elif x.dim() == 2 and len(x) == kept.numel():
            x = x[kept.flatten()]
        self._observer(name, x.reshape(-1, x.shape[-1]))

    def _fill_buffers(self) -> None:
        """Buffers that a checkpoint holds are small; they are read once and stay."""
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for name in self._model.state_dict():
            if name not in parameters:
                self._model.get_buffer(name).copy_(self.parameters.read(name))

    def _stream_modules(self, pairs: Mapping[str, LoraPair]) -> None:
        """Takes every parameter out of the model, and has it come back for as long as it is used.

        What is no linear layer or embedding comes for a whole decoder layer: some use their parts' parameters themselves.
        """
        rest: dict[str, list[str]] = defaultdict(list)
        for name, module in list(self._model.named_modules()):
            own = [key for key, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
            weight = self.parameters.direct.get(f"{name}.weight")
            if weight and type(module) is nn.Linear:
                source = _LinearSource(name, self.parameters, pairs.get(name))
                self._model.set_submodule(name, _StreamedLinear(module, source, self._observe))
            elif weight and isinstance(module, nn.Embedding) and own == ["weight"]:
                module.padding_idx = None
                _release(self._model, (f"{name}.weight",))
                module.register_forward_pre_hook(partial(_take_rows, self.parameters.weights, weight))
                module.register_forward_hook(partial(_release, self._model, (f"{name}.weight",)))
            elif own:
                rest[_unit(name)] += [f"{name}.{key}".removeprefix(".") for key in own]
        for unit, names in rest.items():
            _release(self._model, names)
            module = self._model.get_submodule(unit)
            module.register_forward_pre_hook(partial(_fill, self._model, names, self.parameters))
            module.register_forward_hook(partial(_release, self._model, names))


@dataclass(frozen=True)
class _LinearSource:
    """What a linear layer multiplies by."""

    module: str
    parameters: Parameters
    pair: LoraPair | None

    def blocks(self) -> Iterator[torch.Tensor]:
        return self.parameters.weights.blocks(self.parameters.direct[f"{self.module}.weight"])

    def bias(self) -> torch.Tensor:
        return self.parameters.read(f"{self.module}.bias")


class _StreamedLinear(nn.Linear):
    """A linear layer that multiplies by the blocks of its weight as they come from the file, and adds the adapter's product."""

    def __init__(self, like: nn.Linear, source: _LinearSource, observe: Observer) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self._has_bias = "bias" in dict(like.named_parameters(recurse=False))
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self._source = source
        self._observe = observe

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  the parent's name for it
        self._observe(self._source.module, input)
        out = input.new_empty(*input.shape[:-1], self.out_features)
        row = 0
        for block, part in self._adapted_blocks(input):
            out[..., row : row + len(block)] = part
            row += len(block)
        return out.add_(self._source.bias()) if self._has_bias else out

    def _adapted_blocks(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows of the weight, their part of the output)"""
        pair = self._source.pair
        if pair is None:
            yield from ((block, functional.linear(x, block)) for block in self._source.blocks())
            return
        b_OR, a_RI = pair.factors()
        norms_O = pair.norms()
        low = functional.linear(x, a_RI)
        row = 0
        for block in self._source.blocks():
            rows = slice(row, row + len(block))
            row = rows.stop
            part = functional.linear(x, block) + functional.linear(low, b_OR[rows])
            if norms_O is not None:
                part = part * (norms_O[rows] / torch.linalg.vector_norm(block + b_OR[rows] @ a_RI, dim=1))
            yield block, part


class _Given(nn.Module):
    """Stands for the body of a model, whose outputs are known."""

    def __init__(self, outputs: object, *, body: nn.Module) -> None:
        super().__init__()
        self._outputs = outputs
        self._body = (body,)

    def forward(self, *_args: object, **_kwargs: object) -> object:
        return self._outputs

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """What a head asks of its body beside outputs, such as a multiplier."""
        return getattr(vars(self)["_body"][0], name)


def _groups(sequences: Sequence[Sequence[int]], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, such that a group's tokens with their padding are at most `max_tokens`, or it is one."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    start = 0
    while start < len(order):
        size = max(1, max_tokens // len(sequences[order[start]]))
        yield order[start : start + size]
        start += size


def _take_rows(weights: Weights, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gives an embedding the rows that it is asked for, and asks for them by their new places."""
    indices, places = torch.unique(args[0], return_inverse=True)
    module.weight = nn.Parameter(weights.rows(name, indices), requires_grad=False)
    return (places, *args[1:])


def _unit(name: str) -> str:
    """The decoder layer that module `name` is in, which is what the first number in its name counts; itself outside of any."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _fill(model: nn.Module, names: Sequence[str], parameters: Parameters, *_call: object) -> None:
    for name in names:
        _set(model, name, nn.Parameter(parameters.read(name), requires_grad=False))


def _release(model: nn.Module, names: Sequence[str], *_call: object) -> None:
    """Nothing in a parameter's place makes a use out of its turn an error."""
    for name in names:
        _set(model, name, None)


def _set(model: nn.Module, name: str, value: nn.Parameter | None) -> None:
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, value)
