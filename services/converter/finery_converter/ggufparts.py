"""GGUF files as they lie on disk: what their headers say, and one file made into several.

Owns reading headers and the splitting by size. Reads no weights but to copy them. Leaves writing models to `gguf` and `quantize`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor

from finery_common.errors import InvalidArgumentError

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
        return int(np.prod(self.shape))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself: its tensors, and every value that is no list."""

    tensors: Mapping[str, TensorFacts]
    metadata: Mapping[str, object]


def read_header(file: Path) -> Header:
    """Of one GGUF file; takes a second or two where the vocabulary is large. Raises InvalidArgumentError where it is not one."""
    reader = _reader(file)
    scalars = {name: field.contents() for name, field in reader.fields.items() if field.types and field.types[0] != GGUFValueType.ARRAY}
    return Header(tensors={tensor.name: _facts(tensor) for tensor in reader.tensors}, metadata=scalars)


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
        return (file,)
    reader = _reader(file)
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


def _reader(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise InvalidArgumentError(f"{file} is not a GGUF file that can be read: {error}", code="gguf_unreadable") from error


def _facts(tensor: ReaderTensor) -> TensorFacts:
    return TensorFacts(
        shape=tuple(int(size) for size in tensor.shape), type_=tensor.tensor_type.name.lower(), size_bytes=int(tensor.n_bytes)
    )


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
        raise InvalidArgumentError(
            f"Parts of {max_part_bytes:,} bytes are too small: the tensor {largest.name} and the file's own data take {least_bytes:,}; "
            "allow at least that.",
            code="part_too_small",
            param="max_part_bytes",
        )
    return overhead_bytes


def free_bytes(folder: Path) -> int:
    """What may still be written in `folder`."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize
