"""What is trained, as flat buffers: parameters that lie behind each other, gradients that lie behind each other.

A LoRA run has one buffer, float32; full training has one a projection and one for each parameter besides. The model's own parameters
become views, so that names, saving and PEFT see nothing of it. Owns the buffers; who adds to the gradients and who steps is not its
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from finery_kernels.adamw.state import GROUP_BLOCK


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """Parameters behind each other: `values_N` and `grads_N` are 1-D, `members` the parameters with their places in them."""

    values_N: torch.Tensor
    grads_N: torch.Tensor
    members: tuple[tuple[nn.Parameter, slice], ...]

    def grad_of(self, index: int) -> torch.Tensor:
        """The gradient of member `index` in its shape."""
        parameter, place = self.members[index]
        return self.grads_N[place].view(parameter.shape)

    @property
    def size_bytes(self) -> int:
        """Of values and gradients."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.values_N, self.grads_N))


def flatten(parameters: Sequence[nn.Parameter]) -> FlatGroup:
    """Moves parameters of one dtype into one new buffer, each beginning at a block of the optimizer's; gradients are float32 zeros."""
    dtype, device = parameters[0].dtype, parameters[0].device
    places: list[slice] = []
    end = 0
    for parameter in parameters:
        assert (parameter.dtype, parameter.device) == (dtype, device)
        places.append(slice(end, end + parameter.numel()))
        end += -(-parameter.numel() // GROUP_BLOCK) * GROUP_BLOCK
    values_N = torch.zeros(end, dtype=dtype, device=device)
    grads_N = torch.zeros(end, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    for parameter, place in zip(parameters, places, strict=True):
        values_N[place].copy_(parameter.data.flatten())
        parameter.data = values_N[place].view(parameter.shape)
    group = FlatGroup(values_N=values_N, grads_N=grads_N, members=tuple(zip(parameters, places, strict=True)))
    _offer_gradients(group)
    return group


def in_place(buffer: torch.Tensor, parameters: Sequence[nn.Parameter]) -> FlatGroup:
    """Parameters that already stand behind each other in a contiguous `buffer`; gradients are zeros of its dtype."""
    assert buffer.is_contiguous()
    ends = [0]
    for parameter in parameters:
        ends.append(ends[-1] + parameter.numel())
    assert ends[-1] == buffer.numel()
    places = [slice(start, end) for start, end in pairwise(ends)]
    flat_N = buffer.view(-1)
    group = FlatGroup(values_N=flat_N, grads_N=torch.zeros_like(flat_N), members=tuple(zip(parameters, places, strict=True)))
    _offer_gradients(group)
    return group


def _offer_gradients(group: FlatGroup) -> None:
    """Where dtypes agree, whoever looks at a parameter's `grad` sees the buffer's part."""
    if group.grads_N.dtype == group.values_N.dtype:
        for index, (parameter, _) in enumerate(group.members):
            parameter.grad = group.grad_of(index)
