"""The engine's arithmetic inside a family's own decoder layers, for whoever drives the model himself: TRL's trainers, `generate`.

    replace_layers(base)        # before get_peft_model: decoder layers become subclasses of their own class; names and weights stay
    bind_layers(model)          # after it, the model on its device: from now on plain causal passes run through `block`

Owns which passes are plain, and the node in autograd's graph. A pass is plain where nothing but causal order, padding at the ends of rows
and packed sequences (positions that begin anew) decides what attends to what; that is seen once for all layers, before the decoder runs.
Any other pass (a cache, attentions as output, a mask of another form, adapters that `block` does not know or that are merged, weights moved
since, autocast to another type than the weights') takes the family's own forward. Padding is not computed: the stream is zero there.

Gradients reach parameters through autograd, so that optimizers, accumulation and hooks of other drivers see nothing new. Where gradient
checkpointing is on, a layer keeps its input and `block` computes the rest anew. Hooks on modules inside a layer do not run in a plain pass.
`stack.TrainingStack` moves the same weights into buffers of its own; it wants no binding, and ends one.

Shapes: B rows of a batch, S their padded length, T tokens that are not padding, D hidden, R rotary size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from finery_common.errors import FailedPreconditionError
from finery_kernels.lora import Adapter, StackedLayout
from finery_trainer.engine.architecture import LayerShape, base_of, decoder_of, describe, norms_of
from finery_trainer.engine.block import RECOMPUTABLE, Block, Gradients, Rotary, Tape
from finery_trainer.engine.packing import PackedBatch
from finery_trainer.engine.weights import PROJECTIONS, Projection, Workspace, projections_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_KEY = "finery_pass"
"""The argument by which a decoder hands the pass to its layers, and a layer's `__call__` to its `forward`."""
_HARMLESS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "output_hidden_states", "return_dict", "cache_position"),
    *("num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
"""Arguments of a decoder that are understood, or that change nothing in a layer."""
_ALL_ROWS = 1 << 62

Adapters = Mapping[str, Sequence[Adapter | None]]
"""By projection, one a member."""


class _Leaf(NamedTuple):
    """A parameter of a layer: of what kind, of which projection (or which norm) and which of its members."""

    kind: Literal["a", "b", "weight", "bias", "norm"]
    name: str
    member: int
    parameter: torch.Tensor


def replace_layers(base: PreTrainedModel) -> str | None:
    """Makes the decoder layers of a model of `architecture.FAMILIES` ones that can be bound; answers why not, where they are not."""
    if isinstance(shape := describe(base.config), str):
        return shape
    for layer in _layers_of(base):
        if not isinstance(layer, _OwnLayer):
            layer.__class__ = _own_class(type(layer))
    return None


def bind_layers(model: PeftModel | PreTrainedModel) -> str | None:
    """Lets plain passes run through the engine; answers why not, where they can not. The model is not moved or cast afterwards.

    16-bit and 32-bit weights move into buffers with space for the adapters that are active now; adapters of the same ranks may take turns.
    """
    base = base_of(model)
    if isinstance(shape := describe(base.config), str):
        return shape
    release_layers(model)
    layers = _layers_of(base)
    if not all(isinstance(layer, _OwnLayer) for layer in layers):
        return "its decoder layers are not replaced; call replace_layers before adapters are added"
    if (reason := next(filter(None, map(_unsupported_linear, layers)), None)) is not None:
        return reason
    weight = cast("torch.Tensor", base.get_input_embeddings().weight)
    workspace = Workspace(dtype=weight.dtype, device=weight.device)
    try:
        for layer, layer_shape in zip(layers, shape.layers, strict=True):
            assert isinstance(layer, _OwnLayer)
            layer.binding = _Binding(layer, layer_shape, workspace)
    except FailedPreconditionError as error:
        release_layers(model)
        return str(error)
    decoder_of(base).register_forward_pre_hook(_announce, with_kwargs=True)
    return None


def release_layers(model: PeftModel | PreTrainedModel) -> None:
    """Ends the binding of a model whose layers were replaced, where there is one. Weights stay where they are."""
    base = base_of(model)
    hooks = decoder_of(base)._forward_pre_hooks  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # handles do not survive copies
    for key in [key for key, hook in hooks.items() if hook is _announce]:
        del hooks[key]
        decoder_of(base)._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for layer in _layers_of(base):
        if isinstance(layer, _OwnLayer):
            layer.binding = None


class _OwnLayer(nn.Module):
    """What a replaced layer has beside its family's class."""

    binding: _Binding | None = None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain: _Plain | None = kwargs.pop(_KEY, None)
        if plain is not None and self.binding is not None and not args:
            keep = frozenset[str]() if self.training and getattr(self, "gradient_checkpointing", False) else frozenset(RECOMPUTABLE)
            if (call := self.binding.call(hidden_states, plain, kwargs, keep=keep)) is not None:
                # Past the family's own checkpointing: the call keeps less instead.
                return nn.Module.__call__(self, hidden_states, **kwargs, **{_KEY: call})
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        call: _Call | None = kwargs.pop(_KEY, None)
        if call is None:
            return super().forward(hidden_states, *args, **kwargs)
        leaves = [leaf.parameter for leaf in call.leaves]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *leaves)):
            return _LayerPass.apply(call, hidden_states, *leaves)
        with torch.no_grad():
            return call.forward(hidden_states, {})


