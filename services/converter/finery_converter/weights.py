"""Where a streamed pass takes its weights from: checkpoint tensors in float32, in blocks of rows.

Owns the few sources that a comparison needs, each an object that can stand for a folder's weights: as they are, rounded, or put through a
function. They read as they are asked and keep nothing. Leaves the file format to `tensorfiles`, an adapter's changes to `changes`, and
which parameter a tensor becomes to `parameters`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_converter.tensorfiles import StoredTensor, read_header, rows_and_columns

BLOCK_BYTES = 32 * 1024 * 1024
"""Of a block as it lies in a file; in float32 it is at most twice that."""
_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"


class Weights(Protocol):
    """Checkpoint tensors by name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor there is."""
        ...

    def blocks(self, name: str, /) -> Iterator[torch.Tensor]:
        """The tensor's rows in order as (rows, columns), float32 where it is a floating-point tensor; 0-d and 1-d as one column."""
        ...

    def rows(self, name: str, indices: torch.Tensor, /) -> torch.Tensor:
        """(number of indices, columns) of a matrix: rows `indices`, 1-D int64, in that order. Reads no others."""
        ...


def read(weights: Weights, name: str) -> torch.Tensor:
    """The whole tensor in its shape. Holds little more than the result."""
    shape = weights.shapes[name]
    whole: torch.Tensor | None = None
    row = 0
    for block in weights.blocks(name):
        if whole is None:
            whole = torch.empty(rows_and_columns(shape), dtype=block.dtype)
        whole[row : row + len(block)] = block
        row += len(block)
    return torch.empty(shape) if whole is None else whole.reshape(shape)


class FolderWeights:
    """The plain tensors (16 or 32 bits) of a model folder.

    Raises FailedPreconditionError where the folder lacks weights, InvalidArgumentError for a broken file.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors = stored_tensors(folder)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self.tensors.items()}

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        for block in self.tensors[name].blocks(BLOCK_BYTES):
            yield in_float32(block)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        tensor = self.tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = bytearray(row_bytes * len(indices))
        view = memoryview(data)
        with tensor.file.open("rb") as stream:
            for place, index in enumerate(indices.tolist()):
                stream.seek(tensor.offset + index * row_bytes)
                if stream.readinto(view[place * row_bytes : (place + 1) * row_bytes]) != row_bytes:
                    raise InvalidArgumentError(f"{tensor.file.name}: cut off inside tensor {name}")
        return in_float32(torch.frombuffer(data, dtype=tensor.dtype).reshape(len(indices), -1))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of a model folder. Raises FailedPreconditionError where some or all are missing."""
    index_file = folder / _INDEX_FILE
    names = [_WEIGHTS_FILE]
    if index_file.exists():
        try:
            names = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidArgumentError(f"{_INDEX_FILE} of {folder.name} cannot be read: {error}") from error
    missing = [name for name in names if "/" in name or not (folder / name).is_file()]
    if missing or not names:
        raise FailedPreconditionError(f"The model folder {folder.name} has no {', '.join(missing) or 'weights'}; wanted safetensors files.")
    return {name: tensor for file in names for name, tensor in read_header(folder / file).items()}


class RoundedWeights:
    """`weights` rounded once to `dtype`, and read back in float32."""

    def __init__(self, weights: Weights, *, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype
        self.shapes = weights.shapes

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        return (self._rounded(block) for block in self._weights.blocks(name))

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        return self._rounded(self._weights.rows(name, indices))

    def _rounded(self, block: torch.Tensor) -> torch.Tensor:
        return block.to(self._dtype).to(torch.float32) if block.is_floating_point() else block


class MappedWeights:
    """`weights` with some tensors put through a function: the whole float32 tensor in, one of the same shape out.

    What a trainer had who quantized the base as it was read: `function` is quantizing and back, `is_mapped` tells which names.
    Holds one such tensor at a time.
    """

    def __init__(self, weights: Weights, *, function: Callable[[torch.Tensor], torch.Tensor], is_mapped: Callable[[str], bool]) -> None:
        self._weights = weights
        self._function = function
        self._is_mapped = is_mapped
        self.shapes = weights.shapes

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        if self._is_mapped(name):
            yield self._function(read(self._weights, name)).reshape(rows_and_columns(self.shapes[name]))
        else:
            yield from self._weights.blocks(name)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        return self._function(read(self._weights, name))[indices] if self._is_mapped(name) else self._weights.rows(name, indices)


def in_float32(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32 where they are floating-point numbers."""
    return values.to(torch.float32) if values.is_floating_point() else values
