"""Where a streamed pass takes its weights from: checkpoint tensors in float32, in blocks of rows.

Owns the few sources that a comparison needs, each an object that can stand for a folder's weights, plain or dequantized. They read as they
are asked and keep nothing. Leaves the file format to `tensorfiles`, an adapter's changes to `changes`, rounding to `plain_forms`, and which
parameter a tensor becomes to `parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from finery_common.errors import UnimplementedError
from finery_converter.base_tensors import BaseTensor, PlainTensor, QuantizedTensor, Scratch, base_files, base_tensors, quantization_of
from finery_converter.pipeline import Buffers, ReadAhead
from finery_converter.tensorfiles import StoredTensor, rows_and_columns

BLOCK_BYTES = 16 * 1024 * 1024
"""Of a block as it lies in a file; in float32 it is twice that. Smaller ones cost more in threads' waiting than they save."""
_FP8_BLOCK = 128
_FP8_SCALE = "_scale"
_QUANTIZED_BUFFERS = 2


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


class StoredWeights(Weights, Protocol):
    """Those of a folder."""

    @property
    def quantized(self) -> frozenset[str]:
        """Names of tensors that the folder holds quantized."""
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


def folder_weights(folder: Path) -> StoredWeights:
    """The weights of a model folder, dequantized where it holds NF4 (bitsandbytes) or FP8 (compressed-tensors).

    Raises UnimplementedError for other kinds of quantization, FailedPreconditionError where weights are missing, InvalidArgumentError for a
    broken file.
    """
    method = quantization_of(folder)
    if method is None:
        return FolderWeights(folder)
    if method == "compressed-tensors":
        return Fp8Weights(folder)
    return TensorWeights(base_tensors(folder).values())


class FolderWeights:
    """The plain tensors (16 or 32 bits) of a model folder. Raises as `folder_weights` does."""

    quantized: frozenset[str] = frozenset()

    def __init__(self, folder: Path) -> None:
        self.tensors = {name: tensor for tensors in base_files(folder).values() for name, tensor in tensors.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self.tensors.items()}

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        return stored_blocks(self.tensors[name])

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        return _stored_rows(self.tensors[name], indices)


class TensorWeights:
    """The values of a merge's base tensors: plain, quantized, or as a trainer quantized them (`MergePlan.shards`, file by file)."""

    def __init__(self, files: Iterable[Mapping[str, BaseTensor]]) -> None:
        self._tensors = {name: tensor for tensors in files for name, tensor in tensors.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.quantized = frozenset(name for name, tensor in self._tensors.items() if isinstance(tensor, QuantizedTensor))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        tensor = self._tensors[name]
        if isinstance(tensor, PlainTensor):
            return stored_blocks(tensor.stored)
        buffers = Buffers(count=_QUANTIZED_BUFFERS, size_bytes=BLOCK_BYTES)
        return tensor.values(tensor.read_blocks(buffers), Scratch())

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        tensor = self._tensors[name]
        return _stored_rows(tensor.stored, indices) if isinstance(tensor, PlainTensor) else read(self, name)[indices]


class Fp8Weights:
    """A folder in compressed-tensors' FP8: each number times the scale of its row, or of its block of 128 x 128."""

    def __init__(self, folder: Path) -> None:
        stored = {name: tensor for tensors in base_files(folder).values() for name, tensor in tensors.items()}
        self._scales = {name: stored[name + _FP8_SCALE] for name in stored if name + _FP8_SCALE in stored}
        self._stored = {name: tensor for name, tensor in stored.items() if name.removesuffix(_FP8_SCALE) not in self._scales}
        self._stored |= {name: stored[name] for name in self._scales}
        bare = [name for name, tensor in self._stored.items() if tensor.dtype.itemsize == 1 and name not in self._scales]
        if bare:
            raise UnimplementedError(f"{folder.name}: {bare[0]} has no scale; of compressed-tensors only plain FP8 can be read.")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._stored.items()}
        self.quantized = frozenset(self._scales)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        if name not in self._scales:
            yield from stored_blocks(self._stored[name])
            return
        scales = in_float32(self._scales[name].read())
        row = 0
        for block in stored_blocks(self._stored[name]):
            yield block * _expanded(scales, rows=slice(row, row + len(block)), shape=self.shapes[name])
            row += len(block)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        return read(self, name)[indices] if name in self._scales else _stored_rows(self._stored[name], indices)


def _expanded(scales: torch.Tensor, *, rows: slice, shape: tuple[int, ...]) -> torch.Tensor:
    """FP8's scales for some rows of a matrix: one a row, or one for each of its numbers."""
    if scales.shape == (shape[0], 1):
        return scales[rows]
    if scales.shape != (-(-shape[0] // _FP8_BLOCK), -(-shape[1] // _FP8_BLOCK)):
        raise UnimplementedError(f"FP8 scales of shape {list(scales.shape)} for a weight of {list(shape)} cannot be read.")
    of_rows = scales.repeat_interleave(_FP8_BLOCK, dim=0)[rows]
    return of_rows.repeat_interleave(_FP8_BLOCK, dim=1)[:, : shape[1]]


def stored_blocks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """The rows of `tensor` in float32 (whole numbers as they are); while one block is used a thread reads the next."""
    if tensor.size_bytes <= BLOCK_BYTES:
        yield from (in_float32(block) for block in tensor.blocks(BLOCK_BYTES))
        return
    with ReadAhead(tensor.blocks(BLOCK_BYTES), depth=1) as blocks:
        for block in blocks:
            yield in_float32(block)


def _stored_rows(tensor: StoredTensor, indices: torch.Tensor) -> torch.Tensor:
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    data = torch.empty(len(indices), row_bytes, dtype=torch.uint8)
    for place, index in enumerate(indices.tolist()):
        tensor.read_into(data[place], start=index * row_bytes)
    return in_float32(data.view(tensor.dtype))


def in_float32(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32 where they are floating-point numbers."""
    return values.to(torch.float32) if values.is_floating_point() else values
