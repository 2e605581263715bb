"""A forward pass whose weights are read as it goes: what a model folder of any size says, in the memory of its largest parts.

Owns a causal language model of transformers' own modules without weights, in which linear layers multiply by blocks of rows straight from
the files, embeddings read the rows that are asked for, and every other module gets its parameters before its turn and loses them after it.
A LoRA adapter is applied as it was trained, y = W x + scale * B (A x), never merged. Arithmetic is float32 on the CPU: exact enough to
judge 16-bit weights by, and many times faster there than bfloat16. Leaves sources to `weights`, names to `parameters`, and what is made of
logits to `parity`.

    model = StreamedModel(base_dir, adapter_dir=adapter_dir)
    states = model.states([[1, 5, 7], [1, 9]])      # a walk through all weights for each `max_tokens`
    logits_NV = model.logits(states[0])             # reads the head only

Memory: one block of rows in each type, activations of `max_tokens` tokens, and the largest parameter that is not of a linear layer
or an embedding (fused experts: about twice that while they are put together). A walk reads every weight once.

Letters: N tokens, B sequences, T tokens of the longest, H hidden size, V vocabulary, I and O a linear layer's inputs and outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.changes import AdaptedWeights, LoraPair, place, read_adapter
from finery_converter.parameters import Parameters, skeleton
from finery_converter.weights import FolderWeights, Weights

MAX_TOKENS = 2048
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
        weights = weights or FolderWeights(folder)
        self.parameters = Parameters(self._model, weights)
        linears = self._adapt(weights, adapter_dir) if adapter_dir else {}
        self._fill_buffers()
        self._stream_modules()
        for name, pair in linears.items():
            self._model.get_submodule(name).register_forward_hook(partial(_add_pair, pair))

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

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
        except NotImplementedError as error:
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

    def _stream_modules(self) -> None:
        for name, module in list(self._model.named_modules()):
            own = [key for key, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
            if not own:
                continue
            weight = f"{name}.weight"
            if type(module) is nn.Linear and weight in self.parameters.direct:
                self._model.set_submodule(name, _StreamedLinear(module, _LinearSource(name, self.parameters), self._observe))
            elif isinstance(module, nn.Embedding) and own == ["weight"] and weight in self.parameters.direct:
                module.padding_idx = None
                module.register_forward_pre_hook(partial(_take_rows, self.parameters.weights, self.parameters.direct[weight]))
                module.register_forward_hook(partial(_release, ("weight",)))
            else:
                module.register_forward_pre_hook(partial(_fill, {key: f"{name}.{key}" if name else key for key in own}, self.parameters))
                module.register_forward_hook(partial(_release, tuple(own)))


class _LinearSource:
    def __init__(self, module: str, parameters: Parameters) -> None:
        self.name = module
        self._parameters = parameters

    def blocks(self) -> Iterator[torch.Tensor]:
        return self._parameters.weights.blocks(self._parameters.direct[f"{self.name}.weight"])

    def bias(self) -> torch.Tensor:
        return self._parameters.read(f"{self.name}.bias")


class _StreamedLinear(nn.Linear):
    """A linear layer that multiplies by the blocks of its weight as they come from the file."""

    def __init__(self, like: nn.Linear, source: _LinearSource, observe: Observer) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias = like.weight, like.bias
        self._has_bias = "bias" in dict(like.named_parameters(recurse=False))
        self._source = source
        self._observe = observe

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  the parent's name for it
        self._observe(self._source.name, input)
        out = input.new_empty(*input.shape[:-1], self.out_features)
        row = 0
        for block in self._source.blocks():
            out[..., row : row + len(block)] = functional.linear(input, block)
            row += len(block)
        return out.add_(self._source.bias()) if self._has_bias else out


class _Given(nn.Module):
    """Stands for the body of a model, whose outputs are known."""

    def __init__(self, outputs: object, *, body: nn.Module) -> None:
        super().__init__()
        self._outputs = outputs
        self._body = (body,)

    def forward(self, *_args: object, **_kwargs: object) -> object:
        return self._outputs

    def __getattr__(self, name: str) -> object:
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


def _add_pair(pair: LoraPair, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    a_RI, b_OR = pair.factors()
    return output + functional.linear(functional.linear(args[0], a_RI), b_OR)


def _take_rows(weights: Weights, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gives an embedding the rows that it is asked for, and asks for them by their new places."""
    indices, places = torch.unique(args[0], return_inverse=True)
    module.weight = nn.Parameter(weights.rows(name, indices), requires_grad=False)
    return (places, *args[1:])


def _fill(names: Mapping[str, str], parameters: Parameters, module: nn.Module, _args: tuple[object, ...]) -> None:
    for key, parameter in names.items():
        setattr(module, key, nn.Parameter(parameters.read(parameter), requires_grad=False))


def _release(names: Sequence[str], module: nn.Module, _args: tuple[object, ...], _output: object) -> None:
    for name in names:
        setattr(module, name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
