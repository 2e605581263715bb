"""The weights of a decoder layer as the engine multiplies with them: members that share an input stacked, their adapters beside them.

Owns where a projection's bytes lie (16- or 32-bit in one resident buffer whose views the model's own parameters become, or NF4 and
dequantized into a shared workspace) and reading them off transformers', bitsandbytes' and PEFT's modules. The arithmetic is
`finery_kernels.lora`'s.

Shapes: N outputs, K inputs, R ranks of a projection's members together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError
from finery_kernels.lora import Adapter, StackedLayout, pack_adapters_
from finery_kernels.nf4 import Nf4State, dequantize

if TYPE_CHECKING:
    from finery_trainer.engine.architecture import LayerShape

PROJECTIONS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
"""Which linear layers share an input, by the block that holds them. A family that fuses them itself has one of the name + `_proj`."""


class Workspace:
    """Buffers that dequantized weights pass through, one of each shape for all layers. `dtype` is the arithmetic's.

    A buffer remembers whose weights it holds, so that one dequantization serves all uses in a row.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}
        self._owners: dict[tuple[int, int], object] = {}

    def buffer(self, shape: tuple[int, int], *, owner: object) -> tuple[torch.Tensor, bool]:
        """(the buffer of this shape, whether `owner` was the last to ask for it and its contents still stand)."""
        if shape not in self._buffers:
            self._buffers[shape] = torch.empty(shape, dtype=self.dtype, device=self.device)
        is_current = self._owners.get(shape) is owner
        self._owners[shape] = owner
        return self._buffers[shape], is_current

    def forget(self) -> None:
        """Contents no longer stand: adapters have changed, or a CUDA graph begins, which must not rely on what ran before it."""
        self._owners.clear()

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


@dataclass(frozen=True, kw_only=True)
class Member:
    """One linear layer: its module (the base layer where PEFT wraps it), and its adapter, if it has one."""

    linear: nn.Linear
    adapter: Adapter | None


class Projection:
    """Linear layers that share an input, ready to be multiplied with.

    `weight()` answers weight_ext [N + R, K + R] with the adapters of the moment inside: call `refresh` after every optimizer step.
    """

    def __init__(self, members: Sequence[Member], *, workspace: Workspace) -> None:
        self._members, self._workspace = members, workspace
        self.layout = StackedLayout(
            members[0].linear.in_features,
            tuple(member.linear.out_features for member in members),
            tuple(0 if member.adapter is None else member.adapter.a.shape[0] for member in members),
        )
        self.adapters = [member.adapter for member in members]
        self.bias_N = _stacked_bias(members)
        self._quantized = [nf4_state(member.linear) for member in members]
        self._resident: torch.Tensor | None = None
        if not self.is_quantized:
            self._resident = self._stacked()
            self.refresh()

    @property
    def is_quantized(self) -> bool:
        """Whether the base weights are NF4."""
        return self._quantized[0] is not None

    @property
    def is_resident(self) -> bool:
        """Whether a buffer in the arithmetic's dtype is kept."""
        return self._resident is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The members' own weights."""
        return [cast("nn.Parameter", member.linear.weight) for member in self._members]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The members' own biases; asked only where there are some."""
        return [member.linear.bias for member in self._members]

    @property
    def trains_weights(self) -> bool:
        """Whether the base weights are trained."""
        return self.parameters[0].requires_grad

    @property
    def trains_bias(self) -> bool:
        """Whether there is a bias and it is trained."""
        return self.bias_N is not None and self.biases[0].requires_grad

    @property
    def size_bytes(self) -> int:
        """Bytes of weight_ext in the arithmetic's dtype."""
        rows, columns = self.layout.shape
        return rows * columns * self._workspace.dtype.itemsize

    def keep_resident(self, *, wanted: bool) -> None:
        """Whether a dequantized copy is kept beside the NF4 weights, which then need no dequantization."""
        assert self.is_quantized
        if wanted and self._resident is None:
            self._resident = torch.zeros(self.layout.shape, dtype=self._workspace.dtype, device=self._workspace.device)
            self._dequantize_into(self._resident)
        elif not wanted:
            self._resident = None

    def refresh(self) -> None:
        """Takes the adapters' present values over into a resident buffer."""
        if self._resident is not None:
            pack_adapters_(self._resident, self.layout, self.adapters)

    def weight(self) -> torch.Tensor:
        """weight_ext [N + R, K + R]; where it is dequantized, valid until the next projection of the same shape asks."""
        if self._resident is not None:
            return self._resident
        buffer, is_current = self._workspace.buffer(self.layout.shape, owner=self)
        if is_current:
            return buffer
        buffer[: self.layout.num_outputs, self.layout.in_features :].zero_()
        if self.layout.num_ranks > sum(self.layout.ranks):
            buffer[self.layout.num_outputs + sum(self.layout.ranks) :].zero_()
        self._dequantize_into(buffer)
        pack_adapters_(buffer, self.layout, self.adapters)
        return buffer

    def adapter_rows(self) -> torch.Tensor:
        """A of all members [R, K], without dequantizing anything."""
        if self._resident is not None:
            return self._resident[self.layout.num_outputs :, : self.layout.in_features]
        a_RK = torch.zeros(self.layout.num_ranks, self.layout.in_features, dtype=self._workspace.dtype, device=self._workspace.device)
        for member, adapter in enumerate(self.adapters):
            if adapter is not None:
                a_RK[self.layout.rank_range(member)] = adapter.a
        return a_RK

    def _dequantize_into(self, buffer: torch.Tensor) -> None:
        for index, member in enumerate(self._members):
            state = self._quantized[index]
            assert state is not None
            view = buffer[self.layout.rows(index), : self.layout.in_features]
            dequantize(member.linear.weight.data, state, dtype=buffer.dtype, out=view)

    def _stacked(self) -> torch.Tensor:
        buffer = torch.zeros(self.layout.shape, dtype=self._workspace.dtype, device=self._workspace.device)
        for index, member in enumerate(self._members):
            view = buffer[self.layout.rows(index), : self.layout.in_features]
            view.copy_(member.linear.weight.data)
            member.linear.weight.data = view
        return buffer


