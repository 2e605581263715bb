"""HTTP/1.1 to one vLLM: a pool of connections, requests with a whole body, answers in the pieces they arrive in.

Every token of every stream comes through here, so it does little: bytes are taken out of their framing and handed on, several at a time
where several have arrived. A general client spends ten times as much on a piece, and its pool time that grows with the square of the
streams. What an answer means is the proxy's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit

from finery_common.tls import VLLM_NAME, Trust

CONNECT_TIMEOUT_S = 5.0
# Below the 5 s after which vLLM's server closes an idle connection.
IDLE_S = 4.0
_MAX_IDLE = 256
_MAX_HEAD_BYTES = 64 * 1024
# A client that reads slowly slows vLLM's writing down instead of filling memory.
_MAX_WAITING_BYTES = 1024 * 1024
_UNIX = re.compile(r"unix://(/.+)")
# A host that is gone, which closes nothing, is noticed within half a minute: by probes where we wait, by what is not acknowledged where we
# have sent. vLLM's own silence, however long, answers probes.
_DEAD_HOST = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 10,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 25_000,
}


class UpstreamError(Exception):
    """vLLM cannot be reached, or broke off."""


class UpstreamTimeoutError(UpstreamError):
    """vLLM was silent for too long."""


class UnreachableError(UpstreamError):
    """No connection could be made, so that nothing was sent."""


class ClosedBeforeAnswerError(UpstreamError):
    """The connection was closed in order before a byte of the answer: an idle one that vLLM closes at the moment it is used again."""


class Answer:
    """A status, headers with lower-case names, and a body still to be read. Whoever gets it closes it."""

    def __init__(self, connection: _Connection, pool: Upstream) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self._connection = connection
        self._pool = pool
        self._is_closed = False

    async def read(self) -> bytes:
        """The next bytes of the body, empty at its end. Raises UpstreamError."""
        return await self._connection.read()

    def close(self) -> None:
        """Gives the connection back; one whose answer is not read to its end is cut, upon which vLLM stops generating."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pool.give_back(self._connection)


class Upstream:
    """Connections to one address: `unix:///path`, `http://host:port` or `https://host:port`. `timeout_s` bounds a silence of vLLM.

    With https the certificate has to be vLLM's by `tls`.
    """

    def __init__(self, address: str, *, timeout_s: float, tls: Trust | None = None) -> None:
        self._address = address
        self._tls = tls
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self.num_in_flight = 0
        """Requests sent, or about to be, whose answers are not closed yet."""
        parts = urlsplit(address)
        self._host = parts.netloc or "vllm"

    async def post(self, path: str, *, headers: Mapping[str, str], body: bytes) -> Answer:
        """Sends a request; answers once the head of the answer is here. Raises UpstreamError, by kind where that tells more."""
        lines = [f"POST {path} HTTP/1.1", f"host: {self._host}", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, f"content-length: {len(body)}"])
        assert head.count("\r\n") == len(lines), "a line break in a header"
        request = head.encode("latin-1") + b"\r\n\r\n" + body
        self.num_in_flight += 1
        try:
            kept = self._take()
            if kept is not None:
                with contextlib.suppress(ClosedBeforeAnswerError):
                    return await self._ask(kept, request)
            return await self._ask(await self._connect(), request)
        except BaseException:
            self.num_in_flight -= 1
            raise

    async def _ask(self, connection: _Connection, request: bytes) -> Answer:
        try:
            await connection.ask(request, timeout_s=self._timeout_s)
        except BaseException:
            connection.abort()
            raise
        return Answer(connection, self)

    def give_back(self, connection: _Connection) -> None:
        """Ends a request and keeps its connection for the next where it can be."""
        self.num_in_flight -= 1
        if connection.is_reusable and len(self._idle) < _MAX_IDLE:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    @property
    def is_spent(self) -> bool:
        """Nothing is in flight and no connection is left that would be used again."""
        return not self.num_in_flight and not any(_is_fresh(connection) for connection in self._idle)

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _take(self) -> _Connection | None:
        while self._idle:
            # The newest first, so that those beyond the need grow old.
            connection = self._idle.pop()
            if _is_fresh(connection):
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                unix = _UNIX.fullmatch(self._address)
                if unix:
                    return (await loop.create_unix_connection(_Connection, unix[1]))[1]
                parts = urlsplit(self._address)
                host, port = parts.hostname or "", parts.port or 80
                if parts.scheme != "https":
                    return (await loop.create_connection(_Connection, host, port))[1]
                if self._tls is None:
                    raise UpstreamError(f"{self._address}: FINERY_VLLM_CA_FILE is not set; set it to who signs vLLM's certificate")
                return (await loop.create_connection(_Connection, host, port, ssl=self._tls.context(), server_hostname=VLLM_NAME))[1]
        except (OSError, TimeoutError) as error:
            raise UnreachableError(f"cannot connect to {self._address}: {error!r}") from error


class _Connection(asyncio.Protocol):
    """One connection, one request at a time: `ask`, then `read` until it is empty."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: UpstreamError | None = None
        self._raw = b""
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._is_paused = False
        self._state = "idle"
        self._left_bytes = 0
        self._ends_line = False
        self._keeps = True
        self._heard_s = 0.0
        self._watch: asyncio.TimerHandle | None = None

    @property
    def is_reusable(self) -> bool:
        """The last answer was read to its end and vLLM keeps the connection."""
        return self._state == "idle" and self._keeps and self._failure is None and not self._raw and not self._pieces

    async def ask(self, request: bytes, *, timeout_s: float) -> None:
        """Sends `request` and waits for the head of its answer."""
        assert self._state == "idle"
        assert self._transport is not None
        self.status, self.headers, self._state = 0, {}, "head"
        self._heard_s = self._loop.time()
        self._watch = self._loop.call_later(timeout_s, self._check_silence, timeout_s)
        self._transport.write(request)
        while not self.status:
            await self._wait()

    async def read(self) -> bytes:
        """What has arrived of the body, empty at its end."""
        while not self._pieces:
            if self._state == "idle":
                return b""
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def abort(self) -> None:
        """Cuts the connection."""
        self._stop_watch()
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: UpstreamError) -> None:
        self._failure = self._failure or failure
        self._keeps = False
        self._stop_watch()
        self._wake()

    def _check_silence(self, timeout_s: float) -> None:
        left_s = self._heard_s + timeout_s - self._loop.time()
        # What waits to be read is the client's slowness, not vLLM's silence; `http_server` bounds it.
        if left_s > 0 or self._is_paused:
            self._watch = self._loop.call_later(max(left_s, 1.0), self._check_silence, timeout_s)
        else:
            self._fail(UpstreamTimeoutError(f"silent for {timeout_s:.0f} s"))

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport, but do the same.
        self._transport = cast("asyncio.Transport", transport)
        own: socket.socket = transport.get_extra_info("socket")
        if own.family != socket.AF_UNIX:
            for (level, option), value in _DEAD_HOST.items():
                own.setsockopt(level, option, value)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state == "to the end" and exc is None:
            self._finish()
        elif self._state == "head" and exc is None and not self._raw:
            self._fail(ClosedBeforeAnswerError("closed before the answer"))
        elif self._state != "idle":
            self._fail(UpstreamError(f"the connection broke: {exc!r}"))
        self._keeps = False

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        self._raw = self._raw + data if self._raw else data
        try:
            while self._state != "idle" and self._step():
                pass
        except ValueError as error:
            self._fail(UpstreamError(f"not HTTP: {error}"))
            self.abort()
            return
        if self._waiting_bytes > _MAX_WAITING_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    # Parsing: each step takes something off `_raw`, and says whether another can be taken.

    def _step(self) -> bool:
        if self._state == "chunks":
            return self._chunks()
        if self._state == "head":
            return self._head()
        return self._trailer() if self._state == "trailer" else self._body()

    def _head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            if len(self._raw) > _MAX_HEAD_BYTES:
                raise ValueError("a head without end")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, words = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"got {first[:40]!r}")
        self._raw = rest
        status = int(words[:3])
        if status < 200:
            return True
        self.status = status
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._keeps = version == "HTTP/1.1" and self.headers.get("connection", "").lower() != "close"
        self._begin_body()
        return True

    def _begin_body(self) -> None:
        length = self.headers.get("content-length")
        self._left_bytes = 0
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._state = "chunks"
        elif length is not None:
            self._state, self._left_bytes = "body", int(length)
            if not self._left_bytes:
                self._finish()
        elif self.status in (204, 304):
            self._finish()
        else:
            self._keeps = False
            self._state, self._left_bytes = "to the end", 1 << 62

    def _chunks(self) -> bool:
        """Takes all the chunks there are: `_left_bytes` of one's data, the line end behind it, the next one's size."""
        raw, at = self._raw, 0
        while True:
            if self._left_bytes:
                piece = raw[at : at + self._left_bytes]
                if not piece:
                    break
                at += len(piece)
                self._keep(piece)
                if self._left_bytes:
                    break
                self._ends_line = True
            end = raw.find(b"\r\n", at)
            if end < 0:
                break
            line, at = raw[at:end], end + 2
            if self._ends_line:
                if line:
                    raise ValueError("a chunk longer than its size")
                self._ends_line = False
                continue
            self._left_bytes = int(line.partition(b";")[0], 16)
            if self._left_bytes <= 0:
                if self._left_bytes:
                    raise ValueError("a negative size")
                self._state, self._raw = "trailer", raw[at:]
                return True
        self._raw = raw[at:]
        if len(self._raw) > _MAX_HEAD_BYTES:
            raise ValueError("a chunk without size")
        return False

    def _body(self) -> bool:
        piece = self._raw[: self._left_bytes]
        if not piece:
            return False
        self._raw = self._raw[len(piece) :]
        self._keep(piece)
        if not self._left_bytes:
            self._finish()
        return True

    def _keep(self, piece: bytes) -> None:
        self._left_bytes -= len(piece)
        self._waiting_bytes += len(piece)
        self._pieces.append(piece)

    def _trailer(self) -> bool:
        end = self._raw.find(b"\r\n")
        if end < 0:
            return False
        is_last = end == 0
        self._raw = self._raw[end + 2 :]
        if is_last:
            self._finish()
        return not is_last

    def _finish(self) -> None:
        self._state = "idle"
        self._stop_watch()
        self._wake()


def _is_fresh(connection: _Connection) -> bool:
    return connection.is_reusable and time.monotonic() - connection.idle_since_s < IDLE_S
