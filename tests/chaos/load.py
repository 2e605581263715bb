"""Clients that ask without a pause, and what becomes of each request: one word of a few, so that a test can say which may occur."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import httpx
import openai
from e2e.system import System
from openai import OpenAI

NUM_TOKENS = 24


def say(client: OpenAI, model: str, *, max_tokens: int = 8) -> str:
    """A greedy answer: versions of random weights differ in it."""
    answer = client.chat.completions.create(model=model, messages=_MESSAGES, max_tokens=max_tokens, temperature=0)
    assert answer.model == model
    return answer.choices[0].message.content or ""


def outcome(client: OpenAI, model: str, *, streams: bool, on_begun: Callable[[], None] = lambda: None) -> str:
    """`answered`, the status of a refusal, the code of an error within a stream, `unreachable`, or `cut off` in the middle."""
    try:
        return _asked(client, model, streams=streams, on_begun=on_begun)
    except openai.APIStatusError as error:
        waits = error.status_code != 503 or error.response.headers.get("retry-after")
        return f"{error.status_code}" if waits else "503 without Retry-After"
    except openai.APIConnectionError:
        return "unreachable"
    except openai.APIError as error:
        return str(error.code)
    except httpx.TransportError:
        return "cut off"


class Load:
    """One client a thread, each asking one of `models`, by streams and without in turns. Ends with the block."""

    def __init__(self, system: System, models: Sequence[str], *, num_clients: int = 4) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = system.client().with_options(max_retries=0)
        self._answers = [0] * num_clients
        self._begun = threading.Event()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, models[number % len(models)]), daemon=True) for number in range(num_clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_answers(self, *, timeout_s: float) -> None:
        """Waits until every client has had one more whole answer."""
        wanted = [number + 1 for number in self._answers]
        deadline_s = time.monotonic() + timeout_s
        while any(got < want for got, want in zip(self._answers, wanted, strict=True)):
            assert time.monotonic() < deadline_s, f"not every client is answered again after {timeout_s:.0f} s: {self.outcomes}"
            time.sleep(0.1)

    def wait_begun(self, *, timeout_s: float) -> None:
        """Waits until a stream has brought its first piece, as it does that moment."""
        self._begun.clear()
        assert self._begun.wait(timeout_s), f"no answer begins after {timeout_s:.0f} s: {self.outcomes}"

    def wait_asked(self, *, timeout_s: float) -> None:
        """Waits until as many requests as there are clients have ended, one way or another."""
        wanted = self.outcomes.total() + len(self._threads)
        deadline_s = time.monotonic() + timeout_s
        while self.outcomes.total() < wanted:
            assert time.monotonic() < deadline_s, f"requests hang: {self.outcomes}"
            time.sleep(0.1)

    def _run(self, number: int, model: str) -> None:
        streams = number % 2 == 0
        while not self._stopping.is_set():
            word = outcome(self._client, model, streams=streams, on_begun=self._begun.set)
            self.outcomes[word] += 1
            if word == "answered":
                self._answers[number] += 1
            else:
                self._stopping.wait(0.5)
            streams = not streams


def _asked(client: OpenAI, model: str, *, streams: bool, on_begun: Callable[[], None]) -> str:
    fields = {"model": model, "messages": _MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"min_tokens": NUM_TOKENS}}
    if not streams:
        answer = client.chat.completions.create(**fields)
        return "answered" if (answer.model, answer.choices[0].finish_reason) == (model, "length") else "another's answer"
    chunks = []
    for chunk in client.chat.completions.create(stream=True, **fields):
        if not chunks:
            on_begun()
        chunks.append(chunk)
    if {chunk.model for chunk in chunks} != {model}:
        return "another's answer"
    return "answered" if chunks[-1].choices[0].finish_reason == "length" else "half an answer"


_MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]
