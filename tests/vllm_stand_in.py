"""vLLM with our middleware as the gateway sees it: an ASGI application that answers by rule, and fails on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field

BASE = "SmolLM2-135M-Instruct"
REPLICA_TOKEN = "replica-token"


@dataclass
class FakeVllm:
    """What vLLM with the middleware looks like from outside."""

    admitted: set[str] = field(default_factory=lambda: {BASE})
    requests: list[tuple[dict[str, str], dict[str, object]]] = field(default_factory=list)
    error: tuple[int, dict[str, object]] | None = None
    endless: bool = False
    break_off: bool = False
    break_off_first: bool = False
    """As `break_off`, before the first token."""
    has_ended: bool = False
    """Its engine, not its server: it answers as our middleware does then."""
    embeds: bool = False
    paths: list[str] = field(default_factory=list)
    on_request: Callable[[str], None] | None = None
    """Called with the version of each request before it is looked at."""
    go_on: asyncio.Event | None = None
    """Where set, a stream says its version in each chunk, and waits for this before the second."""
    floods: bool = False
    """It generates as fast as it is read, without end."""
    silent: bool = False
    """It takes the request, and then nothing comes."""
    busy: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope, receive, send) -> None:
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        fields = json.loads(body)
        self.requests.append((headers, fields))
        self.paths.append(scope["path"])
        if self.on_request is not None:
            self.on_request(fields["model"])
        if headers.get("x-finery-replica-token") != REPLICA_TOKEN:
            await self._json(send, 401, {"error": {"message": "token"}})
        elif headers["x-finery-version"] not in self.admitted:
            await self._json(send, 409, {"error": {"message": "retired"}}, retired=True)
        elif self.silent:
            self.busy.set()
            await self._until_the_client_leaves(receive)
        elif self.has_ended and not fields.get("stream"):
            await self._json(send, 503, {"error": {"message": "The model is being restarted.", "code": 503}})
        elif self.error is not None:
            await self._json(send, self.error[0], self.error[1])
        elif scope["path"] == "/v1/responses":
            await self._responses(send, fields, alias=headers["x-finery-alias"])
        elif scope["path"] == "/v1/embeddings":
            await self._embeddings(send, fields, alias=headers["x-finery-alias"])
        elif fields.get("stream"):
            await self._stream(
                receive,
                send,
                alias=headers["x-finery-alias"],
                version=headers["x-finery-version"],
                include_usage=bool(fields.get("stream_options")),
            )
        else:
            message = {"role": "assistant", "content": "Paris"}
            choice = {"index": 0, "message": message, "text": "Paris", "finish_reason": "stop"}
            usage = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3}
            await self._json(
                send,
                200,
                {
                    "id": "c1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": headers["x-finery-alias"],
                    "choices": [choice],
                    "usage": usage,
                },
            )

    async def _embeddings(self, send, fields, *, alias) -> None:
        if not self.embeds:
            await self._json(send, 501, {"error": {"message": "This model does not offer this.", "param": None, "code": 501}})
            return
        vectors = [{"object": "embedding", "index": index, "embedding": [0.5, -1.0]} for index, _ in enumerate(fields["input"])]
        usage = {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}
        await self._json(send, 200, {"id": "e1", "object": "list", "created": 1, "model": alias, "data": vectors, "usage": usage})

    async def _responses(self, send, fields, *, alias) -> None:
        text = {"type": "output_text", "text": "Paris", "annotations": [], "logprobs": None}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
        response = {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": alias,
            "output": [message],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [{"type": "function", "name": "f", "parameters": {"input_tokens": 99}}],
            "status": "completed",
            "usage": {
                "input_tokens": 7,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": 3,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 10,
            },
        }
        if not fields.get("stream"):
            await self._json(send, 200, response)
            return
        begun = {**response, "output": [], "status": "in_progress", "usage": None}
        delta = {"content_index": 0, "output_index": 0, "item_id": "msg_1", "logprobs": [], "delta": "Paris"}
        events = [
            {"type": "response.created", "response": begun},
            {"type": "response.output_text.delta", **delta},
            {"type": "response.completed", "response": response},
        ]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number, event in enumerate(events):
            body = f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n".encode()
            # Cut in the middle, as a network may.
            for part in (body[:90], body[90:]):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _until_the_client_leaves(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.aborted.set()

    async def _json(self, send, status, body, *, retired=False) -> None:
        extra = [(b"x-finery-retired", b"1")] if retired else []
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), *extra]})
        await send({"type": "http.response.body", "body": json.dumps(body, separators=(",", ":")).encode()})

    async def _stream(self, receive, send, *, alias, version, include_usage) -> None:
        async def event(data) -> None:
            text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": alias}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        if self.has_ended:
            error = {"message": "The model is being restarted.", "type": "server_error", "param": None, "code": "stream_broken"}
            await event({"error": error})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if self.break_off_first:
            raise ConnectionResetError("vLLM dies here")
        for number, word in enumerate(("Par", "is")):
            if self.go_on is not None:
                word = version
                if number:
                    await self.go_on.wait()
            await event({**head, "choices": [{"index": 0, "delta": {"content": word}, "text": word, "finish_reason": None}]})
        if self.break_off:
            raise ConnectionResetError("vLLM dies here")
        if self.floods:
            leaving = asyncio.create_task(self._until_the_client_leaves(receive))
            while not leaving.done():
                await event({**head, "choices": [{"index": 0, "delta": {"content": "x" * 65536}, "finish_reason": None}]})
                await asyncio.sleep(0)
            return
        if self.endless:
            await self._until_the_client_leaves(receive)
            return
        if include_usage:
            await event({**head, "choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2}})
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
