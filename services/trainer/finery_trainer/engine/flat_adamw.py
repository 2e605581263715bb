"""AdamW over the engine's flat buffers: one launch a buffer, moments in float32, bfloat16 or 8 bits.

Owns the moments and which parameters take what share of the learning rate and of the weight decay. The kernels are
`finery_kernels.adamw`'s, schedule and clipping `optim`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from finery_common.spec import OptimizerSpec, OptimizerType
from finery_kernels.adamw import Groups, State8bit, adamw_, adamw_8bit_, clip_coefficient, grad_norm
from finery_kernels.adamw.state import GROUP_BLOCK
from finery_trainer.engine.trained import FlatGroup

Moments = State8bit | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Buffer:
    group: FlatGroup
    groups: Groups
    moments: Moments


class FlatAdamW:
    """The optimizer of `groups`. `factors` multiply the learning rate of the parameters they name; vectors do not decay.

    `type` auto means 8-bit moments on a GPU and float32 on a CPU.
    """

    def __init__(
        self, groups: Sequence[FlatGroup], spec: OptimizerSpec, *, factors: Mapping[torch.nn.Parameter, float] | None = None
    ) -> None:
        self._spec = spec
        self._buffers = [_Buffer(group, _table(group, factors or {}), _moments(group.values_N, spec.type)) for group in groups]

    def clip_coefficient(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(L2 norm of all gradients, what they must be multiplied by to have at most `max_norm`), 0-dim float32, on the device."""
        norms = [grad_norm(buffer.group.grads_N) for buffer in self._buffers]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return norm, clip_coefficient(norm, max_norm=max_norm)

    def step(self, *, learning_rate: float, step: int, clip_coef: torch.Tensor) -> None:
        """Step number `step`, from 1."""
        for buffer in self._buffers:
            values_N, grads_N = buffer.group.values_N, buffer.group.grads_N
            if isinstance(buffer.moments, State8bit):
                update = partial(adamw_8bit_, values_N, grads_N, buffer.moments)
            else:
                update = partial(adamw_, values_N, grads_N, *buffer.moments)
            update(
                lr=learning_rate,
                beta1=self._spec.beta1,
                beta2=self._spec.beta2,
                eps=self._spec.epsilon,
                weight_decay=self._spec.weight_decay,
                step=step,
                clip_coef=clip_coef.to(torch.float32),
                groups=buffer.groups,
                # To nearest, a bf16 weight would not see updates under a 500th of its size.
                stochastic_rounding=values_N.dtype == torch.bfloat16,
            )

    def zero_grad(self) -> None:
        """Gradients to zero."""
        for buffer in self._buffers:
            buffer.group.grads_N.zero_()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What a resumed run needs: (tensors by buffer and name, nothing else)."""
        return self._tensors(), {}

    def load_state(self, state: tuple[dict[str, torch.Tensor], dict[str, float]]) -> None:
        """Takes over what `state` of the same model and spec has answered."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[0][name])

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for index, buffer in enumerate(self._buffers):
            moments = buffer.moments
            if isinstance(moments, State8bit):
                named = {
                    "exp_avg_codes": moments.exp_avg_codes_N,
                    "exp_avg_absmax": moments.exp_avg_absmax_B,
                    "exp_avg_sq_codes": moments.exp_avg_sq_codes_N,
                    "exp_avg_sq_absmax": moments.exp_avg_sq_absmax_B,
                }
            else:
                named = {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
            tensors |= {f"{index}.{name}": tensor for name, tensor in named.items()}
        return tensors

    @property
    def size_bytes(self) -> int:
        """Of all moments."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())


def _moments(values_N: torch.Tensor, kind: OptimizerType) -> Moments:
    if kind is OptimizerType.AUTO:
        kind = OptimizerType.ADAMW_8BIT if values_N.is_cuda else OptimizerType.ADAMW
    if kind is OptimizerType.ADAMW_8BIT:
        return State8bit.zeros(len(values_N), device=values_N.device)
    dtype = torch.bfloat16 if kind is OptimizerType.ADAMW_BF16 else torch.float32
    if values_N.dtype == torch.float64:
        dtype = torch.float64
    return torch.zeros_like(values_N, dtype=dtype), torch.zeros_like(values_N, dtype=dtype)


def _table(group: FlatGroup, factors: Mapping[torch.nn.Parameter, float]) -> Groups:
    """The kinds of parameters in the buffer, by block; parameters of several kinds begin at whole blocks."""
    kinds = [(factors.get(parameter, 1.0), 1.0 if parameter.dim() >= 2 else 0.0) for parameter, _ in group.members]
    known = sorted(set(kinds))
    device = group.values_N.device
    group_of_block = torch.zeros(-(-len(group.values_N) // GROUP_BLOCK), dtype=torch.uint8)
    for kind, (_, place) in zip(kinds, group.members, strict=True):
        assert len(known) == 1 or place.start % GROUP_BLOCK == 0
        group_of_block[place.start // GROUP_BLOCK : -(-place.stop // GROUP_BLOCK)] = known.index(kind)
    lr_scale, decay_scale = (torch.tensor([kind[i] for kind in known], dtype=torch.float32, device=device) for i in (0, 1))
    return Groups(group_of_block_B=group_of_block.to(device), lr_scale_G=lr_scale, decay_scale_G=decay_scale)
