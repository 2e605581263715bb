"""What a worker and its server say to each other over pipes: frames of a JSON header and a body of bytes.

Owns their form on both sides. Plain data only, no pickle: a worker runs a template that somebody else wrote.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">II")

Header = Mapping[str, Any]


def pack(header: Header, body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def read_frame(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next frame's header and body, or None where the other side is gone."""
    prefix = file.read(_LENGTHS.size)
    if len(prefix) < _LENGTHS.size:
        return None
    header_bytes, body_bytes = _LENGTHS.unpack(prefix)
    data = file.read(header_bytes + body_bytes)
    if len(data) < header_bytes + body_bytes:
        return None
    return json.loads(data[:header_bytes]), data[header_bytes:]


async def read_frame_async(stream: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """As `read_frame`. Raises asyncio.IncompleteReadError where the other side is gone."""
    header_bytes, body_bytes = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    header = json.loads(await stream.readexactly(header_bytes))
    return header, await stream.readexactly(body_bytes)
