"""The process that renders and tokenizes: `python -m finery_dataprep.worker`, spoken to over its standard streams.

Owns the limits it puts on itself: a template runs here and nowhere else, without credentials, with bounded memory. It ends when its
server closes the pipe. The first frame says what to encode with; then each frame of lines is answered by one of tokens and errors.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO

from finery_common.spec import DatasetType
from finery_dataprep.base_tokenizer import BaseTokenizer
from finery_dataprep.chat_template import TemplateError
from finery_dataprep.encoding import EncodedRow, RowEncoder
from finery_dataprep.frames import pack, read_frame
from finery_dataprep.lines import MAX_LINE_BYTES
from finery_dataprep.pairs import encode_pair
from finery_dataprep.rows import RowError, parse_pair, parse_row

MEMORY_LIMIT_BYTES = 4 * 1024**3


def main() -> None:
    """Serves frames until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not end up between the frames.
    os.dup2(2, 1)
    try:
        _serve(sys.stdin.buffer, answers)
    except TemplateError as error:
        _answer(answers, pack({"fatal": {"code": error.code, "message": error.message}}))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    first = read_frame(requests)
    if first is None:
        return
    setup = first[0]
    base = BaseTokenizer(**setup["base"])
    encoder = RowEncoder(base, max_sequence_length=setup["max_sequence_length"], now=datetime.fromisoformat(setup["now"]))
    encode = partial(_ENCODERS[DatasetType(setup["type"])], encoder)
    _answer(answers, pack({}))
    while (frame := read_frame(requests)) is not None:
        _answer(answers, _encoded(encode, *frame))


def _encode_row(encoder: RowEncoder, line: bytes) -> tuple[EncodedRow, ...]:
    return (encoder.encode(parse_row(line)),)


def _encode_pair(encoder: RowEncoder, line: bytes) -> tuple[EncodedRow, ...]:
    return encode_pair(encoder, parse_pair(line))


_ENCODERS = {DatasetType.SUPERVISED: _encode_row, DatasetType.PREFERENCE: _encode_pair}


def _encoded(encode: Callable[[bytes], Sequence[EncodedRow]], header: dict[str, Any], body: bytes) -> bytes:
    rows: list[EncodedRow] = []
    errors: list[tuple[int, str, str]] = []
    start = 0
    for number, size_bytes in header["lines"]:
        try:
            if size_bytes is None:
                raise RowError("row", f"the line is longer than {MAX_LINE_BYTES} bytes; shorten the row")
            start += size_bytes
            rows += encode(body[start - size_bytes : start])
        except RowError as error:
            errors.append((number, error.field, error.description))
    parts = [*(row.input_ids.tobytes() for row in rows), *(row.label_mask.tobytes() for row in rows)]
    return pack({"lengths": [len(row.input_ids) for row in rows], "errors": errors}, b"".join(parts))


def _answer(file: BinaryIO, frame: bytes) -> None:
    file.write(frame)
    file.flush()


if __name__ == "__main__":
    main()
