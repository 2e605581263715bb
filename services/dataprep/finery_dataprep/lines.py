"""The lines of a training file, numbered, in batches, with memory bounded by the longest line allowed.

Owns line ends, the byte order mark, blank lines and lines that are too long. What a line says is `rows`' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_LINE_BYTES = 8 * 1024 * 1024
_BATCH_ROWS = 256
_BATCH_BYTES = 1024 * 1024
_READ_BYTES = 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Line:
    """One line without its end; `number` counts from 1. `is_too_long`: longer than MAX_LINE_BYTES, and not kept."""

    number: int
    data: bytes
    is_too_long: bool = False


def count_lines(path: Path) -> int:
    """How many lines `path` has, blank ones included."""
    count = 0
    last = b""
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last not in (b"", b"\n"))


def is_utf16(path: Path) -> bool:
    """Whether `path` begins with a byte order mark of UTF-16."""
    with path.open("rb") as file:
        return file.read(2) in _UTF16_MARKS


def read_batches(path: Path) -> Iterator[list[Line]]:
    """The lines of `path` in batches of about a megabyte; blank lines at the end are left out."""
    with path.open("rb") as file:
        yield from _batched(_without_trailing_blanks(_lines(file)))


def _lines(file: BinaryIO) -> Iterator[Line]:
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        is_too_long = len(data.rstrip(b"\r\n")) > MAX_LINE_BYTES
        if is_too_long:
            while data and not data.endswith(b"\n"):
                data = file.readline(_READ_BYTES)
            yield Line(number, b"", is_too_long=True)
        else:
            yield Line(number, (data.removeprefix(_BOM) if number == 1 else data).rstrip(b"\r\n"))


def _without_trailing_blanks(lines: Iterable[Line]) -> Iterator[Line]:
    first_blank = 0
    for line in lines:
        if not line.data.strip() and not line.is_too_long:
            first_blank = first_blank or line.number
            continue
        for number in range(first_blank, line.number) if first_blank else ():
            yield Line(number, b"")
        first_blank = 0
        yield line


def _batched(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size_bytes = 0
    for line in lines:
        batch.append(line)
        size_bytes += len(line.data)
        if len(batch) >= _BATCH_ROWS or size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
