"""A base model's tensors as numbers, however its files hold them: plain, quantized by bitsandbytes, or as a trainer quantized them.

Owns which tensors a folder has, and how blocks of bytes become blocks of float32 rows. Reading happens on another thread than computing,
so each kind says both: what to read (`read_blocks`), and what values that gives (`values`). Leaves adapters to `lora`, NF4's arithmetic to
`nf4`.

Letters: R rows of a block, K columns, B blocks of quantization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from finery_converter import nf4
from finery_converter.pipeline import Buffers, Lease
from finery_converter.tensorfiles import StoredTensor, read_header, rows_and_columns, rows_at_once

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CHUNK_ELEMENTS = 128 * 1024
"""Where arithmetic needs new memory: so little of it comes from what was just freed."""


class Scratch:
    """One piece of float32 memory, used again and again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def rows(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Contiguous memory [num_rows, num_columns]; what was in it is lost."""
        wanted = num_rows * num_columns
        if self._memory.numel() < wanted:
            self._memory = torch.empty(wanted)
        return self._memory[:wanted].view(num_rows, num_columns)


class BaseTensor(Protocol):
    """One tensor of the model, under its name in the files."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its values; floating-point values are given out in float32 all the same."""
        ...

    @property
    def place(self) -> tuple[str, int]:
        """File and offset of where its bytes begin: reading in this order is reading straight through."""
        ...

    def read_blocks(self, buffers: Buffers) -> Iterator[Lease]:
        """Its bytes in order, a block of whole rows at a time; whoever takes a lease releases it."""
        ...

    def values(self, blocks: Iterator[Lease], scratch: Scratch) -> Iterator[torch.Tensor]:
        """What those bytes say: float32 [R, K] in `scratch`, in order; each is gone when the next is asked for."""
        ...


@dataclass(frozen=True)
class PlainTensor:
    """A tensor whose values are in the file."""

    stored: StoredTensor

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def place(self) -> tuple[str, int]:
        return self.stored.file.name, self.stored.offset

    def read_blocks(self, buffers: Buffers) -> Iterator[Lease]:
        for start, num_bytes in self.stored.spans():
            lease = buffers.take(num_bytes)
            self.stored.read_into(lease.data, start=start)
            yield lease

    def values(self, blocks: Iterator[Lease], scratch: Scratch) -> Iterator[torch.Tensor]:
        num_columns = rows_and_columns(self.shape)[1]
        for lease in blocks:
            raw_RK = lease.data.view(self.dtype).view(-1, num_columns)
            values_RK = scratch.rows(*raw_RK.shape).copy_(raw_RK)
            lease.release()
            yield values_RK


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight that the checkpoint holds as NF4: its values are the dequantized ones, in the dtype that its state names."""

    name: str
    weight: nf4.StoredNf4

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def place(self) -> tuple[str, int]:
        return self.weight.packed.file.name, self.weight.packed.offset

    def read_blocks(self, buffers: Buffers) -> Iterator[Lease]:
        num_rows, num_columns = self.shape
        step = rows_at_once(self.shape, self.dtype.itemsize)
        for row in range(0, num_rows, step):
            # A multiple of 128 rows has an even number of values.
            start, end = row * num_columns // 2, (min(num_rows, row + step) * num_columns + 1) // 2
            lease = buffers.take(end - start)
            self.weight.packed.read_into(lease.data, start=start)
            yield lease

    def values(self, blocks: Iterator[Lease], scratch: Scratch) -> Iterator[torch.Tensor]:
        num_columns = self.shape[1]
        absmax_B, blocksize = self.weight.scales(), self.weight.blocksize
        row = 0
        for lease in blocks:
            if row * num_columns % blocksize:
                raise UnimplementedError(f"The base model's {self.name} has blocks of {blocksize} across its rows of {num_columns}.")
            rows = min(rows_at_once(self.shape, self.dtype.itemsize), self.shape[0] - row)
            values_RK = scratch.rows(rows, num_columns)
            block = row * num_columns // blocksize
            _dequantize(lease.data, absmax_B[block:], blocksize=blocksize, dtype=self.dtype, out=values_RK.view(-1))
            lease.release()
            row += rows
            yield values_RK


@dataclass(frozen=True)
class TrainedNf4Tensor:
    """A plain weight as it was while an adapter trained: cast to the training dtype, quantized to NF4 on load, and dequantized.

    Scales are quantized by their mean over the whole tensor, so that all of it has to be read before the first value is known: one tensor,
    as it lies in the file, is held in memory.
    """

    stored: StoredTensor
    dtype: torch.dtype
    arithmetic: nf4.Arithmetic

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def place(self) -> tuple[str, int]:
        return self.stored.file.name, self.stored.offset

    def read_blocks(self, buffers: Buffers) -> Iterator[Lease]:
        return PlainTensor(self.stored).read_blocks(buffers)

    def values(self, blocks: Iterator[Lease], scratch: Scratch) -> Iterator[torch.Tensor]:
        whole = torch.empty(self.stored.num_elements, dtype=self.stored.dtype)
        absmax_B = torch.empty(-(-self.stored.num_elements // nf4.BLOCK))
        place = 0
        for lease in blocks:
            values = self._copy(lease, whole, place)
            for chunk in values.split(_CHUNK_ELEMENTS):
                found = nf4.block_absmax(chunk.to(self.dtype).to(torch.float32))
                absmax_B[place // nf4.BLOCK : place // nf4.BLOCK + found.numel()] = found
                place += chunk.numel()
        trained_B = nf4.nest(absmax_B, arithmetic=self.arithmetic).scales()
        num_columns = self.shape[1]
        step = rows_at_once(self.shape, self.stored.dtype.itemsize) * num_columns
        for start in range(0, whole.numel(), step):
            part = whole[start : start + step]
            values_RK = scratch.rows(part.numel() // num_columns, num_columns)
            self._quantize(part, start // nf4.BLOCK, absmax_B, trained_B, out=values_RK.view(-1))
            yield values_RK

    def _copy(self, lease: Lease, whole: torch.Tensor, place: int) -> torch.Tensor:
        raw = lease.data.view(self.stored.dtype)
        values = whole[place : place + raw.numel()].copy_(raw)
        lease.release()
        return values

    def _quantize(self, part: torch.Tensor, block: int, absmax_B: torch.Tensor, trained_B: torch.Tensor, *, out: torch.Tensor) -> None:
        for chunk, out_chunk in zip(part.split(_CHUNK_ELEMENTS), out.split(_CHUNK_ELEMENTS), strict=True):
            end = block + -(-chunk.numel() // nf4.BLOCK)
            values = chunk.to(self.dtype).to(torch.float32)
            codes = nf4.codes(values, absmax_B[block:end], arithmetic=self.arithmetic)
            out_chunk.copy_(nf4.dequantized(codes, trained_B[block:end], dtype=self.dtype))
            block = end


def _dequantize(packed: torch.Tensor, absmax_B: torch.Tensor, *, blocksize: int, dtype: torch.dtype, out: torch.Tensor) -> None:
    """The values of `packed` bytes, whose first block has the first of `absmax_B`, rounded to `dtype`, into float32 `out`."""
    from finery_kernels.nf4 import Nf4State, dequantize

    for start in range(0, out.numel(), _CHUNK_ELEMENTS):
        num_elements = min(_CHUNK_ELEMENTS, out.numel() - start)
        block = start // blocksize
        state = Nf4State(
            shape=(1, num_elements),
            dtype=dtype,
            code_16=nf4.code_16(),
            absmax_B=absmax_B[block : block + -(-num_elements // blocksize)],
            blocksize=blocksize,
        )
        part = packed[start // 2 : (start + num_elements + 1) // 2]
        out[start : start + num_elements].view(1, -1).copy_(dequantize(part, state))


def base_files(base_dir: Path) -> dict[str, dict[str, StoredTensor]]:
    """Every weights file of a model folder and its tensors, by their headers.

    Raises FailedPreconditionError where weights are missing, InvalidArgumentError where a file is broken.
    """
    if (base_dir / INDEX_FILE).exists():
        listed = read_json(base_dir / INDEX_FILE).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (base_dir / name).is_file()]
    if missing or not names or any("/" in name for name in names):
        raise FailedPreconditionError(
            f"The base model {base_dir.name} has no {', '.join(missing) or 'weights'}; wanted {WEIGHTS_FILE} or all its shards."
        )
    return {name: read_header(base_dir / name) for name in names}


def base_tensors(base_dir: Path) -> dict[str, dict[str, BaseTensor]]:
    """File name to the model's tensors in it, in the order of their bytes; what an NF4 weight is made of counts as that one tensor.

    Raises UnimplementedError for a base that is quantized in another way, and as `base_files` and `nf4.stored_weights` do.
    """
    method = quantization_of(base_dir)
    if method not in (None, "bitsandbytes"):
        raise UnimplementedError(f"The base model {base_dir.name} is quantized ({method}); merging needs 16- or 32-bit weights, or NF4.")
    files = base_files(base_dir)
    everything = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    quantized = nf4.stored_weights(everything)
    parts = {part for _, names in quantized.values() for part in names}
    result: dict[str, dict[str, BaseTensor]] = {}
    for file_name, stored in files.items():
        tensors: list[BaseTensor] = [PlainTensor(tensor) for name, tensor in stored.items() if name not in parts]
        tensors += [QuantizedTensor(name, quantized[name][0]) for name in stored if name in quantized]
        result[file_name] = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.place)}
    _check_dtypes(result, base_dir, method=method)
    return result


def _check_dtypes(files: dict[str, dict[str, BaseTensor]], base_dir: Path, *, method: str | None) -> None:
    for tensors in files.values():
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn or (method is not None and tensor.dtype in (torch.int8, torch.uint8)):
                raise UnimplementedError(
                    f"The base model {base_dir.name} is quantized: its {name} is {str(tensor.dtype).removeprefix('torch.')}; "
                    "merging needs 16- or 32-bit weights, or NF4."
                )


def quantization_of(base_dir: Path) -> str | None:
    """The method by which config.json says that the weights are quantized."""
    config = read_json(base_dir / "config.json").get("quantization_config")
    if not config:
        return None
    return str(config.get("quant_method", "unknown")) if isinstance(config, dict) else "unknown"


def is_tied(base_dir: Path) -> bool:
    """Whether head and embeddings are one tensor."""
    config = read_json(base_dir / "config.json")
    text = config.get("text_config")
    configs = [config, text] if isinstance(text, dict) else [config]
    return any(item.get("tie_word_embeddings") for item in configs)


def num_elements(tensor: BaseTensor) -> int:
    """Of its shape."""
    return math.prod(tensor.shape)


def read_json(file: Path) -> dict[str, object]:
    """An object in a JSON file. Raises InvalidArgumentError for anything else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{file.name} of {file.parent.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{file.name} of {file.parent.name}: got {type(content).__name__}, wanted an object")
    return content
