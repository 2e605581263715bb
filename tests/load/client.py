"""One greedy completion after the other through a gateway, read as it streams.

Owns what is known of an answer. Leaves what answers mean, taken together, to `judged`.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

from finery_gateway.upstream import Upstream, UpstreamError

_PATH = "/v1/completions"
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Reply:
    """An answer, its end or what came instead; times are the monotonic clock's."""

    status: int
    """0 where the connection broke."""
    version: str
    model: str
    text: str
    is_whole: bool
    started_s: float
    first_s: float
    ended_s: float
    error: str = ""


class Client:
    """Asks a gateway with one key, over as many connections as there are questions at a time."""

    def __init__(self, url: str, *, api_key: str) -> None:
        self._upstream = Upstream(url, timeout_s=_TIMEOUT_S)
        self._headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}

    def close(self) -> None:
        self._upstream.close()

    async def stream(self, model: str, *, prompt: str, num_tokens: int) -> Reply:
        """A stream of `num_tokens` tokens. Whatever fails is told in the reply."""
        fields = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
        started_s, first_s, raw, status, version, error = time.monotonic(), 0.0, bytearray(), 0, "", ""
        try:
            answer = await self._upstream.post(_PATH, headers=self._headers, body=json.dumps(fields).encode())
            try:
                status, version = answer.status, answer.headers.get("x-finery-version", "")
                while piece := await answer.read():
                    first_s = first_s or time.monotonic()
                    raw += piece
            finally:
                answer.close()
        except UpstreamError as failure:
            status, error = 0, repr(failure)
        model, text, is_whole = _read(bytes(raw)) if status == 200 else ("", "", False)
        error = error or ("" if is_whole else raw.decode(errors="replace")[-500:])
        return Reply(status, version, model, text, is_whole, started_s, first_s or time.monotonic(), time.monotonic(), error)

    async def logprobs(self, model: str, *, prompt: str, num_tokens: int, top: int = 2) -> list[dict[str, float]]:
        """The likeliest tokens at each place of an answer, with their log-probabilities."""
        fields = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "logprobs": top}
        answer = await self._upstream.post(_PATH, headers=self._headers, body=json.dumps(fields).encode())
        raw = b""
        while piece := await answer.read():
            raw += piece
        answer.close()
        assert answer.status == 200, raw
        return json.loads(raw)["choices"][0]["logprobs"]["top_logprobs"]


def some_prompt(numbers: random.Random, *, num_words: int = 12) -> str:
    """Words that no cache has seen."""
    return " ".join(f"{numbers.choice(('river', 'stone', 'paper', 'green'))}{numbers.randrange(1000)}" for _ in range(num_words))


def _read(raw: bytes) -> tuple[str, str, bool]:
    """Model and text of a stream's events, and whether it came to its end."""
    lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    is_whole = lines[-1:] == [b"[DONE]"]
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    choices = [event["choices"][0] for event in events if event.get("choices")]
    is_whole = is_whole and bool(choices) and choices[-1].get("finish_reason") == "length"
    models = {event.get("model") for event in events}
    return str(models.pop()) if len(models) == 1 else "", "".join(choice["text"] for choice in choices), is_whole
