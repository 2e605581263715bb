"""What every normalisation over rows asks of its tensors; the errors name the tensor, what was got and what is wanted.

Owns the checks that layer_norm shares. Leaves arithmetic and dispatch to the operations. Nothing here waits for the device.

T: rows, D: columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finery_kernels.errors import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_CUDA_COLUMNS = 65536


def check_activation(name: str, x_TD: Tensor) -> None:
    """An activation that sets shape, dtype and device for the others: [T, D] with D ≥ 1, a dtype and a width that its device supports."""
    if x_TD.dim() != 2 or x_TD.shape[1] == 0:
        raise UnsupportedError(f"{name}: shape {tuple(x_TD.shape)}, wanted [T, D] with at least one column")
    wanted = DTYPES if x_TD.is_cuda else (*DTYPES, torch.float64)
    if x_TD.dtype not in wanted:
        raise UnsupportedError(f"{name}: {x_TD.dtype} on {x_TD.device.type}, wanted one of {', '.join(map(str, wanted))}")
    if x_TD.is_cuda and x_TD.shape[1] > MAX_CUDA_COLUMNS:
        raise UnsupportedError(f"{name}: {x_TD.shape[1]} columns, wanted at most {MAX_CUDA_COLUMNS} on a GPU")
    _check_strides(name, x_TD)


def check_like(name: str, tensor_TD: Tensor, like_TD: Tensor) -> None:
    """Another activation: shape, dtype and device of `like_TD`, row stride of its own."""
    _check_meta(name, tensor_TD, shape=like_TD.shape, dtype=like_TD.dtype, device=like_TD.device)
    _check_strides(name, tensor_TD)


def check_parameter(name: str, parameter_D: Tensor, x_TD: Tensor) -> None:
    """A weight or bias: [D], contiguous, on the device of `x_TD`, any floating-point dtype that the device supports."""
    allowed = DTYPES if x_TD.is_cuda else (*DTYPES, torch.float64)
    if parameter_D.dtype not in allowed:
        raise UnsupportedError(f"{name}: {parameter_D.dtype} on {x_TD.device.type}, wanted one of {', '.join(map(str, allowed))}")
    check_vector(name, parameter_D, x_TD, length=x_TD.shape[1], dtype=parameter_D.dtype)


def check_vector(name: str, vector: Tensor, x_TD: Tensor, *, length: int, dtype: torch.dtype) -> None:
    """A contiguous vector of that length and dtype on the device of `x_TD`."""
    _check_meta(name, vector, shape=torch.Size([length]), dtype=dtype, device=x_TD.device)
    if not vector.is_contiguous():
        raise UnsupportedError(f"{name}: stride {vector.stride()}, wanted a contiguous vector")


def statistics_dtype(x_TD: Tensor) -> torch.dtype:
    """The dtype of row statistics and of accumulated parameter gradients: fp32, and fp64 for fp64 (which only the reference takes)."""
    return torch.promote_types(x_TD.dtype, torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., D] as [T, D] in a layout that the operations take: a view where there is one, a copy otherwise."""
    if x.dim() == 0:
        raise UnsupportedError("x: a scalar, wanted [..., D]")
    x_TD = x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return x_TD if _has_rows(x_TD) else x_TD.contiguous()


def _has_rows(x_TD: Tensor) -> bool:
    num_rows, num_columns = x_TD.shape
    return (num_columns == 1 or x_TD.stride(1) == 1) and (num_rows <= 1 or x_TD.stride(0) >= num_columns)


def _check_strides(name: str, x_TD: Tensor) -> None:
    if not _has_rows(x_TD):
        wanted = f"wanted unit stride in the last dimension and at least {x_TD.shape[1]} between rows"
        raise UnsupportedError(f"{name}: strides {x_TD.stride()}, {wanted}")


def _check_meta(name: str, tensor: Tensor, *, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape:
        raise UnsupportedError(f"{name}: shape {tuple(tensor.shape)}, wanted {tuple(shape)}")
    if tensor.dtype != dtype:
        raise UnsupportedError(f"{name}: {tensor.dtype}, wanted {dtype}")
    if tensor.device != device:
        raise UnsupportedError(f"{name}: on {tensor.device}, wanted {device}")
