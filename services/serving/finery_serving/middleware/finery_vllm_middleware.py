"""ASGI middleware that runs inside vLLM: what may be called, by whom, on which version, and under which name it answers.

Owns the list of open paths, the tokens, the set of admitted versions with their requests in flight, and the public name in what goes
out. Leaves loading to vLLM's own endpoints, the choice of a version to the agent, limits on fields to the gateway. It needs the standard
library only, since it lives in vLLM's environment.

The gateway's contract
----------------------
Send `POST` to one of INFERENCE_PATHS at the route's address (over a Unix socket the host means nothing), with

    x-finery-replica-token   the route's `replica_token`
    x-finery-version         the route's `version`
    x-finery-alias           the public name to write out: the model the caller asked for
    x-finery-needs           `tools` where the model is to be offered tools
    body `model`             the route's `version` too

Answers are vLLM's, with the alias wherever it says `model`, in JSON and in every chunk of a stream, and in the text of errors, which say
nothing of vLLM's inside. Beyond them:

    400                              tools are needed, and this vLLM was not started for them.
    409 with `x-finery-retired: 1`   the version is not admitted here (swapped out, evicted, or not loaded again after a restart), or this
                                     vLLM is to end, whatever the version. Nothing was started: resolve the model again and repeat the
                                     request, elsewhere where there is another replica.
    401                              the token is not this replica's, which also happens after its agent restarted: resolve again as well.
    404                              the path is not open.
    503                              vLLM's engine has ended and is started again; within a stream an error of code `stream_broken`.
    501                              the path is open, but not offered by a model of this kind (embeddings by one that generates).

A connection that cannot be made or that breaks before the first byte means that vLLM is restarting: resolve again, which waits for it.
Closing the connection aborts the generation.

The agent's contract (header `x-finery-admin-token`)
----------------------------------------------------
`GET /health`, `/metrics`, `/v1/models`, `POST /v1/load_lora_adapter`, `/v1/unload_lora_adapter` reach vLLM. Own endpoints:

    GET  /finery/state                  {"admitted": [...], "in_flight": {version: n}, "adapters": {version: {"id", "path"}},
                                         "requests": {version: {"count", "idle_s"}}}: how many came, and the seconds since the latest
    GET  /finery/held                   {"adapter_ids": [...]}: what the engine's caches have, registered or not
    POST /finery/admit   {"version"}    lets requests for it in; answers {"adapter": {"id", "path"}}, 400 where none is registered so
    POST /finery/retire  {"version"}    lets none in any more; answers {"in_flight"}: 0 means that vLLM is done with it
    POST /finery/drain                  lets none in any more for whatever version, until vLLM's end; answers {"in_flight"} of all
    POST /finery/remove  {"adapter_id"} drops an unloaded adapter from the engine's caches; answers {"removed"}

A version counts as in flight from before vLLM sees the request until the last byte went out or the client left.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

CONFIG_VARIABLE = "FINERY_MIDDLEWARE_CONFIG"
INFERENCE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
ADMIN_PATHS = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    }
)
_ERROR_LINE = re.compile(rb'data:\s*\{\s*"error"\s*:')
# vLLM's version and a digest of its configuration.
_FINGERPRINT = re.compile(rb'"system_fingerprint"\s*:\s*"[^"]*"')
# What Python's executors say in a process that is told to end.
_ENDING = b"after shutdown"
_MAX_MESSAGE = 1000
_PARAMETER = re.compile(r"[A-Za-z_][\w.\[\]]{0,63}")
_PARAMETER_NOTE = re.compile(r"\s*\(parameter=[^()]*\)$")
_NO_ROUTE = "Not Found"
# What an error's words must not have: names of software, files, addresses, options, variables, versions, modules and classes.
_INSIDE = re.compile(
    r"(?i:vllm|pydantic|torch|cuda|xgrammar|outlines|guidance|jinja|transformers|huggingface|traceback|validation error)"
    r"|\bFile \"|\.(?:py|pyx|cc|cpp|cu|so|h)\b"
    r"|(?<![\w.…])~?/\w[\w.-]*/|https?://|<path>|\b0x[0-9a-fA-F]{4,}|(?<!\w)--[a-z]|\b[A-Z]{2,}_[A-Z_]+\b"
    r"|\b\d+\.\d+\.\d+|\b[a-z_]+\.[a-z_]+\.[a-z_]+\b|<class |\bobject at\b"
    r"|\b[A-Z]\w*[a-z](?:Error|Exception|Request|Params|Config|Core|Engine|Parser|Tokenizer|Processor|Serving\w*)\b"
)

_NO_TOOLS = "This model is served without tools; leave tools out. The operator turns them on with FINERY_TOOL_CALL_PARSER."

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class FineryMiddleware:
    """Wraps vLLM's app. `config` has `replica_token`, `admin_token`, `base_model`, `tools` and `private_paths`; vLLM passes none, so that
    it is read from the JSON file which the variable FINERY_MIDDLEWARE_CONFIG names.
    """

    def __init__(self, app: App, config: dict[str, Any] | None = None) -> None:
        config = config or _configured()
        self._app = app
        self._replica_token = config["replica_token"].encode()
        self._admin_token = config["admin_token"].encode()
        self._private_paths = tuple(config["private_paths"])
        self._base_model = config["base_model"]
        self._has_tools = config["tools"]
        self._admitted = {self._base_model}
        self._is_draining = False
        self._in_flight: dict[str, int] = {}
        # Of each version: how many requests came, and when the latest did.
        self._requests: dict[str, tuple[int, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            # The only way to refuse a WebSocket before it is accepted.
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        method, path = scope["method"], scope["path"]
        if path in INFERENCE_PATHS and method == "POST":
            if not hmac.compare_digest(headers.get(b"x-finery-replica-token", b""), self._replica_token):
                await _refuse(send, 401, "The replica token is missing or wrong; resolve the model again.")
            else:
                await self._inference(headers, scope, receive, send)
        elif (method, path) in ADMIN_PATHS or path.startswith("/finery/"):
            if not hmac.compare_digest(headers.get(b"x-finery-admin-token", b""), self._admin_token):
                await _refuse(send, 401, "The admin token is missing or wrong.")
            elif path.startswith("/finery/"):
                await self._control(method, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        else:
            await _refuse(send, 404, f"{method} {path} is not served here.")

    async def _inference(self, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send) -> None:
        version = headers.get(b"x-finery-version", b"").decode("latin-1")
        alias = headers.get(b"x-finery-alias", b"").decode("latin-1")
        if not version or not alias:
            await _refuse(send, 400, "x-finery-version and x-finery-alias are wanted.")
            return
        if self._is_draining or version not in self._admitted:
            await _refuse(send, 409, "The version is not served here; resolve the model again.", headers=[(b"x-finery-retired", b"1")])
            return
        if headers.get(b"x-finery-needs") == b"tools" and not self._has_tools:
            await _refuse(send, 400, _NO_TOOLS, param="tools")
            return
        # No await between the checks above and this count: retiring and then seeing 0 means that nothing is or comes in.
        self._in_flight[version] = self._in_flight.get(version, 0) + 1
        self._requests[version] = (self._requests.get(version, (0, 0.0))[0] + 1, time.monotonic())
        renamed = _Renamed(send, version=version, alias=alias, private_paths=self._private_paths, is_dead=lambda: _is_dead(scope))
        try:
            await self._app(scope, receive, renamed)
        except Exception as error:
            # Its handler stands outside of this middleware and would answer with the words as they are.
            await renamed.fail(error)
            raise
        finally:
            self._in_flight[version] -= 1
            if not self._in_flight[version]:
                del self._in_flight[version]

    async def _control(self, method: str, scope: Scope, receive: Receive, send: Send) -> None:
        action = (method, scope["path"])
        try:
            body = json.loads(await _body(receive) or b"{}")
            if action == ("GET", "/finery/state"):
                answer = self._state(scope)
            elif action == ("GET", "/finery/held"):
                answer = {"adapter_ids": sorted(await scope["app"].state.engine_client.list_loras())}
            elif action == ("POST", "/finery/admit"):
                answer = {"adapter": _registered(scope)[body["version"]]}
                self._admitted.add(body["version"])
            elif action == ("POST", "/finery/retire"):
                answer = {"in_flight": self._retire(body["version"])}
            elif action == ("POST", "/finery/drain"):
                self._is_draining = True
                answer = {"in_flight": sum(self._in_flight.values())}
            elif action == ("POST", "/finery/remove"):
                answer = {"removed": await scope["app"].state.engine_client.remove_lora(int(body["adapter_id"]))}
            else:
                await _refuse(send, 404, f"{method} {scope['path']} is not served here.")
                return
        except (KeyError, TypeError, ValueError) as error:
            await _refuse(send, 400, f"The body is not what this call takes: {error!r}.")
            return
        await _answer(send, 200, answer)

    def _state(self, scope: Scope) -> dict[str, Any]:
        now_s = time.monotonic()
        requests = {version: {"count": count, "idle_s": now_s - at_s} for version, (count, at_s) in self._requests.items()}
        return {"admitted": sorted(self._admitted), "in_flight": self._in_flight, "adapters": _registered(scope), "requests": requests}

    def _retire(self, version: str) -> int:
        if version == self._base_model:
            raise ValueError("the base model cannot be retired")
        self._admitted.discard(version)
        in_flight = self._in_flight.get(version, 0)
        if not in_flight:
            self._requests.pop(version, None)
        return in_flight


def _registered(scope: Scope) -> dict[str, dict[str, Any]]:
    """The adapters that vLLM knows."""
    registered = scope["app"].state.openai_serving_models.lora_requests
    return {name: {"id": item.lora_int_id, "path": item.lora_path} for name, item in registered.items()}


class _Renamed:
    """A `send` that writes the alias where vLLM writes the version, whole bodies and streams alike."""

    def __init__(self, send: Send, *, version: str, alias: str, private_paths: tuple[str, ...], is_dead: Callable[[], bool]) -> None:
        self._send = send
        self._version = version
        self._alias = alias
        self._private_paths = private_paths
        self._is_dead = is_dead
        # In a JSON string the quotes would be escaped, so this is found where `model` is a key and never in generated text.
        self._pattern = re.compile(rb'"model"\s*:\s*"' + re.escape(version.encode()) + rb'"')
        self._replacement = b'"model":' + json.dumps(alias).encode()
        self._start: Message | None = None
        self._streams = False
        self._held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._streams = content_type.startswith(b"text/event-stream") and message["status"] < 400
            self._start = message
            if self._streams:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            await self._stream(message)
        else:
            await self._whole(message)

    async def fail(self, error: Exception) -> None:
        """Answers a fault that vLLM itself has not answered, unless an answer has begun."""
        if self._streams:
            return
        self._held = b""
        body = json.dumps({"error": {"message": str(error), "code": 500}}).encode()
        with contextlib.suppress(Exception):
            await self({"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"application/json")]})
            await self({"type": "http.response.body", "body": body})

    async def _stream(self, message: Message) -> None:
        """Passes on complete lines only: a name may lie across two messages, never across two lines."""
        held = self._held + message.get("body", b"")
        more = message.get("more_body", False)
        end = held.rfind(b"\n") + 1 if more else len(held)
        self._held = held[end:]
        if end or not more:
            await self._send({"type": "http.response.body", "body": self._lines(held[:end]), "more_body": more})

    def _lines(self, lines: bytes) -> bytes:
        if _ERROR_LINE.search(lines):
            lines = b"\n".join(self._error_line(line) if _ERROR_LINE.match(line) else line for line in lines.split(b"\n"))
        return self._public(lines)

    def _public(self, data: bytes) -> bytes:
        if b'"system_fingerprint"' in data:
            data = _FINGERPRINT.sub(b'"system_fingerprint":null', data)
        return self._pattern.sub(lambda _: self._replacement, data)

    def _error_line(self, line: bytes) -> bytes:
        return b"data: " + self._public_error(line.partition(b":")[2], status=500)[1]

    async def _whole(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None, "a body without its start"
        status = int(self._start["status"])
        body = self._held
        if status >= 400:
            status, body = self._public_error(body, status=status)
        else:
            body = self._public(body)
        headers = [(key, value) for key, value in self._start["headers"] if key.lower() != b"content-length"]
        await self._send({**self._start, "status": status, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _public_error(self, body: bytes, *, status: int) -> tuple[int, bytes]:
        """vLLM's error without names and paths of the inside; of its own faults only that there was one, and whether it ended by it."""
        if status >= 500 and (self._is_dead() or _ENDING in body):
            message = "The model is being restarted and gives this answer no end; send the request again."
            return 503, _error_body(message, code="stream_broken" if self._streams else 503, param=None)
        try:
            data = json.loads(body)
            # vLLM has no words of its own for a path that it has not.
            error = dict(data["error"]) if "error" in data else {"message": data["detail"]}
            code = int(error.get("code") or status)
            message, param = str(error["message"]), error.get("param")
        except (ValueError, KeyError, TypeError):
            code, message, param = status, "", None
        if code == 404 and message == _NO_ROUTE:
            # The path is on our list, so vLLM has no such route for a model of this kind.
            code, message = 501, "This model does not offer this kind of request; ask another model, or another path."
        param = param.removeprefix("body.") if isinstance(param, str) and _PARAMETER.fullmatch(param) else None
        message = self._public_words(message, code=code, param=param)
        return (501 if code == 501 else status), _error_body(message, code=code, param=param)

    def _public_words(self, message: str, *, code: int, param: str | None) -> str:
        if (code >= 500 and code != 501) or not message:
            return "The model could not answer this request. Repeat it; if it fails again, the operator finds the cause in vLLM's log."
        for path in self._private_paths:
            message = message.replace(path, "…")
        message = _PARAMETER_NOTE.sub("", message.strip())
        # The alias may look like anything, so it is put in once the rest is judged.
        if len(message) > _MAX_MESSAGE or _INSIDE.search(message.replace(self._version, "")):
            return f"The model refused the request because of {param or 'one of its fields'}; change it and send it again."
        return message.replace(self._version, self._alias)


def _is_dead(scope: Scope) -> bool:
    """Whether vLLM's engine has ended, so that nothing but a restart helps."""
    state = getattr(scope.get("app"), "state", None)
    return bool(getattr(getattr(state, "engine_client", None), "errored", False))


def _configured() -> dict[str, Any]:
    return json.loads(Path(os.environ[CONFIG_VARIABLE]).read_text())


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def _answer(send: Send, status: int, payload: dict[str, Any], *, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps(payload).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


async def _refuse(
    send: Send, status: int, message: str, *, param: str | None = None, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    error = {"message": message, "type": "finery", "param": param, "code": status}
    await _answer(send, status, {"error": error}, headers=headers)


def _error_body(message: str, *, code: int | str, param: str | None) -> bytes:
    is_ours = isinstance(code, str) or code >= 500
    kind = "rate_limit_error" if code == 429 else "server_error" if is_ours else "invalid_request_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}, ensure_ascii=False).encode()
