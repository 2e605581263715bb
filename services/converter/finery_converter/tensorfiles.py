"""Safetensors files by the byte: headers read without their tensors, tensors read and written in blocks of rows.

Owns the file format (8 bytes of header length, a JSON header, then raw little-endian data). The library's own reader maps a whole
file into memory; here memory stays bounded by the block, whatever the size of the file. Leaves what is written to `merge`, and which
thread reads or writes to `pipeline`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from finery_common.errors import InvalidArgumentError

BLOCK_BYTES = 4 * 1024 * 1024
"""Of a tensor at a time: what fits a CPU's caches together with its float32 copy."""
ROW_MULTIPLE = 128
"""Blocks have a multiple of so many rows, but for a tensor's last: blocks of NF4 and of FP8 then never lie across two of them."""
_WRITEBACK_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor that is going to be written."""


def file_too_small(max_bytes: int, what: str, *, least_bytes: int) -> InvalidArgumentError:
    """The error where files of weights may have `max_bytes`, and `what`, which goes into one file, takes `least_bytes`."""
    return InvalidArgumentError(
        f"max_file_size_bytes: got {max_bytes:,}, but {what} takes {least_bytes:,}; allow at least that.",
        code="part_too_small",
        param="max_file_size_bytes",
    )


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` counts from the start of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, in its shape and dtype."""
        data = torch.empty(self.size_bytes, dtype=torch.uint8)
        self.read_into(data, start=0)
        return data.view(self.dtype).reshape(self.shape)

    def blocks(self, block_bytes: int | None = None) -> Iterator[torch.Tensor]:
        """The tensor as (rows, columns) in order, about `block_bytes` (none: BLOCK_BYTES) at a time; 0-d and 1-d as one column."""
        num_columns = rows_and_columns(self.shape)[1]
        for start, num_bytes in self.spans(block_bytes):
            data = torch.empty(num_bytes, dtype=torch.uint8)
            self.read_into(data, start=start)
            yield data.view(self.dtype).reshape(-1, num_columns)

    def spans(self, block_bytes: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, length) in bytes of blocks of whole rows, a multiple of ROW_MULTIPLE but for the last."""
        if not self.num_elements:
            return
        step = rows_at_once(self.shape, self.dtype.itemsize, block_bytes) * rows_and_columns(self.shape)[1] * self.dtype.itemsize
        for start in range(0, self.size_bytes, step):
            yield start, min(step, self.size_bytes - start)

    def read_into(self, data: torch.Tensor, *, start: int) -> None:
        """Fills `data`, uint8 and contiguous, with the bytes from `start` on. Raises InvalidArgumentError where the file ends before."""
        buffer = data.numpy().data
        with self.file.open("rb", buffering=0) as stream:
            done = 0
            while done < len(buffer):
                read = os.preadv(stream.fileno(), [buffer[done:]], self.offset + start + done)
                if read == 0:
                    raise InvalidArgumentError(f"{self.file.name}: cut off: wanted {len(buffer) - done} bytes more of tensor {self.name}")
                done += read


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """`shape` as a matrix: all dimensions but the last against the last; one column for 0-d and 1-d."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return math.prod(shape[:-1]), shape[-1]


def rows_at_once(shape: Sequence[int], itemsize: int, block_bytes: int | None = None) -> int:
    """How many rows a block has."""
    row_bytes = max(1, rows_and_columns(shape)[1] * itemsize)
    return max(ROW_MULTIPLE, (block_bytes or BLOCK_BYTES) // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of `file` by name. Raises InvalidArgumentError where it is no safetensors file, or cut off, or of a dtype we lack."""
    size_bytes = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise InvalidArgumentError(
                    f"{file.name}: not a safetensors file, or cut off: its header claims {header_bytes} of {size_bytes} bytes"
                )
            entries = json.loads(stream.read(header_bytes))
        tensors = {name: _tensor(file, name, entry, 8 + header_bytes) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"{file.name}: not a safetensors file: its header cannot be read") from error
    for tensor in tensors.values():
        if tensor.offset + tensor.size_bytes > size_bytes:
            raise InvalidArgumentError(f"{file.name}: cut off at {size_bytes} bytes, inside tensor {tensor.name}")
    return tensors


def _tensor(file: Path, name: str, entry: dict[str, object], data_offset: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"{file.name}: tensor {name} has the element type {dtype}; supported are {', '.join(DTYPES)}")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    begin, end = (int(item) for item in offsets)
    tensor = StoredTensor(name, file, DTYPES[str(dtype)], tuple(int(item) for item in shape), data_offset + begin)
    if begin < 0 or min(tensor.shape, default=0) < 0 or end - begin != tensor.size_bytes:
        raise InvalidArgumentError(f"{file.name}: tensor {name} of shape {list(tensor.shape)} does not fit its {end - begin} bytes")
    return tensor


class TensorWriter:
    """Writes one safetensors file: the header at once, then every tensor's bytes in order, tensors in any order. A context manager."""

    def __init__(self, file: Path, *, tensors: Sequence[TensorSpec]) -> None:
        # Wide elements first, as the library orders them, so that every tensor is aligned.
        ordered = sorted(tensors, key=lambda item: (-item[1].itemsize, item[0]))
        self.names = tuple(name for name, _, _ in ordered)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, begins = 0, dict[str, int]()
        for name, dtype, shape in ordered:
            begins[name], end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        data_offset = 8 + len(header)
        self._next = {name: data_offset + begin for name, begin in begins.items()}
        self._missing_bytes = end
        self._pending_bytes = 0
        self._stream = file.open("xb", buffering=0)
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def append(self, name: str, block: torch.Tensor) -> None:
        """The next block of the tensor `name`, contiguous and already in its dtype."""
        data = block.reshape(-1).view(torch.uint8).numpy().data
        start = self._next[name]
        self._next[name] = start + len(data)
        self._missing_bytes -= len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done:], start + done)
        self._pending_bytes += len(data)
        if self._pending_bytes >= _WRITEBACK_BYTES:
            # The disk begins now, not when the file ends; on Linux nothing waits here, and pages that are not written yet stay.
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._pending_bytes = 0

    def close(self) -> None:
        """Ends the file and hands it to the disk."""
        assert self._missing_bytes == 0, f"{self._stream.name}: {self._missing_bytes} bytes were not written"
        with self._stream:
            os.fsync(self._stream.fileno())

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()
