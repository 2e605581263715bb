"""Safetensors files by the byte: headers read without their tensors, tensors read and written in blocks of rows.

Owns the file format (8 bytes of header length, a JSON header, then raw little-endian data). The library's own reader maps a whole
file into memory; here memory stays bounded by the block, whatever the size of the file. Leaves what is written to `merge`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from finery_common.errors import InvalidArgumentError

BLOCK_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        blocks = list(self.blocks(self.size_bytes or 1))
        return (blocks[0] if blocks else torch.empty(0, dtype=self.dtype)).reshape(self.shape)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """The tensor as (rows, columns) in order, at most `block_bytes` (and at least one row) at a time; 0-d and 1-d as one column."""
        if not self.num_elements:
            return
        num_rows, num_columns = rows_and_columns(self.shape)
        row_bytes = num_columns * self.dtype.itemsize
        step = max(1, block_bytes // row_bytes)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            for start in range(0, num_rows, step):
                rows = min(step, num_rows - start)
                yield torch.frombuffer(_exactly(stream, rows * row_bytes), dtype=self.dtype).reshape(rows, num_columns)


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """`shape` as a matrix: the first dimension against all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


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
    """Writes one safetensors file as a context manager: the header first, then every tensor's bytes in the order of `names`."""

    def __init__(self, file: Path, *, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        # Wide elements first, as the library orders them, so that every tensor is aligned.
        ordered = sorted(tensors, key=lambda item: (-item[1].itemsize, item[0]))
        self.names = tuple(name for name, _, _ in ordered)
        self._end = 0
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, dtype, shape in ordered:
            begin, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, self._end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._end += 8 + len(header)
        self._stream = file.open("xb")
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def append(self, block: torch.Tensor) -> None:
        """The next block of the present tensor, already in its dtype."""
        self._stream.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the file and hands it to the disk; after an error it is left as it is."""
        with self._stream:
            if error is None:
                written = self._stream.tell()
                assert written == self._end, f"wrote {written} bytes of {self._end}"
                self._stream.flush()
                os.fsync(self._stream.fileno())


def _exactly(stream: BinaryIO, num_bytes: int) -> bytearray:
    buffer = bytearray(num_bytes)
    read = stream.readinto(buffer)  # type: ignore[attr-defined]
    if read != num_bytes:
        raise InvalidArgumentError(f"{stream.name}: cut off: wanted {num_bytes} bytes more, got {read}")
    return buffer