def projections_of(layer: nn.Module, shape: LayerShape, *, workspace: Workspace) -> dict[str, Projection]:
    """The four projections of a decoder layer, by the names of `PROJECTIONS`. Raises FailedPreconditionError for layers of another kind."""
    found: dict[str, Projection] = {}
    for name, (block_name, member_names) in PROJECTIONS.items():
        block = cast("nn.Module", getattr(layer, block_name))
        names = member_names if hasattr(block, member_names[0]) else (f"{name}_proj",)
        found[name] = Projection([member_of(getattr(block, each), each) for each in names], workspace=workspace)
    wanted = {"qkv": shape.num_qkv, "o": shape.hidden, "gate_up": 2 * shape.intermediate, "down": shape.hidden}
    for name, projection in found.items():
        assert projection.layout.num_outputs == wanted[name], (name, projection.layout)
    return found


def member_of(module: nn.Module, name: str) -> Member:
    """The linear layer `module` with its adapter, where PEFT has wrapped it. Raises FailedPreconditionError for what is neither."""
    from peft.tuners.lora import LoraLayer

    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not isinstance(base, nn.Linear):
        raise FailedPreconditionError(f"{name}: got a {type(base).__name__}, wanted a linear layer; this model needs the generic path.")
    if not isinstance(module, LoraLayer):
        return Member(linear=base, adapter=None)
    active = module.active_adapters[0]
    a = cast("nn.Linear", module.lora_A[active])
    b = cast("nn.Linear", module.lora_B[active])
    return Member(linear=base, adapter=Adapter(a.weight, b.weight, float(module.scaling[active])))


def nf4_state(linear: nn.Linear) -> Nf4State | None:
    """The NF4 weight of a bitsandbytes layer, or None for a plain one."""
    state = getattr(linear.weight, "quant_state", None)
    return None if state is None else Nf4State.from_bitsandbytes(state)


def _stacked_bias(members: Sequence[Member]) -> torch.Tensor | None:
    found = [cast("nn.Parameter | None", member.linear.bias) for member in members]
    biases = [bias for bias in found if bias is not None]
    if not biases:
        return None
    assert len(biases) == len(members)
    whole = torch.cat([bias.data for bias in biases])
    for bias, part in zip(biases, whole.split([bias.numel() for bias in biases]), strict=True):
        bias.data = part
    return whole
