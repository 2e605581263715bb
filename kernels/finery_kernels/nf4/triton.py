# pyright: basic, reportArgumentType=false, reportIndexIssue=false
"""NF4 dequantization's kernels: half a byte read, one element written.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the function promises. A thread takes words of
four bytes and writes the eight elements of each at once; the codes come out of L1. Where rows begin in the middle of a word, a second
kernel goes element by element.

N: output features, K: input features, B: blocks, C: blocks of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8
# What a program takes: words of four bytes, four a thread; elements, eight a thread.
WORDS = NUM_WARPS * 32 * 4
ELEMENTS = NUM_WARPS * 32 * 8


@triton.jit
def block_scale(
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    first,
    offsets,
    inside,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """fp32 absmax of the elements first (int64) + offsets. The launch forbids to fuse product and sum: bitsandbytes rounds twice."""
    first_block = first // BLOCKSIZE
    block = (first % BLOCKSIZE).to(tl.uint32) + offsets.to(tl.uint32)
    block = block // BLOCKSIZE
    absmax = tl.load(absmax_ptr + first_block + block, mask=inside, other=0)
    if nested_absmax_ptr is not None:
        outer = ((first_block % NESTED_BLOCKSIZE).to(tl.uint32) + block) // NESTED_BLOCKSIZE
        outer_absmax = tl.load(nested_absmax_ptr + first_block // NESTED_BLOCKSIZE + outer, mask=inside, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.uint32)) * outer_absmax + tl.load(offset_ptr)
    return absmax


@triton.jit
def words_kernel(
    words_ptr,
    code_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    width,
    out_stride,
    tiles_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words of one row, whose width is a multiple of 8; a byte's high nibble is the even element."""
    program = tl.program_id(0)
    row = (program // tiles_per_row).to(tl.int64)
    column = (program % tiles_per_row).to(tl.int64) * (WORDS * 8)
    first = row * width + column
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, 8)
    inside = word < (tl.minimum(width - column, WORDS * 8) // 8).to(tl.int32)
    packed = tl.load(words_ptr + first // 8 + word, mask=inside, other=0, eviction_policy="evict_first")
    scale = block_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word * 8, inside, BLOCKSIZE, NESTED_BLOCKSIZE)
    index = (packed[:, None] >> ((lane ^ 1) * 4)[None, :]) & 15
    codes = tl.reshape(tl.gather(tl.load(code_ptr + tl.arange(0, 16)), tl.reshape(index, [WORDS * 8]), 0), [WORDS, 8])
    values = (codes * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + column + (word * 8)[:, None] + lane[None, :], values, mask=inside[:, None])


@triton.jit
def elements_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    width,
    out_stride,
    tiles_per_row,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """ELEMENTS elements of one row of any width."""
    program = tl.program_id(0)
    row = (program // tiles_per_row).to(tl.int64)
    start = (program % tiles_per_row).to(tl.int64) * ELEMENTS
    first = row * width + start
    offsets = tl.arange(0, ELEMENTS)
    inside = start + offsets < width
    index = first + offsets
    byte = tl.load(packed_ptr + index // 2, mask=inside, other=0).to(tl.int32)
    scale = block_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, offsets, inside, BLOCKSIZE, NESTED_BLOCKSIZE)
    codes = tl.load(code_ptr + tl.where(index % 2 == 0, byte >> 4, byte & 15))
    tl.store(out_ptr + row * out_stride + start + offsets, (codes * scale).to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    packed: Tensor,
    *,
    code_16: Tensor,
    absmax_B: Tensor,
    blocksize: int,
    nested_absmax_C: Tensor | None,
    nested_code_256: Tensor | None,
    nested_blocksize: int,
    offset: Tensor | None,
    out: Tensor,
) -> Tensor:
    """As `api.dequantize`, after validation."""
    num_rows, width = out.shape
    if out.numel() == 0:
        return out
    if out.is_contiguous():
        num_rows, width = 1, out.numel()
    by_words = width % 8 == 0 and packed.data_ptr() % 4 == 0
    tile = WORDS * 8 if by_words else ELEMENTS
    tiles_per_row = triton.cdiv(width, tile)
    tensors = (code_16, absmax_B, nested_absmax_C, nested_code_256, offset, out)
    kernel = words_kernel if by_words else elements_kernel
    kernel[(num_rows * tiles_per_row,)](
        packed.view(-1).view(torch.int32) if by_words else packed,
        *tensors,
        width,
        out.stride(0),
        tiles_per_row,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        **({"WORDS": WORDS} if by_words else {"ELEMENTS": ELEMENTS}),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
