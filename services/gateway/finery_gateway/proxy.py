"""One hop from a client to vLLM: finds the route and the least busy replica, sends the request, streams the answer's bytes back.

Owns retries before the first byte, the end of a generation whose client has left, and the words for what goes wrong upstream. The
fields of a request are `inference_fields`' business, the model's name in the answer is rewritten inside vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import structlog
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from finery_common.errors import (
    DeadlineExceededError,
    FineryError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.tls import Trust
from finery_common.tracing import TRACEPARENT, traceparent
from finery_gateway.admission import Admission, GenerationRecord, admitted
from finery_gateway.errors import envelope
from finery_gateway.metrics import FIRST_BYTE_SECONDS, RETRIED, STREAMS, TOKENS
from finery_gateway.resources import RouteReplica
from finery_gateway.routes import Routes
from finery_gateway.splits import chosen, new_key
from finery_gateway.upstream import Answer, UnreachableError, Upstream, UpstreamError, UpstreamTimeoutError
from finery_gateway.usage import BodyTap, ResponsesTap, StreamTap
from finery_gateway.version_reports import Outcome, VersionReports

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
EMBEDDINGS_PATH = "/v1/embeddings"
_ERROR_BYTES = 64 * 1024
# One health interval of serving's registry, after which a dead replica is in no route.
_SUSPECTED_S = 5.0
# Tries by what failed. What was refused as retired was not begun, and on a busy machine an alias may move on more than once, or its
# version be evicted again, in the time that a request takes to vLLM.
# Replicas that cannot be reached at all do not count while there is one that was not tried.
_MAX_TRIES = {"connection": 2, "unreachable": 2, "token": 2, "retired": 8}
_PAUSE_S = 0.05
# What the middleware makes of an engine's end within a stream.
_BROKEN = re.compile(rb'data:\s*\{\s*"error"\s*:\s*\{[^{}]*"code"\s*:\s*"stream_broken"')
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Generation:
    """One request for tokens, its fields already checked."""

    project: str
    model: str
    path: str
    body: Mapping[str, object]
    streams: bool
    wants_usage: bool
    """The client asked for the usage event of a stream."""
    calls_tools: bool = False
    """Only a vLLM that was started for tools may get it."""
    sticky_key: str = field(default_factory=new_key)
    """Whose request it is, where versions share an alias: one key stays on one version."""
    record: GenerationRecord = field(default_factory=GenerationRecord, compare=False)
    """Filled on the way."""


class Proxy:
    """Connections to every vLLM, and the secret that keeps projects' prefix caches apart. `tls` knows vLLM's certificate where it listens
    on a port.
    """

    def __init__(self, routes: Routes, *, secret: str, timeout_s: float, tls: Trust | None = None) -> None:
        self._routes = routes
        self._secret = secret.encode()
        self._timeout_s = timeout_s
        self._tls = tls
        self._upstreams: dict[str, Upstream] = {}
        # Replicas that did not answer, and until when others are asked instead.
        self._suspects: dict[str, float] = {}
        self._cache_salts: dict[str, str] = {}

    @property
    def reports(self) -> VersionReports:
        """What has been counted of each version of an alias."""
        return self._routes.reports

    async def close(self) -> None:
        """Closes every connection that is not in use."""
        await self._routes.close()
        for upstream in self._upstreams.values():
            upstream.close()

    async def open(self, generation: Generation) -> tuple[Answer, bytes]:
        """vLLM's answer and the first bytes of its body, the rest still to be read; the caller closes it.

        Tries again, where there is another replica at one that has neither failed nor refused: a retired version, a restarted vLLM and a
        broken connection all mean that the route is no longer good. Each has its number of tries; of those for a version that stays
        retired, none but the second begins after the time in which a model has to be there. Raises FineryError where there is no answer
        with status 200.
        """
        give_up_s = time.monotonic() + self._routes.cold_wait_s
        failure: FineryError | None = None
        version = generation.model
        num_failed: Counter[str] = Counter()
        failed_at: set[str] = set()
        while all(num < _MAX_TRIES[cause] for cause, num in num_failed.items()) and (
            num_failed["retired"] < 2 or time.monotonic() < give_up_s
        ):
            known = await self._routes.route(generation.project, generation.model)
            target = chosen(known.targets, key=generation.sticky_key)
            version = generation.record.version = target.version
            replica = self._least_busy(target.replicas, but_for=failed_at)
            try:
                response, first = await self._begun(generation, replica, version=version)
            except UpstreamTimeoutError as error:
                # It works on it, or hangs; a second try would only double the work.
                self._count(generation, version, "failed")
                raise DeadlineExceededError(f"{generation.model} gave no answer in time; ask for fewer tokens, or stream.") from error
            except UpstreamError as error:
                log.warning("vLLM did not answer", error=repr(error), version=version)
                self._suspect(replica.address)
                failed_at.add(replica.address)
                failure, cause = _not_there(generation.model), "connection"
                if isinstance(error, UnreachableError):
                    cause = "unreachable"
                    num_failed[cause] -= not failed_at.issuperset(other.address for other in target.replicas)
            else:
                if response.status == 200:
                    return response, first
                failure = await _failure(response, generation, version=version)
                if not _is_outdated(response):
                    self._count(generation, version, "refused" if failure.http_status < 500 else "failed")
                    raise failure
                cause = "retired" if _is_retired(response) else "token"
                # It may be about to end, which the agent that is asked next need not have heard of.
                failed_at.add(replica.address)
            num_failed[cause] += 1
            RETRIED.labels(cause).inc()
            self._routes.forget(generation.project, generation.model, route=known)
            if num_failed["retired"] > 1:
                # The first time the alias has moved on; after that serving may still have to see that the version was evicted.
                await asyncio.sleep(_PAUSE_S * num_failed["retired"])
        self._count(generation, version, "failed")
        log.warning("no vLLM took a request", model=generation.model, version=version, failed=dict(num_failed))
        raise _not_there(generation.model) from failure

    def _count(self, generation: Generation, version: str, outcome: Outcome) -> None:
        self.reports.of(generation.project, generation.model, version).count(outcome)

    async def _begun(self, generation: Generation, replica: RouteReplica, *, version: str) -> tuple[Answer, bytes]:
        """The replica's answer, and what its body begins with where the status is 200: a stream has a head before it has a token, and
        until the token comes nothing is lost with the replica. Raises UpstreamError, also for a vLLM that says that its engine has ended.
        """
        response = await self._send(generation, replica, version=version)
        try:
            if response.status == 503:
                raise UpstreamError("its engine has ended")
            first = await response.read() if response.status == 200 else b""
            if generation.streams and _BROKEN.match(first):
                raise UpstreamError("its engine ended before the first token")
        except BaseException:
            response.close()
            raise
        return response, first

    def _least_busy(self, replicas: Sequence[RouteReplica], *, but_for: Set[str] = frozenset()) -> RouteReplica:
        """The one with the fewest requests of this process in flight, of those that have answered lately; any of equals. One of `but_for`
        only where there is no other.
        """
        now_s = time.monotonic()
        self._suspects = {address: until_s for address, until_s in self._suspects.items() if until_s > now_s}

        def rank(replica: RouteReplica) -> tuple[bool, bool, int, float]:
            address = replica.address
            return address in but_for, address in self._suspects, self._num_in_flight(address), random.random()

        return min(replicas, key=rank)

    def _num_in_flight(self, address: str) -> int:
        upstream = self._upstreams.get(address)
        return 0 if upstream is None else upstream.num_in_flight

    def _suspect(self, address: str) -> None:
        self._suspects[address] = time.monotonic() + _SUSPECTED_S
        # Every start of an agent has an address of its own.
        if not self._num_in_flight(address) and (upstream := self._upstreams.pop(address, None)) is not None:
            upstream.close()

    async def _send(self, generation: Generation, replica: RouteReplica, *, version: str) -> Answer:
        body = {**generation.body, "model": version, "cache_salt": self._cache_salt(generation.project)}
        headers = {
            "content-type": "application/json",
            "x-finery-replica-token": replica.token,
            "x-finery-alias": generation.model,
            "x-finery-version": version,
        }
        if generation.calls_tools:
            headers["x-finery-needs"] = "tools"
        if trace := traceparent():
            headers[TRACEPARENT] = trace
        upstream = self._upstreams.get(replica.address)
        if upstream is None:
            # Every start of an agent has an address of its own: what is left of those that are gone goes when another comes.
            for address in [address for address, other in self._upstreams.items() if other.is_spent]:
                self._upstreams.pop(address).close()
            upstream = self._upstreams[replica.address] = Upstream(replica.address, timeout_s=self._timeout_s, tls=self._tls)
        return await upstream.post(generation.path, headers=headers, body=json.dumps(body).encode())

    def _cache_salt(self, project: str) -> str:
        """A prefix cache shared between projects would tell by its timing what others asked."""
        salt = self._cache_salts.get(project)
        if salt is None:
            salt = self._cache_salts[project] = hmac.new(self._secret, f"cache_salt:{project}".encode(), hashlib.sha256).hexdigest()
        return salt


class GenerationResponse(Response):
    """The answer to a generation. What fails before the first byte is raised, so that it becomes an envelope with its status."""

    def __init__(self, proxy: Proxy, generation: Generation) -> None:
        super().__init__()
        self._proxy = proxy
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        generation = self._generation
        scope.setdefault("state", {})["generation"] = generation
        with (
            admitted(scope, path=generation.path, body=generation.body, record=generation.record, streams=generation.streams) as admission,
            STREAMS.track_inprogress(),
        ):
            relay = asyncio.ensure_future(self._relay(send, started_s=started_s, admission=admission))
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((relay, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                # A client that left cancels the relay, which closes the connection, upon which vLLM stops generating.
                for task in (relay, gone):
                    task.cancel()
                results = await asyncio.gather(relay, gone, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    async def _relay(self, send: Send, *, started_s: float, admission: Admission | None) -> None:
        generation = self._generation
        response, chunk = await self._proxy.open(generation)
        version = generation.record.version
        outcome: Outcome = "cancelled"
        report = self._proxy.reports.of(generation.project, generation.model, version)
        tap = _tap(generation)
        try:
            content_type = response.headers.get("content-type", "application/json").encode("latin-1")
            headers = [(b"content-type", content_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            headers.append((b"x-finery-version", version.encode()))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                first_byte_s = time.perf_counter() - started_s
                FIRST_BYTE_SECONDS.labels(generation.path).observe(first_byte_s)
                report.first_byte.observe(first_byte_s)
                while chunk:
                    if admission is not None:
                        admission.saw(chunk)
                    if out := tap.feed(chunk):
                        await send({"type": "http.response.body", "body": out, "more_body": True})
                    chunk = await response.read()
            except UpstreamError as error:
                log.warning("vLLM broke off an answer", error=repr(error), model=generation.model)
                outcome = "failed"
                if not generation.streams:
                    raise
                # What was held back is half an event; the error takes its place.
                await send({"type": "http.response.body", "body": _broken_off(generation.model), "more_body": False})
            else:
                await send({"type": "http.response.body", "body": tap.end(), "more_body": False})
                outcome = "failed" if tap.has_failed else "answered"
                if outcome == "answered":
                    report.whole.observe(time.perf_counter() - started_s)
        finally:
            report.finish(outcome, tap.usage)
            generation.record.prompt_tokens = tap.usage.prompt_tokens
            generation.record.completion_tokens = tap.usage.completion_tokens
            response.close()
            TOKENS.labels(generation.project, "prompt").inc(tap.usage.prompt_tokens)
            TOKENS.labels(generation.project, "completion").inc(tap.usage.completion_tokens)


def _tap(generation: Generation) -> StreamTap | BodyTap:
    if not generation.streams:
        return BodyTap()
    if generation.path == RESPONSES_PATH:
        return ResponsesTap()
    return StreamTap(hide_usage=not generation.wants_usage)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_retired(response: Answer) -> bool:
    """The version is not admitted there, or no more."""
    return response.status == 409 and response.headers.get("x-finery-retired") == "1"


def _is_outdated(response: Answer) -> bool:
    """The route is no longer good: a version that is not admitted, a token of an earlier vLLM, a name vLLM does not know."""
    return _is_retired(response) or response.status in (401, 403, 404)


async def _failure(response: Answer, generation: Generation, *, version: str) -> FineryError:
    """vLLM's error as one of ours. Its own words go on only for what the request itself is to blame for."""
    body = bytearray()
    try:
        while (chunk := await response.read()) and len(body) <= _ERROR_BYTES:
            body += chunk
    except UpstreamError:
        body.clear()
    finally:
        response.close()
    # The middleware has taken everything of the inside out of them.
    message, param = _words(bytes(body))
    message = message.replace(version, generation.model)
    if response.status in (400, 413, 422):
        return InvalidArgumentError(message or "The model refused the request.", param=param, code="invalid_request")
    if response.status == 429:
        return ResourceExhaustedError(message or "The model has too many requests; try again.", retry_after_s=2)
    if response.status == 501:
        return InvalidArgumentError(message or "The model does not offer this.", param=param, code="not_supported")
    if _is_retired(response):
        return _not_there(generation.model)
    log.error("vLLM failed", status=response.status, model=generation.model, error=message)
    return InternalError(f"{generation.model} failed on this request; the operator's log says more. Try again, or change the request.")


def _words(body: bytes) -> tuple[str, str | None]:
    """Message and parameter of an error body, in any of the forms vLLM has."""
    try:
        data = json.loads(body)
    except ValueError:
        return "", None
    if isinstance(data, dict):
        error = data.get("error", data)
        if isinstance(error, dict):
            message, param = error.get("message", error.get("detail", "")), error.get("param")
            return str(message), param if isinstance(param, str) else None
        return str(error), None
    return "", None


def _not_there(model: str) -> UnavailableError:
    return UnavailableError(
        f"{model} cannot be reached at the moment; it is being loaded or restarted. Try again.", retry_after_s=3, code="model_unavailable"
    )


def _broken_off(model: str) -> bytes:
    error = UnavailableError(f"{model} stopped in the middle of the answer; send the request again.", code="stream_broken")
    return b"data: " + json.dumps(envelope(error)).encode() + b"\n\n"
