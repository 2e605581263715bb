"""NF4 dequantization: what callers use.

Owns the quantization state as a plain value, validation and dispatch by device. Quantizing is bitsandbytes' business; nothing here
imports it.

Shapes: N output features, K input features of the weight, B blocks of quantization, C blocks of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from finery_kernels.errors import UnsupportedError
from finery_kernels.nf4 import reference

# The quantiles of QLoRA (arXiv:2305.14314, appendix E) as bitsandbytes rounds them to fp32.
NF4_CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantState(Protocol):
    """What is read of bitsandbytes.functional.QuantState."""

    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    offset: torch.Tensor | None
    nested: bool
    state2: QuantState | None
    code: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Nf4State:
    """All of an NF4 weight but its packed bytes. `absmax` is fp32, or uint8 with the four `nested` fields given (double quantization)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    code_16: torch.Tensor
    absmax_B: torch.Tensor
    blocksize: int = 64
    nested_absmax_C: torch.Tensor | None = None
    nested_code_256: torch.Tensor | None = None
    nested_blocksize: int = 256
    offset: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the weight, N * K."""
        return self.shape[0] * self.shape[1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Nf4State:
        """The same state with its tensors on `device`."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Nf4State(
            shape=self.shape,
            dtype=self.dtype,
            code_16=self.code_16.to(device, non_blocking=non_blocking),
            absmax_B=self.absmax_B.to(device, non_blocking=non_blocking),
            blocksize=self.blocksize,
            nested_absmax_C=move(self.nested_absmax_C),
            nested_code_256=move(self.nested_code_256),
            nested_blocksize=self.nested_blocksize,
            offset=move(self.offset),
        )

    @classmethod
    def from_bitsandbytes(cls, quant_state: QuantState) -> Nf4State:
        """Of a `bitsandbytes.functional.QuantState`, whose tensors are shared, not copied.

        Raises:
            UnsupportedError: the state is not NF4, not of a matrix, or has a blocksize bitsandbytes does not know.
        """
        if quant_state.quant_type != "nf4":
            raise UnsupportedError(f"quant_state.quant_type is {quant_state.quant_type!r}; wanted 'nf4'")
        if len(quant_state.shape) != 2:
            raise UnsupportedError(f"quant_state.shape is {tuple(quant_state.shape)}; wanted [N, K]")
        absmax_B, nested = quant_state.absmax, quant_state.state2
        state = cls(
            shape=(quant_state.shape[0], quant_state.shape[1]),
            dtype=quant_state.dtype,
            code_16=torch.tensor(NF4_CODE, dtype=torch.float32, device=absmax_B.device),
            absmax_B=absmax_B,
            blocksize=quant_state.blocksize,
            nested_absmax_C=None if nested is None else nested.absmax,
            nested_code_256=None if nested is None else nested.code,
            nested_blocksize=256 if nested is None else nested.blocksize,
            offset=None if nested is None else quant_state.offset,
        )
        _check_state(state)
        return state


def dequantize(packed: torch.Tensor, state: Nf4State, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [N, K] of its packed bytes, bit-equal to `bitsandbytes.functional.dequantize_4bit`.

    A value is fp32(code[q] * absmax), rounded once to the dtype wanted; with double quantization absmax = fp32(fp32(code256[a] * absmax2) +
    offset). bitsandbytes does these operations in this order on the CPU and on CUDA. In one thing its CUDA kernels differ from its CPU's
    and from both implementations here: they flush products below 2**-126 to zero, where the others keep the subnormal number.

    Args:
        packed: (N * K + 1) // 2 bytes, uint8, contiguous, of any shape; the high nibble is the even element.
        state: the quantization state, on the same device.
        dtype: bf16, fp16 or fp32; None: that of `out`, or the state's.
        out: [N, K] to write to, with unit stride in K and any row stride of at least K; None: a new tensor.

    Returns:
        `out`.

    Raises:
        UnsupportedError: a tensor's shape, dtype, device or stride is not as above.
    """
    _check_state(state)
    if dtype is None:
        dtype = state.dtype if out is None else out.dtype
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype is {dtype}; wanted one of {', '.join(str(known) for known in DTYPES)}")
    _check_packed(packed, state)
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    _check_out(out, state=state, dtype=dtype, device=packed.device)
    if packed.device.type == "cuda":
        from finery_kernels.nf4 import triton

        op = triton.dequantize
    else:
        op = reference.dequantize
    return op(
        packed,
        code_16=state.code_16,
        absmax_B=state.absmax_B,
        blocksize=state.blocksize,
        nested_absmax_C=state.nested_absmax_C,
        nested_code_256=state.nested_code_256,
        nested_blocksize=state.nested_blocksize,
        offset=state.offset,
        out=out,
    )


def _check_state(state: Nf4State) -> None:
    if state.blocksize not in BLOCKSIZES:
        raise UnsupportedError(f"blocksize is {state.blocksize}; wanted one of {', '.join(map(str, BLOCKSIZES))}")
    num_blocks = -(-state.num_elements // state.blocksize)
    _check_tensor("code_16", state.code_16, dtype=torch.float32, numel=16, device=state.code_16.device)
    nested = (state.nested_absmax_C, state.nested_code_256, state.offset)
    absmax_dtype = torch.float32 if state.nested_absmax_C is None else torch.uint8
    _check_tensor("absmax_B", state.absmax_B, dtype=absmax_dtype, numel=num_blocks, device=state.code_16.device)
    if all(tensor is None for tensor in nested):
        return
    if state.nested_blocksize not in BLOCKSIZES:
        raise UnsupportedError(f"nested_blocksize is {state.nested_blocksize}; wanted one of {', '.join(map(str, BLOCKSIZES))}")
    names = ("nested_absmax_C", "nested_code_256", "offset")
    for name, tensor, numel in zip(names, nested, (-(-num_blocks // state.nested_blocksize), 256, 1), strict=True):
        if tensor is None:
            raise UnsupportedError(f"{name} is None; wanted all of {', '.join(names)}, or none of them")
        _check_tensor(name, tensor, dtype=torch.float32, numel=numel, device=state.code_16.device)


def _check_packed(packed: torch.Tensor, state: Nf4State) -> None:
    numel = (state.num_elements + 1) // 2
    _check_tensor("packed", packed, dtype=torch.uint8, numel=numel, device=state.code_16.device)


def _check_tensor(name: str, tensor: torch.Tensor, *, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.numel() != numel:
        raise UnsupportedError(f"{name} is {tensor.dtype} with {tensor.numel()} elements; wanted {dtype} with {numel}")
    if not tensor.is_contiguous():
        raise UnsupportedError(f"{name} has strides {tensor.stride()}; wanted it contiguous")
    if tensor.device != device:
        raise UnsupportedError(f"{name} is on {tensor.device}; wanted {device}, where the state is")


def _check_out(out: torch.Tensor, *, state: Nf4State, dtype: torch.dtype, device: torch.device) -> None:
    if tuple(out.shape) != state.shape or out.dtype != dtype or out.device != device:
        raise UnsupportedError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; wanted {dtype} {state.shape} on {device}")
    num_rows, width = state.shape
    if (width > 1 and out.stride(1) != 1) or (num_rows > 1 and out.stride(0) < width):
        raise UnsupportedError(f"out has strides {out.stride()}; wanted 1 in the last dimension and at least {width} between rows")
