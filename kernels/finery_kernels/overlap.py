"""Whether two outputs, or an output and an input, share memory that they must not share.

Owns the rule for matrices of rows, some of which are columns of one buffer. Leaves to the operations which pairs must lie apart. Nothing
here waits for the device.

T: rows, D: columns.
"""

from __future__ import annotations

from torch import Tensor

from finery_kernels.errors import UnsupportedError


def check_apart(name: str, out_TD: Tensor | None, other_name: str, other_TD: Tensor | None, *, may_be_same: bool = False) -> None:
    """Raises UnsupportedError where both are there and share memory; both have the same dtype and unit stride in the last dimension.

    `may_be_same`: every element of the one may be the other's.
    """
    if out_TD is None or other_TD is None or (may_be_same and _is_same(out_TD, other_TD)):
        return
    if _overlap(out_TD, other_TD):
        wanted = f"{other_name} itself or memory of its own" if may_be_same else "memory of its own"
        raise UnsupportedError(f"{name} overlaps {other_name}; wanted {wanted}")


def _is_same(a_TD: Tensor, b_TD: Tensor) -> bool:
    has_same_rows = a_TD.shape[0] <= 1 or a_TD.stride(0) == b_TD.stride(0)
    return a_TD.data_ptr() == b_TD.data_ptr() and a_TD.shape == b_TD.shape and has_same_rows


def _overlap(a_TD: Tensor, b_TD: Tensor) -> bool:
    """Of rows with unlike strides it is their whole stretch of memory that counts."""
    (num_rows_a, width_a), (num_rows_b, width_b) = a_TD.shape, b_TD.shape
    if not (num_rows_a and num_rows_b and width_a and width_b):
        return False
    stride_a, stride_b, size_bytes = a_TD.stride(0), b_TD.stride(0), a_TD.element_size()
    span_a, span_b = (num_rows_a - 1) * stride_a + width_a, (num_rows_b - 1) * stride_b + width_b
    ahead_bytes = b_TD.data_ptr() - a_TD.data_ptr()
    if ahead_bytes >= span_a * size_bytes or -ahead_bytes >= span_b * size_bytes:
        return False
    if stride_a != stride_b or num_rows_a == 1 or num_rows_b == 1:
        return True
    column = ahead_bytes // size_bytes % stride_a
    return column < width_a or column + width_b > stride_a
