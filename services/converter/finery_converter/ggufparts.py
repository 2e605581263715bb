"""GGUF files as they lie on disk: what their headers say, and one file made into several.

Owns reading headers and the splitting by size. Reads no weights but to copy them. Leaves writing models to `gguf` and `quantize`.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from finery_common.errors import InvalidArgumentError
from finery_converter.tensorfiles import file_too_small

# What llama.cpp reads of an older file that does not say.
_ALIGNMENT_KEY = "general.alignment"
_NOT_COPIED = ("GGUF.", "split.", "general.architecture")
_COPY_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor: `shape` as GGUF has it, the width (what a row holds) first; `type_` in lower case, such as "q4_k"."""

    shape: tuple[int, ...]
    type_: str
    size_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself: its tensors, and every value that is no list."""

    tensors: Mapping[str, TensorFacts]
    metadata: Mapping[str, object]


def read_header(file: Path) -> Header:
    """Of one GGUF file. Raises InvalidArgumentError where it is not one.

    `gguf`'s reader makes an array of every token of the vocabulary, which takes seconds; this one passes over lists.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(content).header()
    except (ValueError, KeyError, struct.error, FileNotFoundError) as error:
        raise InvalidArgumentError(f"{file} is not a GGUF file that can be read: {error}", code="gguf_unreadable") from error


class _Cursor:
    """A place in a GGUF file, version 2 or 3."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 0

    def header(self) -> Header:
        magic, version, num_tensors, num_values = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        metadata = {key: value for key, value in (self._entry() for _ in range(num_values)) if value is not None}
        return Header(tensors=dict(self._tensor() for _ in range(num_tensors)), metadata=metadata)

    def _entry(self) -> tuple[str, object]:
        """A key and its value, None for a list."""
        key, (kind,) = self._text(), self._take("<I")
        if kind == GGUFValueType.ARRAY:
            self._pass_list()
            return key, None
        return key, self._text() if kind == GGUFValueType.STRING else self._take(f"<{_SCALARS[kind]}")[0]

    def _pass_list(self) -> None:
        kind, length = self._take("<IQ")
        if kind == GGUFValueType.STRING:
            for _ in range(length):
                self._place += 8 + _LENGTH.unpack_from(self._content, self._place)[0]
        elif kind == GGUFValueType.ARRAY:
            for _ in range(length):
                self._pass_list()
        else:
            self._place += length * struct.calcsize(f"<{_SCALARS[kind]}")

    def _tensor(self) -> tuple[str, TensorFacts]:
        name, (num_dims,) = self._text(), self._take("<I")
        shape = self._take(f"<{num_dims}Q")
        type_number, _ = self._take("<IQ")
        type_ = GGMLQuantizationType(type_number)
        block_length, block_bytes = GGML_QUANT_SIZES[type_]
        return name, TensorFacts(shape=shape, type_=type_.name.lower(), size_bytes=math.prod(shape) // block_length * block_bytes)

    def _text(self) -> str:
        (length,) = self._take("<Q")
        self._place += length
        return self._content[self._place - length : self._place].decode()

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return values


_LENGTH = struct.Struct("<Q")
# By the number of a value's type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def type_counts(tensors: Mapping[str, TensorFacts]) -> dict[str, int]:
    """How many tensors are of each type, the most common first."""
    return dict(Counter(fact.type_ for fact in tensors.values()).most_common())


def parts_of(file: Path) -> Sequence[Path]:
    """`file` and the parts that follow it, where it is the first of several."""
    named = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", file.name)
    if named is None:
        return [file]
    return [file.with_name(f"{named[1]}-{index:05}-of-{named[2]}.gguf") for index in range(1, int(named[2]) + 1)]


def split(file: Path, *, max_part_bytes: int, on_progress: Callable[[float], None]) -> tuple[Path, ...]:
    """Replaces `file` by NAME-00001-of-0000N.gguf beside it, each of at most `max_part_bytes`; answers the parts in order.

    A file that is small enough stays as it is. llama.cpp loads the parts when it is given the first. Needs `file`'s size of disk again.
    Raises InvalidArgumentError where a tensor alone is larger than a part may be.
    """
    if file.stat().st_size <= max_part_bytes:
        on_progress(1.0)
        return (file,)
    reader = GGUFReader(file)
    writer = _writer(reader, max_data_bytes=max_part_bytes - _overhead_bytes(reader, max_part_bytes=max_part_bytes))
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total_bytes, done_bytes = sum(tensor.n_bytes for tensor in reader.tensors), 0
    for tensor in reader.tensors:
        writer.write_tensor_data(np.fromfile(file, dtype=np.uint8, count=tensor.n_bytes, offset=tensor.data_offset))
        done_bytes += tensor.n_bytes
        on_progress(done_bytes / total_bytes)
    writer.close()
    parts = tuple(sorted(file.parent.glob(f"{file.stem}-?????-of-?????.gguf")))
    assert len(parts) > 1
    assert all(part.stat().st_size <= max_part_bytes for part in parts)
    file.unlink()
    return parts


def _writer(reader: GGUFReader, *, max_data_bytes: int) -> GGUFWriter:
    """A writer that knows all that `reader` read, and where its parts begin."""
    writer = GGUFWriter(None, str(reader.fields["general.architecture"].contents()), split_max_size=max_data_bytes)
    if _ALIGNMENT_KEY in reader.fields:
        writer.data_alignment = int(reader.fields[_ALIGNMENT_KEY].contents())
    for name, field in reader.fields.items():
        if not name.startswith(_NOT_COPIED):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.n_bytes, raw_dtype=tensor.tensor_type)
    return writer


def _overhead_bytes(reader: GGUFReader, *, max_part_bytes: int) -> int:
    """What the first part holds beside weights: the header, and padding after each tensor."""
    header_bytes = min(tensor.data_offset for tensor in reader.tensors)
    overhead_bytes = header_bytes + 4096 + int(reader.alignment) * len(reader.tensors)
    largest = max(reader.tensors, key=lambda tensor: tensor.n_bytes)
    least_bytes = overhead_bytes + int(largest.n_bytes)
    if least_bytes > max_part_bytes:
        raise file_too_small(max_part_bytes, f"{largest.name} with the file's own data", least_bytes=least_bytes)
    return overhead_bytes


def free_bytes(folder: Path) -> int:
    """What may still be written in `folder`."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize
