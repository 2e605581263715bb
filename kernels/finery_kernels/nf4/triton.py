# pyright: basic, reportArgumentType=false, reportIndexIssue=false
"""NF4 dequantization's kernels: half a byte read, one element written.

Owns the kernels and their launches. Leaves validation to `api`, whose docstrings say what the function promises. A thread takes words of
four bytes and writes the eight elements of each at once; codes are looked up in shared memory. Where rows begin in the middle of a
word, a second kernel goes element by element.

N: output features, K: input features, B: blocks, C: blocks of blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a thread takes: four words of four bytes, eight elements in each. The other kernel takes a quarter of it.
ELEMENTS_PER_THREAD = 32
WARPS = (8, 4, 2, 1)


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
def codes_and_scale(
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    first,
    word,
    num_words,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """The eight codes of every word, in the order of the elements, and its absmax; a byte's high nibble is the even element."""
    inside = word < num_words
    packed = tl.load(words_ptr + word, mask=inside, other=0, eviction_policy="evict_first")
    scale = block_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word * 8, inside, BLOCKSIZE, NESTED_BLOCKSIZE)
    return (packed[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :]) & 15, scale


@triton.jit
def put(out_ptr, values, scale, word, num_words):
    """Eight elements a word: 16 bytes in 16 bits."""
    elements = (word * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + elements, (values * scale[:, None]).to(out_ptr.dtype.element_ty), mask=(word < num_words)[:, None])


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
    STRIDE_UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Four words a thread, of one row whose width is a multiple of 8: one look-up for all four, and every code stays with its thread.

    The row stride is counted in STRIDE_UNIT elements, so that a multiple of 8 is seen to keep rows aligned.
    """
    row = tl.program_id(1 if FLAT else 0).to(tl.int64)
    column = tl.program_id(0 if FLAT else 1).to(tl.int64) * (THREADS * 32)
    first = row * width + column
    num_words = (tl.minimum(width - column, THREADS * 32) // 8).to(tl.int32)
    words_ptr += first // 8
    out_ptr += row * out_stride * STRIDE_UNIT + column
    word_a = tl.arange(0, THREADS)
    word_b = word_a + THREADS
    word_c = word_a + 2 * THREADS
    word_d = word_a + 3 * THREADS
    a, a_scale = codes_and_scale(
        words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word_a, num_words, BLOCKSIZE, NESTED_BLOCKSIZE
    )
    b, b_scale = codes_and_scale(
        words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word_b, num_words, BLOCKSIZE, NESTED_BLOCKSIZE
    )
    c, c_scale = codes_and_scale(
        words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word_c, num_words, BLOCKSIZE, NESTED_BLOCKSIZE
    )
    d, d_scale = codes_and_scale(
        words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, word_d, num_words, BLOCKSIZE, NESTED_BLOCKSIZE
    )
    index = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [THREADS * 32])
    values = tl.gather(tl.load(code_ptr + tl.arange(0, 16)), index, 0)
    ab, cd = tl.split(tl.reshape(values, [THREADS, 8, 2, 2]))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    put(out_ptr, a, a_scale, word_a, num_words)
    put(out_ptr, b, b_scale, word_b, num_words)
    put(out_ptr, c, c_scale, word_c, num_words)
    put(out_ptr, d, d_scale, word_d, num_words)


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
    FLAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """ELEMENTS elements of one row of any width."""
    row = tl.program_id(1 if FLAT else 0).to(tl.int64)
    column = tl.program_id(0 if FLAT else 1).to(tl.int64) * ELEMENTS
    first = row * width + column
    offsets = tl.arange(0, ELEMENTS)
    inside = column + offsets < width
    index = first + offsets
    byte = tl.load(packed_ptr + index // 2, mask=inside, other=0).to(tl.int32)
    scale = block_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first, offsets, inside, BLOCKSIZE, NESTED_BLOCKSIZE)
    codes = tl.load(code_ptr + tl.where(index % 2 == 0, byte >> 4, byte & 15))
    tl.store(out_ptr + row * out_stride + column + offsets, (codes * scale).to(out_ptr.dtype.element_ty), mask=inside)


def choose_num_warps(width: int) -> int:
    """The most warps whose tiles, ELEMENTS_PER_THREAD elements a thread, overhang a row by a sixteenth at the most."""
    for num_warps in WARPS:
        tile = num_warps * 32 * ELEMENTS_PER_THREAD
        if -width % tile * 16 <= width:
            return num_warps
    return WARPS[-1]


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
    num_warps: int | None = None,
) -> Tensor:
    """As `api.dequantize`, after validation; `num_warps` is for measurements."""
    num_rows, width = out.shape
    if out.numel() == 0:
        return out
    flat = out.is_contiguous()
    if flat:
        num_rows, width = 1, out.numel()
    num_warps = choose_num_warps(width) if num_warps is None else num_warps
    by_words = width % 8 == 0 and packed.data_ptr() % 4 == 0
    tile = num_warps * 32 * ELEMENTS_PER_THREAD // (1 if by_words else 4)
    num_tiles = triton.cdiv(width, tile)
    kernel, options = words_kernel if by_words else elements_kernel, {"num_warps": num_warps, "enable_fp_fusion": False}
    unit = 8 if by_words and out.stride(0) % 8 == 0 else 1
    with torch.cuda.device_of(packed):
        kernel[(num_tiles, 1) if flat else (num_rows, num_tiles)](
            packed.view(-1).view(torch.int32) if by_words else packed,
            code_16,
            absmax_B,
            nested_absmax_C,
            nested_code_256,
            offset,
            out,
            width,
            out.stride(0) // unit,
            FLAT=flat,
            BLOCKSIZE=blocksize,
            NESTED_BLOCKSIZE=nested_blocksize,
            **({"THREADS": num_warps * 32, "STRIDE_UNIT": unit} if by_words else {"ELEMENTS": tile}),
            **options,
        )
    return out
