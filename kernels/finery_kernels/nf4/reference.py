"""NF4 dequantization in plain torch, on any device, bit-equal to bitsandbytes.

Owns the order of operations, written down once. Validation and dispatch are in `api`, the kernel in `triton`.

Shapes: N output features, K input features of the weight, B blocks of quantization, C blocks of blocks.
"""

from __future__ import annotations

import torch


def dequantize(
    packed: torch.Tensor,
    *,
    code_16: torch.Tensor,
    absmax_B: torch.Tensor,
    blocksize: int,
    nested_absmax_C: torch.Tensor | None,
    nested_code_256: torch.Tensor | None,
    nested_blocksize: int,
    offset: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """As `api.dequantize`, after validation: fp32(code * absmax), one rounding to the dtype of `out`."""
    absmax_B = absmax_B.reshape(-1)
    if nested_absmax_C is not None and nested_code_256 is not None and offset is not None:
        absmax_B = _in_blocks(nested_code_256[absmax_B.to(torch.int32)], nested_absmax_C.reshape(-1), nested_blocksize)
        # A product rounded, then a sum rounded: two operations in bitsandbytes, never a fused multiply-add.
        absmax_B = absmax_B + offset
    byte = torch.arange(256, device=packed.device)
    pairs_256_2 = torch.stack((code_16[byte >> 4], code_16[byte & 15]), dim=1)
    values = pairs_256_2[packed.reshape(-1).to(torch.int32)].reshape(-1)[: out.numel()]
    out.copy_(_in_blocks(values, absmax_B, blocksize).view(out.shape))
    return out


def _in_blocks(values: torch.Tensor, scale_B: torch.Tensor, blocksize: int) -> torch.Tensor:
    """values * the scale of their block; the last block may be short."""
    full = values.numel() // blocksize * blocksize
    num_full = full // blocksize
    head = values[:full].view(num_full, blocksize) * scale_B[:num_full].unsqueeze(1)
    if full == values.numel():
        return head.view(-1)
    return torch.cat((head.view(-1), values[full:] * scale_B[num_full]))
