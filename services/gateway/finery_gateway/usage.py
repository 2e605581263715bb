"""Token counts read off an answer as it passes, without parsing its chunks.

vLLM is always asked for the usage at a stream's end. Who did not ask for it does not get that event.
"""

from __future__ import annotations

import re

# `/v1/responses` has other names for the same counts.
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})(?!\d)')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})(?!\d)')
# In a JSON string the quotes would be escaped, so neither is ever found in generated text.
_USAGE_EVENT = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_TAIL_BYTES = 4096
# Of vLLM's faults after the first byte.
_ERROR_EVENT = re.compile(rb'(?:^|\n)(?:data:\s*\{\s*"error"|event: error\n)')
_FAILED = b"event: response.failed\n"
# The events that end a response. Those before repeat the request, with whatever it has of counts.
_LAST_EVENTS = (b"event: response.completed\n", b"event: response.incomplete\n", _FAILED)


class Usage:
    """The counts of one answer; 0 until they were seen."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def read(self, data: bytes) -> None:
        """Takes the last counts in `data`: what a request says may be repeated before them, never behind."""
        for match in _PROMPT.finditer(data):
            self.prompt_tokens = int(match[1])
        for match in _COMPLETION.finditer(data):
            self.completion_tokens = int(match[1])


class StreamTap:
    """Passes server-sent events on, whole ones only, and takes the usage out of the one that carries it."""

    def __init__(self, *, hide_usage: bool) -> None:
        self.usage = Usage()
        self.has_failed = False
        """Whether an error ended the stream."""
        self._hide_usage = hide_usage
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What of the stream may go on now."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(b"\n\n"):
            end = chunk.rfind(b"\n\n") + 2
            if end == 1:
                self._held = chunk
                return b""
            self._held = chunk[end:]
            chunk = chunk[:end]
        if b"error" in chunk and _ERROR_EVENT.search(chunk):
            self.has_failed = True
        return self._counted(chunk) if b'"usage"' in chunk else chunk

    def end(self) -> bytes:
        """What is left when the stream is over."""
        held, self._held = self._held, b""
        return held

    def _counted(self, chunk: bytes) -> bytes:
        """Whole events, of which one may carry the usage, as they may go on."""
        kept: list[bytes] = []
        for event in chunk.split(b"\n\n")[:-1]:
            if _USAGE_EVENT.search(event):
                self.usage.read(event)
                if self._hide_usage:
                    continue
            kept.append(event + b"\n\n")
        return b"".join(kept)


class ResponsesTap(StreamTap):
    """The same for the events of `/v1/responses`: the last one carries the usage and always goes on."""

    def __init__(self) -> None:
        super().__init__(hide_usage=False)

    def _counted(self, chunk: bytes) -> bytes:
        for event in chunk.split(b"\n\n"):
            if event.startswith(_LAST_EVENTS):
                self.usage.read(event)
                self.has_failed |= event.startswith(_FAILED)
        return chunk


class BodyTap:
    """Passes a whole JSON body on and reads the usage at its end."""

    has_failed = False
    """A whole answer that failed has a status that says so."""

    def __init__(self) -> None:
        self.usage = Usage()
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """The chunk as it is."""
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]
        return chunk

    def end(self) -> bytes:
        """Nothing is held back."""
        self.usage.read(self._tail)
        return b""
