"""What the optimizer's kernels read besides flat buffers: groups of parameters by block, 8-bit states and their code tables.

Owns the layout of both. Leaves the arithmetic to `reference` and `triton`.

Suffixes: N elements of the flat buffer, B blocks of it, G groups.
"""

from __future__ import annotations

import dataclasses

import torch

GROUP_BLOCK = 1024
"""A group holds whole blocks of that many elements: parameters of different groups start at multiples of it."""

QUANTIZATION_BLOCK = 256
"""Elements that share one scale of the 8-bit states, as in bitsandbytes."""

# The dynamic map: 7 decades, each with twice the codes of the one below (arXiv:2110.02861, section 2.1).
DECADES = 7


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """Which parameters take what multiple of the learning rate and of the weight decay.

    group_of_block_B: uint8, the group of each `GROUP_BLOCK` elements, the last perhaps not full. lr_scale_G, decay_scale_G: fp32.
    """

    group_of_block_B: torch.Tensor
    lr_scale_G: torch.Tensor
    decay_scale_G: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class State8bit:
    """Both moments in 8 bits, one fp32 scale for every `QUANTIZATION_BLOCK` elements, with the codes of bitsandbytes.

    codes: uint8 [N], absmax: fp32 [B], map: fp32 [256], ascending. The maps go with the state, so that nothing is made while a CUDA
    graph is captured. Blocks are cut from the flat buffer: where parameters start at multiples of 256 they are those that bitsandbytes
    would cut, but for tensors under 4096 elements, which it keeps in 32 bits.
    """

    exp_avg_codes_N: torch.Tensor
    exp_avg_absmax_B: torch.Tensor
    exp_avg_sq_codes_N: torch.Tensor
    exp_avg_sq_absmax_B: torch.Tensor
    signed_map: torch.Tensor
    unsigned_map: torch.Tensor

    @staticmethod
    def zeros(num_elements: int, *, device: torch.device | str) -> State8bit:
        """The state before the first step."""
        num_blocks = -(-num_elements // QUANTIZATION_BLOCK)
        return State8bit(
            exp_avg_codes_N=torch.zeros(num_elements, dtype=torch.uint8, device=device),
            exp_avg_absmax_B=torch.zeros(num_blocks, dtype=torch.float32, device=device),
            exp_avg_sq_codes_N=torch.zeros(num_elements, dtype=torch.uint8, device=device),
            exp_avg_sq_absmax_B=torch.zeros(num_blocks, dtype=torch.float32, device=device),
            signed_map=dynamic_map(signed=True).to(device),
            unsigned_map=dynamic_map(signed=False).to(device),
        )


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """The 256 values of the dynamic 8-bit type, ascending, fp32: equal to bitsandbytes' `create_dynamic_map` bit by bit.

    Decade i, of magnitudes 10^(i-7) to 10^(i-6), has 2^i equidistant values for either sign, or 2^(i+1) where there is none; 0 and 1
    come on top.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = 10 ** (decade + 1 - DECADES) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