@functools.cache
def _own_class(family: type[nn.Module]) -> type[nn.Module]:
    """The family's class with `_OwnLayer` before it, under the family's name: others look for that."""
    return type(family.__name__, (_OwnLayer, family), {"__doc__": family.__doc__})


@dataclass
class _Plain:
    """A pass of the decoder over [B, S] tokens in which only causal order, padding and packing count."""

    shape: tuple[int, int]
    batch: PackedBatch
    """Its positions are places among the B·S tokens."""
    places_T: torch.Tensor | None
    """int64: where its tokens stand among the B·S; None where none is padding."""
    _tables: dict[int, tuple[torch.Tensor, Rotary]] = field(default_factory=dict[int, "tuple[torch.Tensor, Rotary]"])

    def packed(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[T, D], without padding; the same memory where there is none."""
        flat = x_BSD.reshape(-1, x_BSD.shape[-1])
        return flat if self.places_T is None else flat.index_select(0, self.places_T)

    def padded(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[B, S, D], zeros for padding."""
        if self.places_T is not None:
            num_places = self.shape[0] * self.shape[1]
            x_TD = x_TD.new_zeros(num_places, x_TD.shape[1]).index_copy_(0, self.places_T, x_TD)
        return x_TD.view(*self.shape, -1)

    def rotary(self, cos_BSR: torch.Tensor, sin_BSR: torch.Tensor) -> Rotary:
        """Tables [B·S, R] of the embeddings that the decoder computed for its positions, made once for all layers that share them."""
        if id(cos_BSR) not in self._tables:
            cos, sin = (table.float().expand(self.shape[0], -1, -1).reshape(-1, table.shape[-1]) for table in (cos_BSR, sin_BSR))
            self._tables[id(cos_BSR)] = cos_BSR, (cos.contiguous(), sin.contiguous())
        return self._tables[id(cos_BSR)][1]


def _announce(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a decoder runs: tells its layers of a plain pass."""
    plain = None if args else _plain_pass(decoder, kwargs)
    return args, kwargs if plain is None else kwargs | {_KEY: plain}


def _plain_pass(decoder: nn.Module, kwargs: Mapping[str, Any]) -> _Plain | None:
    """The pass that a decoder with these arguments makes, or None where it is not plain. Waits for the device where there is a mask."""
    config = cast("PreTrainedModel", decoder).config
    use_cache = kwargs.get("use_cache")
    if use_cache if use_cache is not None else getattr(config, "use_cache", False):
        return None
    if getattr(config, "output_attentions", False) or any(value for key, value in kwargs.items() if key not in _HARMLESS):
        return None
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if inputs is None or (mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != inputs.shape[:2])):
        return None
    shape = int(inputs.shape[0]), int(inputs.shape[1])
    sequences = _sequences(shape, mask=mask, positions=positions)
    return None if sequences is None else _planned(shape, *sequences, device=inputs.device)


def _sequences(
    shape: tuple[int, int], *, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]] | None:
    """(lengths of the sequences, places of their tokens among B·S), or None for a mask with holes or without a token.

    As transformers has it: positions that do not go on by one begin a sequence, but only where there is no mask.
    """
    rows, columns = shape
    is_token_BS = np.ones(shape, dtype=bool) if mask is None else (mask != 0).cpu().numpy()
    begins_BS = np.zeros(shape, dtype=bool)
    if mask is None and positions is not None:
        begins_BS[:, 1:] = (positions.diff(dim=-1) != 1).expand(rows, -1).cpu().numpy()
    begins_BS[np.arange(rows), is_token_BS.argmax(axis=1)] = True
    begins = np.flatnonzero(begins_BS[is_token_BS])
    places = np.flatnonzero(is_token_BS)
    ends_BS = is_token_BS & ~np.pad(is_token_BS[:, 1:], ((0, 0), (0, 1)))
    if not columns or not len(places) or (ends_BS.sum(axis=1) > 1).any():
        return None
    return np.diff(begins, append=len(places)), places


def _planned(
    shape: tuple[int, int],
    lengths: np.ndarray[Any, np.dtype[np.int64]],
    places: np.ndarray[Any, np.dtype[np.int64]],
    *,
    device: torch.device,
) -> _Plain:
    num_tokens, nothing = len(places), torch.empty(0, dtype=torch.int64, device=device)
    places_T = torch.from_numpy(places).to(device)
    batch = PackedBatch(
        input_ids_T=places_T,
        positions_T=places_T.to(torch.int32),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device),
        rows_L=nothing,
        targets_L=nothing,
        max_seqlen=int(lengths.max()),
        lengths_equal=int(lengths[0]) if (lengths == lengths[0]).all() else None,
        num_tokens=num_tokens,
        num_labels=0,
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _Plain(shape=shape, batch=batch, places_T=None if num_tokens == shape[0] * shape[1] else places_T)


class _Binding:
    """A decoder layer's weights in the engine's buffers."""

    def __init__(self, layer: nn.Module, shape: LayerShape, workspace: Workspace) -> None:
        self.shape, self.workspace = shape, workspace
        self.projections = projections_of(layer, shape, workspace=workspace)
        self.norms = norms_of(layer, shape)
        self._modules = {name: _linears_of(layer, name) for name in self.projections}
        self._addresses = self._present_addresses()

    def __deepcopy__(self, memo: object) -> None:
        """A copied layer is not bound: its weights stand elsewhere."""
        return

    def call(self, x_BSD: torch.Tensor, plain: _Plain, kwargs: Mapping[str, Any], *, keep: frozenset[str]) -> _Call | None:
        """This layer's part of a plain pass, or None where the family's own forward has to do it."""
        if kwargs.get("past_key_values") is not None or x_BSD.dtype != self.workspace.dtype or x_BSD.shape[:2] != plain.shape:
            return None
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x_BSD.dtype:
            return None
        adapters = self._adapters()
        if adapters is None or self._present_addresses() != self._addresses:
            return None
        rotary: Rotary = (None, None)
        if self.shape.rope is not None:
            if (embeddings := kwargs.get("position_embeddings")) is None:
                return None
            rotary = plain.rotary(*embeddings)
        return _Call(binding=self, plain=plain, rotary=rotary, adapters=adapters, keep=keep)

    def _adapters(self) -> Adapters | None:
        """What is active now, or None where that is nothing that `block` computes with these buffers."""
        adapters: dict[str, list[Adapter | None]] = {}
        for name, modules in self._modules.items():
            found = [_active_adapter(module) for module in modules]
            adapters[name] = [adapter for adapter in found if not isinstance(adapter, str)]
            if len(adapters[name]) != len(found):
                return None
            ranks = tuple(0 if adapter is None else adapter.a.shape[0] for adapter in adapters[name])
            if any(ranks) and ranks != self.projections[name].layout.ranks:
                return None
        return adapters

    def _present_addresses(self) -> list[int]:
        tensors = [p for projection in self.projections.values() for p in projection.parameters]
        tensors += [p for projection in self.projections.values() if projection.bias_N is not None for p in projection.biases]
        return [tensor.data_ptr() for tensor in tensors]


class _WithoutAdapters:
    """A projection's base weights alone, as `block` uses them."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        full = projection.layout
        self.layout = StackedLayout(full.in_features, full.out_features, (0,) * len(full.ranks))
        self.bias_N = projection.bias_N

    def weight(self) -> torch.Tensor:
        """[N, K]."""
        return self._projection.weight()[: self.layout.num_outputs, : self.layout.in_features]


@dataclass(kw_only=True)
class _Call:
    """One pass through one layer."""

    binding: _Binding
    plain: _Plain
    rotary: Rotary
    adapters: Adapters
    keep: frozenset[str]

    @functools.cached_property
    def leaves(self) -> list[_Leaf]:
        """Every floating-point parameter that takes part, trained or not."""
        return list(self._leaves())

    def forward(self, x_BSD: torch.Tensor, tape: Tape) -> torch.Tensor:
        """The stream after the layer."""
        block = self._block(Gradients(adapters={}, weights={}, biases={}, norms={}))
        x_TD = self.plain.packed(x_BSD)
        with torch.autocast(x_TD.device.type, enabled=False):
            stream = [x_TD]
            block.forward(stream, self.plain.batch, self.rotary, keep=self.keep, tape=tape, mlp_rows=_ALL_ROWS)
            residual_TD, delta_TD = stream
            return self.plain.padded(delta_TD.add_(residual_TD))

    def backward(self, g_BSD: torch.Tensor, tape: Tape, wanted: Sequence[bool]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """(gradient of the stream before the layer, those of the leaves that are wanted)."""
        gradients, of_leaf = self._gradients(wanted)
        block = self._block(gradients)
        spare = max(block.projections[name].layout.num_ranks for name in ("o", "down"))
        g_TD = self.plain.packed(g_BSD)
        g_ext = g_TD.new_empty(g_TD.shape[0], g_TD.shape[1] + spare)
        g_ext[:, : g_TD.shape[1]] = g_TD
        with torch.autocast(g_TD.device.type, enabled=False):
            block.backward(g_ext, self.plain.batch, self.rotary, tape=tape, mlp_rows=_ALL_ROWS)
        found = [
            of_leaf.get((leaf.kind, leaf.name, leaf.member)) if is_wanted else None
            for leaf, is_wanted in zip(self.leaves, wanted, strict=True)
        ]
        cast_back = [None if grad is None else grad.to(leaf.parameter.dtype) for grad, leaf in zip(found, self.leaves, strict=True)]
        return self.plain.padded(g_ext[:, : g_TD.shape[1]].contiguous()), cast_back

    def _block(self, gradients: Gradients) -> Block:
        """The layer with the adapters of this pass in its buffers: others may have been there since."""
        binding, projections = self.binding, dict[str, Projection]()
        binding.workspace.forget()
        for name, projection in binding.projections.items():
            if any(adapter is not None for adapter in self.adapters[name]) or not projection.layout.num_ranks:
                projection.adapters = list(self.adapters[name])
                projection.refresh()
                projections[name] = projection
            else:
                projections[name] = cast("Projection", _WithoutAdapters(projection))
        return Block(binding.shape, projections, binding.norms, gradients)

    def _leaves(self) -> Iterator[_Leaf]:
        for name, projection in self.binding.projections.items():
            for member, adapter in enumerate(self.adapters[name]):
                if adapter is not None:
                    yield _Leaf("a", name, member, adapter.a)
                    yield _Leaf("b", name, member, adapter.b)
            if not projection.is_quantized:
                yield from (_Leaf("weight", name, member, weight) for member, weight in enumerate(projection.parameters))
            if projection.bias_N is not None:
                yield from (_Leaf("bias", name, member, bias) for member, bias in enumerate(projection.biases))
        yield from (_Leaf("norm", name, 0, weight) for name, weight in self.binding.norms.items())

    def _gradients(self, wanted: Sequence[bool]) -> tuple[Gradients, dict[tuple[str, str, int], torch.Tensor]]:
        """Zeroed buffers of what is wanted, and each leaf's part of them. Weights' are of their own type, all else is float32."""
        kinds = {(leaf.kind, leaf.name) for leaf, is_wanted in zip(self.leaves, wanted, strict=True) if is_wanted}
        of_leaf: dict[tuple[str, str, int], torch.Tensor] = {}
        adapters: dict[str, list[Adapter | None]] = {}
        weights: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor] = {}
        for name, projection in self.binding.projections.items():
            sizes = projection.layout.out_features
            if {("a", name), ("b", name)} & kinds:
                adapters[name] = [None if a is None else Adapter(_zeros(a.a), _zeros(a.b), a.scaling) for a in self.adapters[name]]
                of_leaf |= {("a", name, i): grad.a for i, grad in enumerate(adapters[name]) if grad is not None}
                of_leaf |= {("b", name, i): grad.b for i, grad in enumerate(adapters[name]) if grad is not None}
            if ("weight", name) in kinds:
                like = projection.parameters[0]
                weights[name] = torch.zeros(sum(sizes), like.shape[1], dtype=like.dtype, device=like.device)
                of_leaf |= {("weight", name, i): grad for i, grad in enumerate(weights[name].split(sizes))}
            if ("bias", name) in kinds:
                biases[name] = _zeros(cast("torch.Tensor", projection.bias_N))
                of_leaf |= {("bias", name, i): grad for i, grad in enumerate(biases[name].split(sizes))}
        norms = {name: _zeros(weight) for name, weight in self.binding.norms.items() if ("norm", name) in kinds}
        of_leaf |= {("norm", name, 0): grad for name, grad in norms.items()}
        return Gradients(adapters=adapters, weights=weights, biases=biases, norms=norms), of_leaf


class _LayerPass(torch.autograd.Function):
    """A layer in autograd's graph. What the tape holds is saved as autograd saves tensors, so that whoever hooks that sees it."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x_BSD: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The stream after the layer; `leaves` are there for autograd to know of them."""
        tape: Tape = {}
        y_BSD = call.forward(x_BSD, tape)
        ctx.call, ctx.names, ctx.is_spent = call, list(tape), False
        ctx.save_for_backward(*tape.values())
        return y_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Runs once: gradients are computed in place of what was kept."""
        if ctx.is_spent:
            raise RuntimeError("A bound decoder layer runs backward once for each forward; retain_graph is not supported.")
        ctx.is_spent = True
        tape: Tape = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        dx_BSD, grads = ctx.call.backward(grad_outputs[0], tape, ctx.needs_input_grad[2:])
        return None, dx_BSD, *grads


def _active_adapter(module: nn.Module) -> Adapter | Literal["other"] | None:
    """The adapter that a linear layer applies now, None for none, "other" for what `block` does not compute."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    if module.merged:
        return "other"
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    name = names[0]
    has_dropout = cast("nn.Module", module).training and not isinstance(module.lora_dropout[name], nn.Identity)
    a, b = cast("nn.Linear", module.lora_A[name]), cast("nn.Linear", module.lora_B[name])
    if len(names) > 1 or name in module.lora_variant or has_dropout or cast("object", b.bias) is not None:
        return "other"
    return Adapter(a.weight, b.weight, float(module.scaling[name]))


def _linears_of(layer: nn.Module, name: str) -> list[nn.Module]:
    """The members of a projection, as PEFT may have wrapped them."""
    block_name, members = PROJECTIONS[name]
    block = cast("nn.Module", getattr(layer, block_name))
    return [getattr(block, each) for each in (members if hasattr(block, members[0]) else (f"{name}_proj",))]


def _unsupported_linear(layer: nn.Module) -> str | None:
    """Why the linear layers of a decoder layer are none that the engine multiplies with, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in PROJECTIONS:
        linears = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in _linears_of(layer, name)]
        kinds = {type(linear).__name__ for linear in linears}
        if not all(isinstance(linear, nn.Linear) for linear in linears) or "Linear8bitLt" in kinds or len(kinds) > 1:
            return f"{name}: layers of type {', '.join(sorted(kinds))}"
    return None


def _layers_of(base: PreTrainedModel) -> list[nn.Module]:
    return list(cast("nn.ModuleList", decoder_of(base).layers))


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where `like` is."""
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
