"""A multipart/form-data body read as it arrives: small fields into memory, the file as a stream. Keeps one chunk, whatever the size."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from finery_common.errors import InvalidArgumentError
from finery_gateway.errors import PayloadTooLargeError

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 32
_BROKEN = "The multipart body is broken; send multipart/form-data with the parts `file` and `purpose`."


@dataclass
class _Part:
    name: str
    filename: str | None


@dataclass
class _Heads:
    """Collects a part's header lines; the parser hands them over in pieces."""

    name: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    all: dict[str, bytes] = field(default_factory=dict[str, bytes])

    def end(self) -> None:
        self.all[self.name.decode("latin-1").lower()] = bytes(self.value)
        self.name.clear()
        self.value.clear()

    def part(self) -> _Part:
        _, options = parse_options_header(self.all.get("content-disposition", b""))
        filename = options.get(b"filename")
        return _Part(options.get(b"name", b"").decode(errors="replace"), None if filename is None else filename.decode(errors="replace"))


class FormReader:
    """One form: `until_file`, then `file_chunks` to their end, then `rest`. `fields` fills up on the way.

    Every method raises InvalidArgumentError for a body that is not what its content type says.
    """

    def __init__(self, stream: AsyncIterator[bytes], *, content_type: str, file_limit_bytes: int) -> None:
        kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidArgumentError(f"Content-Type: got {content_type!r}, wanted multipart/form-data with a boundary.", param="file")
        self.fields: dict[str, str] = {}
        self._limit_bytes = file_limit_bytes
        self._pending: deque[_Part | bytes | None] = deque()
        self._ended = False
        self._items = self._parsed(stream, boundary)

    async def until_file(self) -> str:
        """Reads fields up to the part `file`; answers its file name. Raises InvalidArgumentError where there is none."""
        filename = await self._next_file()
        if filename is None:
            raise InvalidArgumentError("file: missing; send the file's content as a multipart part named `file`.", param="file")
        return filename

    async def file_chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes. Raises PayloadTooLargeError past the limit."""
        size_bytes = 0
        async for item in self._items:
            if not isinstance(item, bytes):
                return
            size_bytes += len(item)
            if size_bytes > self._limit_bytes:
                raise too_large(self._limit_bytes)
            yield item

    async def rest(self) -> None:
        """Reads the fields after the file. Raises InvalidArgumentError for a second file."""
        if await self._next_file() is not None:
            raise InvalidArgumentError("file: got two, wanted one; upload one file a request.", param="file")

    async def _next_file(self) -> str | None:
        async for item in self._items:
            if not isinstance(item, _Part):
                continue
            if item.filename is not None:
                if item.name != "file":
                    raise InvalidArgumentError(f"{item.name}: unknown file part; the file's part is named `file`.", param=item.name)
                return item.filename
            await self._read_field(item.name)
        return None

    async def _read_field(self, name: str) -> None:
        value = bytearray()
        async for item in self._items:
            if not isinstance(item, bytes):
                break
            value += item
            if len(value) > MAX_FIELD_BYTES or len(self.fields) >= MAX_FIELDS:
                raise InvalidArgumentError(f"{name}: got more than a form field may hold ({MAX_FIELD_BYTES} bytes).", param=name)
        self.fields[name] = value.decode(errors="replace")

    async def _parsed(self, stream: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[_Part | bytes | None]:
        """The parts in order: a _Part, its data, None at its end."""
        parser = self._parser(boundary)
        async for chunk in stream:
            try:
                parser.write(chunk)
            except FormParserError as error:
                raise InvalidArgumentError(_BROKEN) from error
            while self._pending:
                yield self._pending.popleft()
        if not self._ended:
            raise InvalidArgumentError("The body ended before its closing boundary; nothing was stored. Send the upload again.")

    def _parser(self, boundary: bytes) -> MultipartParser:
        heads = _Heads()

        def finish_headers() -> None:
            self._pending.append(heads.part())
            heads.all.clear()

        def end() -> None:
            self._ended = True

        try:
            return MultipartParser(
                boundary,
                {
                    "on_header_field": lambda data, start, stop: heads.name.extend(data[start:stop]),
                    "on_header_value": lambda data, start, stop: heads.value.extend(data[start:stop]),
                    "on_header_end": heads.end,
                    "on_headers_finished": finish_headers,
                    "on_part_data": lambda data, start, stop: self._pending.append(data[start:stop]),
                    "on_part_end": lambda: self._pending.append(None),
                    "on_end": end,
                },
            )
        except FormParserError as error:
            raise InvalidArgumentError(_BROKEN) from error


def too_large(limit_bytes: int) -> PayloadTooLargeError:
    """The error for an upload over its limit."""
    return PayloadTooLargeError(
        f"file: got more than {limit_bytes} bytes, the most this installation takes; split the file or raise FINERY_UPLOAD_LIMIT_BYTES.",
        param="file",
    )
