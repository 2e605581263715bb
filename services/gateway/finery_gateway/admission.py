"""What a request costs its key, whether the key may have it now, and what is settled when it is over.

Every authenticated REST request is one of the key's requests. A generation takes its tokens before anything goes to vLLM: the prompt by an
estimate, and as many as it may generate. A stream that goes beyond takes more as it passes. In the end the counts that vLLM reports
hold; where none came, what was seen of the answer does. What is refused costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from starlette.types import Scope

from finery_gateway.errors import RateLimitedError
from finery_gateway.limit_table import LimitTable
from finery_gateway.limits import Bucket, KeyLimits, Refusal, Standing
from finery_gateway.metrics import RATE_LIMITED

BYTES_PER_TOKEN = 4
UNBOUNDED_TOKENS = 1024
"""Taken for an answer that the request does not bound; no more than the key may have in a minute."""
# vLLM's own bound where a request has none; a vector is no token.
_DEFAULT_TOKENS = {"/v1/completions": 16, "/v1/embeddings": 0}
_MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_STEP_TOKENS = 64
_STREAM_WAIT_S = 1.0


@dataclass(frozen=True)
class Cost:
    """The tokens of a generation as they are guessed beforehand."""

    prompt_tokens: int
    completion_tokens: int
    bounded: bool
    """The request itself says how much it may generate."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def cost_of(path: str, body: Mapping[str, object]) -> Cost:
    """Four bytes are a token of a prompt, token ids are counted; every choice of every prompt may be as long as it may be."""
    prompt = body.get("prompt")
    prompts, token_ids = _prompts(prompt)
    text = {name: value for name, value in body.items() if name != "prompt"} if token_ids else body
    size_bytes = len(json.dumps(text, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass"))
    asked = next((value for name in _MAX_TOKENS_FIELDS if isinstance(value := body.get(name), int)), _DEFAULT_TOKENS.get(path))
    choices = cast("int", body.get("n") or 1) * prompts
    completion_tokens = (UNBOUNDED_TOKENS if asked is None else asked) * choices
    return Cost(math.ceil(size_bytes / BYTES_PER_TOKEN) + token_ids, completion_tokens, bounded=asked is not None)


class GenerationRecord:
    """What became known of one generation; its admission and the log read it when it is over."""

    def __init__(self) -> None:
        self.version = ""
        """The version it was sent to; empty before anything was sent."""
        self.prompt_tokens = 0
        self.completion_tokens = 0


class Admission:
    """One generation that was let in."""

    def __init__(self, allowance: Allowance, *, path: str, body: Mapping[str, object], record: GenerationRecord, streams: bool) -> None:
        self._allowance = allowance
        self._record = record
        self._streams = streams
        self._limited = allowance.limits.tokens_per_minute is not None
        self._cost = cost_of(path, body) if self._limited else Cost(0, 0, bounded=True)
        self._taken = self._cost.tokens
        self._seen = 0

    def enter(self) -> None:
        """Raises RateLimitedError, and takes nothing, where the key has no room."""
        limit = self._allowance.limits.tokens_per_minute
        if limit is not None and not self._cost.bounded:
            self._taken = max(self._cost.prompt_tokens + 1, min(self._taken, limit))
        self._allowance.take_generation(self._taken)

    def saw(self, chunk: bytes) -> None:
        """Counts the events of a stream as they pass: a token each, at the least."""
        if not self._limited:
            return
        # A blank line ends an event; inside JSON there is none.
        self._seen += chunk.count(b"\n\n")
        if self._cost.prompt_tokens + self._seen > self._taken:
            self._taken += _STEP_TOKENS
            self._allowance.charge(tokens=_STEP_TOKENS)

    def leave(self, *, failed: bool) -> None:
        """Settles. What failed on the way costs no tokens."""
        used = 0 if failed else self._used()
        self._allowance.charge(tokens=used - self._taken, streams=-1)

    def _used(self) -> int:
        record = self._record
        if counted := record.prompt_tokens + record.completion_tokens:
            return counted
        if not record.version:
            return 0  # It never went out.
        # Of a whole answer that nobody waited for, nothing says how far it came.
        return self._cost.prompt_tokens + self._seen if self._streams else self._taken


class Allowance:
    """What one request's key may still have. `standing` is as of the last time that something was taken."""

    def __init__(self, table: LimitTable, *, key_id: str, limits: KeyLimits) -> None:
        self.limits = limits
        self._table = table
        self._key_id = key_id
        self._standing = Standing()
        self.refused: str | None = None
        """The limit that was in the way."""

    def take_request(self) -> None:
        """Counts the request. Raises RateLimitedError where it is one too many."""
        if not self.limits.given():
            return
        self._standing, refusal = self._table.take(self._key_id, self.limits, requests=1)
        if refusal is not None:
            raise self._error(refusal, requested=1)

    def take_generation(self, tokens: int) -> None:
        """Takes tokens and one stream. Raises RateLimitedError where there is no room; the request is then given back as well."""
        self._standing, refusal = self._table.take(self._key_id, self.limits, tokens=tokens, streams=1)
        if refusal is not None:
            self.charge(requests=-1)
            raise self._error(refusal, requested=tokens)

    def charge(self, *, requests: int = 0, tokens: int = 0, streams: int = 0) -> None:
        """Takes, or gives back, without asking."""
        self._standing = self._table.charge(self._key_id, self.limits, requests=requests, tokens=tokens, streams=streams)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers: limit, what remains of it, and when all of it does."""
        made: list[tuple[bytes, bytes]] = []
        for name, bucket in (("requests", self._standing.requests), ("tokens", self._standing.tokens)):
            if bucket is not None:
                made += _headers(name, bucket)
        return made

    def _error(self, refusal: Refusal, *, requested: int) -> RateLimitedError:
        self.refused = refusal.limit
        RATE_LIMITED.labels(refusal.limit).inc()
        wait_s = _STREAM_WAIT_S if refusal.wait_s is None else refusal.wait_s
        message = _message(refusal, self.limits, requested=requested)
        return RateLimitedError(message, limit=refusal.limit, retry_after_s=wait_s if math.isfinite(wait_s) else None)


@contextlib.contextmanager
def admitted(scope: Scope, *, path: str, body: Mapping[str, object], record: GenerationRecord, streams: bool) -> Iterator[Admission | None]:
    """Lets a generation in under the limits of the request's key and settles at its end, however it ends; None without limits.

    Raises RateLimitedError where there is no room.
    """
    allowance: Allowance | None = scope.get("state", {}).get("allowance")
    if allowance is None or not allowance.limits.given():
        yield None
        return
    admission = Admission(allowance, path=path, body=body, record=record, streams=streams)
    admission.enter()
    failed = False
    try:
        yield admission
    except Exception:
        failed = True
        raise
    finally:
        admission.leave(failed=failed)


def _prompts(prompt: object) -> tuple[int, int]:
    """How many prompts `/v1/completions` was given, and how many token ids are in them."""
    if not isinstance(prompt, list | tuple):
        return 1, 0
    items = cast("list[object]", prompt)
    if isinstance(items[0], int):
        return 1, len(items)
    return len(items), sum(len(cast("list[int]", item)) for item in items if isinstance(item, list | tuple))


def _headers(name: str, bucket: Bucket) -> list[tuple[bytes, bytes]]:
    values = {"limit": str(bucket.limit), "remaining": str(bucket.remaining), "reset": duration(bucket.reset_s)}
    return [(f"x-ratelimit-{part}-{name}".encode(), value.encode()) for part, value in values.items()]


def duration(seconds: float) -> str:
    """As OpenAI writes one: 20ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


def _message(refusal: Refusal, limits: KeyLimits, *, requested: int) -> str:
    if refusal.limit == "streams":
        return f"Rate limit reached: the key may have {limits.concurrent_streams} generations at a time; try again when one has ended."
    limit = limits.requests_per_minute if refusal.limit == "requests" else limits.tokens_per_minute
    if refusal.wait_s is not None and not math.isfinite(refusal.wait_s):
        return (
            f"Request too large: prompt and answer may come to {requested} tokens, and the key may have {limit} a minute; "
            "ask for fewer max_tokens, send a shorter prompt, or have the key's tokens_per_minute raised."
        )
    used = "one request" if refusal.limit == "requests" else f"{requested} tokens"
    return (
        f"Rate limit reached on {refusal.limit} per minute: the key may have {limit}, and {used} more would be too many; "
        f"try again in {duration(refusal.wait_s or 0.0)}."
    )
