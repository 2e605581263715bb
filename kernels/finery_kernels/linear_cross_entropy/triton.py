# pyright: basic, reportArgumentType=false, reportIndexIssue=false
"""Cross-entropy through the head's weight on CUDA: cuBLAS' products around the cross-entropy kernel, tile by tile.

Owns the tiles' buffers, the order of the launches and a kernel that puts rows where they belong. Leaves the loss and its gradient to
`finery_kernels.cross_entropy.triton`, validation to `api`. A 16-bit gradient lies in the upper half of the rows of logits it is taken from,
so a tile costs 4 bytes a logit.

T: rows, L: rows taken through the head, R: rows of a tile, D: hidden size, V: vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finery_kernels.cross_entropy import triton as cross_entropy


@triton.jit
def put_rows_kernel(x_ptr, rows_ptr, targets_ptr, out_ptr, x_stride, out_stride, ignore_index, D: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of x to row rows[i] of out, unless its target is ignored: pads would race for the row that they repeat."""
    source = tl.program_id(0).to(tl.int64)
    if tl.load(targets_ptr + source) != ignore_index:
        row = tl.load(rows_ptr + source)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + source * x_stride + columns, mask=columns < D)
            tl.store(out_ptr + row * out_stride + columns, x, mask=columns < D)


def put_rows(x_RD: Tensor, rows_R: Tensor, targets_R: Tensor, *, out_TD: Tensor, ignore_index: int) -> None:
    """out_TD[rows_R] = x_RD where the target is not ignored."""
    num_rows, width = x_RD.shape
    block = min(triton.next_power_of_2(width), 2048)
    strides, options = (x_RD.stride(0), out_TD.stride(0)), {"num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device_of(x_RD):
        put_rows_kernel[(num_rows,)](x_RD, rows_R, targets_R, out_TD, *strides, ignore_index, D=width, BLOCK=block, **options)


def linear_cross_entropy_forward_backward(
    h_TD: Tensor,
    weight_VD: Tensor,
    targets_L: Tensor,
    *,
    rows_L: Tensor | None,
    softcap: float | None,
    scale: float,
    grad_scale: Tensor,
    tile_rows: int,
    out_dh: Tensor,
    dweight_VD: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """As `api.linear_cross_entropy_forward_backward`, after validation; fills `out_dh` and returns the summed loss."""
    num_rows, hidden = targets_L.shape[0], h_TD.shape[1]
    loss_L = torch.empty(num_rows, dtype=torch.float32, device=h_TD.device)
    tile_rows = min(tile_rows, num_rows)
    logits_RV, dlogits_RV = _tile_buffers(tile_rows, weight_VD.shape[0], dtype=h_TD.dtype, device=h_TD.device)
    gathered_RD, dgathered_RD = h_TD.new_empty((2, tile_rows if rows_L is not None else 0, hidden))
    if rows_L is not None:
        out_dh.zero_()
    for start in range(0, num_rows, max(tile_rows, 1)):
        tile = slice(start, min(start + tile_rows, num_rows))
        part = slice(0, tile.stop - start)
        h_RD = h_TD[tile] if rows_L is None else torch.index_select(h_TD, 0, rows_L[tile], out=gathered_RD[part])
        _product(h_RD, weight_VD.T, out=logits_RV[part])
        cross_entropy.cross_entropy_forward_backward_(
            logits_RV[part],
            targets_L[tile],
            softcap=softcap,
            scale=scale,
            grad_scale=grad_scale,
            out=dlogits_RV[part],
            ignore_index=ignore_index,
            loss_T=loss_L[tile],
        )
        dh_RD = torch.mm(dlogits_RV[part], weight_VD, out=out_dh[tile] if rows_L is None else dgathered_RD[part])
        if rows_L is not None:
            put_rows(dh_RD, rows_L[tile], targets_L[tile], out_TD=out_dh, ignore_index=ignore_index)
        if dweight_VD is not None:
            _add_product(dlogits_RV[part].T, h_RD, out=dweight_VD)
    return loss_L.sum()


def _tile_buffers(num_rows: int, num_classes: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 logits and their gradient in one buffer; rows are padded to 16 elements, the alignment that Triton looks for."""
    stride = (num_classes + 15) // 16 * 16
    buffer = torch.empty((num_rows, stride), dtype=torch.float32, device=device)
    logits_RV = buffer[:, :num_classes]
    if dtype == torch.float32:
        return logits_RV, logits_RV
    return logits_RV, buffer.view(dtype)[:, stride : stride + num_classes]


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """a @ b in fp32, never rounded to the operands' dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out += a @ b, rounded once to the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
