"""The middleware inside vLLM, against an app that answers what vLLM would."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from finery_serving.middleware.finery_vllm_middleware import FineryMiddleware

BASE, VERSION, ALIAS = "SmolLM2", "ftjob-1-20-0a1b2c3d", "ft:SmolLM2:demo::1"
CONFIG = {
    "replica_token": "r" * 8,
    "admin_token": "a" * 8,
    "base_model": BASE,
    "tools": False,
    "private_paths": ["/state/cache", "/run/finery-x"],
}


class App:
    """Answers every HTTP request with `status`, `content_type` and `parts`, and remembers that it was asked."""

    def __init__(self, *parts, status=200, content_type="application/json"):
        self.parts, self.status, self.content_type = parts, status, content_type
        self.paths = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, scope, receive, send):
        self.paths.append(scope.get("path"))
        headers = [(b"content-type", self.content_type.encode()), (b"content-length", b"7")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for number, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(self.parts) - 1})
        await self.may_end.wait()


class Engine:
    """vLLM's engine client as far as the middleware uses it."""

    removed = ()
    errored = False

    async def remove_lora(self, adapter_id):
        self.removed = (*self.removed, adapter_id)
        return True

    async def list_loras(self):
        return {7, 3}


async def call(middleware, path="/v1/chat/completions", *, method="POST", headers=None, body=b"{}", engine=None, sent=None):
    if headers is None:
        headers = {"x-finery-replica-token": "r" * 8, "x-finery-version": VERSION, "x-finery-alias": ALIAS}
    loras = {VERSION: SimpleNamespace(lora_int_id=7, lora_path="/state/cache/x")}
    state = SimpleNamespace(engine_client=engine or Engine(), openai_serving_models=SimpleNamespace(lora_requests=loras))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        "app": SimpleNamespace(state=state),
    }
    sent = [] if sent is None else sent

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await middleware(scope, receive, send)
    answered = dict(sent[0]["headers"])
    bodies = [message["body"] for message in sent[1:]]
    return SimpleNamespace(status=sent[0]["status"], headers=answered, bodies=bodies, body=b"".join(bodies))


async def admin(middleware, method, path, body=None, *, engine=None):
    answer = await call(
        middleware, path, method=method, headers={"x-finery-admin-token": "a" * 8}, body=json.dumps(body or {}).encode(), engine=engine
    )
    return answer.status, json.loads(answer.body)


async def admitted(app):
    middleware = FineryMiddleware(app, CONFIG)
    await admin(middleware, "POST", "/finery/admit", {"version": VERSION})
    return middleware


async def test_a_json_answer_names_the_alias_and_has_its_new_length():
    text = f'he said \\"model\\":\\"{VERSION}\\"'
    app = App(b'{"id":"chatcmpl-1","model":"%s","choices":[{"text":"%s"}]}' % (VERSION.encode(), text.encode()))
    answer = await call(await admitted(app))
    assert json.loads(answer.body) == {"id": "chatcmpl-1", "model": ALIAS, "choices": [{"text": f'he said "model":"{VERSION}"'}]}
    assert int(answer.headers[b"content-length"]) == len(answer.body)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
async def test_a_stream_names_the_alias_however_its_chunks_are_split(size):
    chunk = {"id": "chatcmpl-1", "model": VERSION, "choices": [{"delta": {"content": "naïve \n ☃"}}]}
    stream = b"".join(
        b"data: " + json.dumps(chunk, ensure_ascii=False, separators=style).encode() + b"\n\n" for style in [(",", ":"), None] * 3
    )
    stream += b"data: [DONE]\n\n"
    parts = [stream[start : start + size] for start in range(0, len(stream), size)]
    answer = await call(await admitted(App(*parts, b"", content_type="text/event-stream; charset=utf-8")))
    assert VERSION.encode() not in answer.body
    events = answer.body.decode().split("\n\n")
    assert [json.loads(event.removeprefix("data: ")) for event in events[:6]] == [{**chunk, "model": ALIAS}] * 6
    assert events[6:] == ["data: [DONE]", ""]


async def test_a_whole_event_goes_out_at_once():
    first = b'data: {"model":"%s","choices":[]}\n\n' % VERSION.encode()
    answer = await call(await admitted(App(first, b"data: [DONE]\n\n", b"", content_type="text/event-stream")))
    assert answer.bodies[0] == b'data: {"model":"%s","choices":[]}\n\n' % ALIAS.encode()


async def test_a_stream_without_a_last_newline_keeps_its_end():
    answer = await call(await admitted(App(b'data: {"model":"%s"}' % VERSION.encode(), b"", content_type="text/event-stream")))
    assert answer.body == b'data: {"model":"%s"}' % ALIAS.encode()


@pytest.mark.parametrize(
    ("status", "message", "shown"),
    [
        (400, f"max_tokens is too large for {VERSION}", f"max_tokens is too large for {ALIAS}"),
        (400, "cannot read /state/cache/x", "cannot read …/x"),
        (404, f"The model `{VERSION}` does not exist.", f"The model `{ALIAS}` does not exist."),
        (500, "EngineCore died in /venv/lib/vllm/engine.py", "The model could not answer this request"),
    ],
)
async def test_an_error_tells_nothing_of_the_inside(status, message, shown):
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": "max_tokens", "code": status}}).encode()
    answer = await call(await admitted(App(body, status=status)))
    error = json.loads(answer.body)["error"]
    assert answer.status == status
    assert (error["message"][: len(shown)], error["param"], error["code"]) == (shown, "max_tokens", status)
    assert VERSION.encode() not in answer.body


@pytest.mark.parametrize(("streamed", "code"), [(False, 503), (True, "stream_broken")])
@pytest.mark.parametrize(
    ("errored", "words"), [(True, "EngineCore encountered an issue"), (False, "cannot schedule new futures after shutdown")]
)
async def test_what_an_engine_that_has_ended_leaves_unanswered_is_no_fault_of_the_request(streamed, code, errored, words):
    engine = Engine()
    engine.errored = errored
    body = json.dumps({"error": {"message": words, "code": 500}}).encode()
    app = App(b"data: " + body + b"\n\n", b"", content_type="text/event-stream") if streamed else App(body, status=500)
    answer = await call(await admitted(app), engine=engine)
    assert answer.status == (200 if streamed else 503)
    error = json.loads(answer.body.removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == (code, "server_error")
    assert "send the request again" in error["message"]


HOSTILE = [
    "1 validation error for ChatCompletionRequest\nmessages.0 Field required [type=missing] see https://errors.pydantic.dev/2.13/v/missing",
    '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
    "Set VLLM_ENABLE_RESPONSES_API_STORE=1 when launching",
    "vLLM 0.32.0 does not support this",
    "Failed to compile: json_schema_converter.cc:123: unsupported",
    'File "x", line 3, in generate',
    "no file ~/models/x nor /mnt/disk/model",
    "<class 'foo'> object at 0x7f00deadbeef",
    "module a.b.c raised RuntimeError",
    "EngineCore encountered an issue",
    "x" * 5000,
]


@pytest.mark.parametrize("message", HOSTILE)
@pytest.mark.parametrize("streamed", [False, True])
async def test_words_of_the_inside_are_replaced_whole(message, streamed):
    error = {"message": message, "type": "vllm.exceptions.VLLMValidationError", "param": "body.tools", "code": 400, "trace": "/venv/x.py"}
    body = json.dumps({"error": error}).encode()
    if streamed:
        answer = await call(await admitted(App(b"data: " + body + b"\n\n", b"", content_type="text/event-stream")))
        shown = json.loads(answer.body.removeprefix(b"data: "))["error"]
    else:
        answer = await call(await admitted(App(body, status=400)))
        shown = json.loads(answer.body)["error"]
    assert shown == {
        "message": "The model refused the request because of tools; change it and send it again.",
        "type": "invalid_request_error",
        "param": "tools",
        "code": 400,
    }


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 5000 output tokens. Please reduce the length.",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "The engine prompt length 600 exceeds the max_model_len 512. Please reduce prompt.",
        "top_p must be in (0, 1], got 1.5.",
    ],
)
async def test_words_for_the_caller_are_kept(message):
    body = json.dumps(
        {"error": {"message": message + " (parameter=top_p, value=1.5)", "param": "function-wrap[x]()", "code": 400}}
    ).encode()
    answer = await call(await admitted(App(body, status=400)))
    assert json.loads(answer.body)["error"] == {"message": message, "type": "invalid_request_error", "param": None, "code": 400}


@pytest.mark.parametrize("body", [b'{"detail":"Not Found"}', b'{"error":{"message":"Not Found","type":"Not Found","code":404}}'])
async def test_a_kind_of_request_that_the_model_has_not_is_501(body):
    answer = await call(await admitted(App(body, status=404)), "/v1/embeddings")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (501, 501)


async def test_the_fingerprint_with_vllms_version_is_taken_out():
    body = b'{"model":"m","system_fingerprint":"vllm-0.32.0-tp2-0123abcd","choices":[{"text":"\\"system_fingerprint\\":\\"x\\""}]}'
    assert json.loads((await call(await admitted(App(body)))).body)["system_fingerprint"] is None
    answer = await call(await admitted(App(b"data: " + body + b"\n\n", b"", content_type="text/event-stream")))
    assert b"vllm" not in answer.body
    assert json.loads(answer.body.removeprefix(b"data: "))["choices"] == [{"text": '"system_fingerprint":"x"'}]


async def test_events_of_responses_name_the_alias_inside_their_objects():
    event = {"response": {"id": "resp_1", "model": VERSION, "output": []}, "sequence_number": 0, "type": "response.created"}
    stream = b"event: response.created\ndata: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    answer = await call(await admitted(App(stream, b"", content_type="text/event-stream")), "/v1/responses")
    assert json.loads(answer.body.partition(b"data: ")[2])["response"]["model"] == ALIAS
    assert VERSION.encode() not in answer.body


@pytest.mark.parametrize(("tools", "status"), [(False, 400), (True, 200)])
async def test_tools_are_refused_before_vllm_sees_them_unless_it_was_started_for_them(tools, status):
    app = App(b"{}")
    headers = {"x-finery-replica-token": "r" * 8, "x-finery-version": BASE, "x-finery-alias": BASE, "x-finery-needs": "tools"}
    answer = await call(FineryMiddleware(app, {**CONFIG, "tools": tools}), headers=headers)
    assert (answer.status, len(app.paths)) == (status, int(tools))
    if not tools:
        error = json.loads(answer.body)["error"]
        assert (error["param"], "FINERY_TOOL_CALL_PARSER" in error["message"]) == ("tools", True)


async def test_a_plain_text_fault_becomes_an_error_without_its_text():
    answer = await call(await admitted(App(b"Internal Server Error at /venv", status=500, content_type="text/plain")))
    assert json.loads(answer.body)["error"]["code"] == 500
    assert b"/venv" not in answer.body


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("cannot schedule new futures after shutdown"), 503), (ValueError("/state/cache/x is gone"), 500)]
)
async def test_a_fault_that_vllm_raises_is_answered_here_and_raised_on(error, status):
    async def broken(scope, receive, send):
        raise error

    middleware, sent = await admitted(broken), []
    with pytest.raises(type(error)):
        await call(middleware, sent=sent)
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["error"]["code"] == status
    assert b"shutdown" not in sent[1]["body"]
    assert b"/state" not in sent[1]["body"]


async def test_an_error_within_a_stream_tells_nothing_of_the_inside():
    error = b'data: {"error":{"message":"worker %s at /state/cache/x failed","code":500}}\n\n' % VERSION.encode()
    answer = await call(await admitted(App(b'data: {"model":"m"}\n\n', error, b"data: [DONE]\n\n", b"", content_type="text/event-stream")))
    assert VERSION.encode() not in answer.body
    assert b"/state" not in answer.body
    assert [line[:14] for line in answer.body.split(b"\n\n")] == [b'data: {"model"', b'data: {"error"', b"data: [DONE]", b""]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/adapters"),
        ("POST", "/invocations"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("POST", "/pooling"),
        ("POST", "/tokenize"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "//v1/chat/completions"),
        ("GET", "/docs"),
        ("OPTIONS", "/v1/completions"),
    ],
)
async def test_what_is_not_on_the_list_is_not_there_whatever_the_tokens(method, path):
    app = App(b"{}")
    tokens = {"x-finery-replica-token": "r" * 8, "x-finery-admin-token": "a" * 8, "x-finery-version": BASE, "x-finery-alias": BASE}
    assert (await call(FineryMiddleware(app, CONFIG), path, method=method, headers=tokens)).status == 404
    assert app.paths == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("GET", "/finery/state"),
        ("GET", "/finery/held"),
        ("POST", "/finery/remove"),
        ("POST", "/finery/drain"),
    ],
)
async def test_the_agents_paths_need_the_admin_token(method, path):
    app = App(b"{}")
    middleware = FineryMiddleware(app, CONFIG)
    replica_only = {"x-finery-replica-token": "r" * 8, "x-finery-admin-token": "r" * 8}
    assert (await call(middleware, path, method=method, headers=replica_only)).status == 401
    assert app.paths == []
    assert (await call(middleware, path, method=method, headers={"x-finery-admin-token": "a" * 8}, body=b'{"adapter_id":1}')).status == 200


@pytest.mark.parametrize("token", [{}, {"x-finery-replica-token": "x"}, {"x-finery-replica-token": "a" * 8}])
async def test_inference_needs_the_replica_token(token):
    app = App(b"{}")
    answer = await call(FineryMiddleware(app, CONFIG), headers={**token, "x-finery-version": BASE, "x-finery-alias": BASE})
    assert (answer.status, app.paths) == (401, [])


async def test_the_base_model_is_always_admitted_and_never_retired():
    app = App(b'{"model":"SmolLM2"}')
    middleware = FineryMiddleware(app, CONFIG)
    assert (await admin(middleware, "POST", "/finery/retire", {"version": BASE}))[0] == 400
    headers = {"x-finery-replica-token": "r" * 8, "x-finery-version": BASE, "x-finery-alias": BASE}
    assert (await call(middleware, headers=headers)).body == b'{"model":"SmolLM2"}'


async def test_a_version_that_is_not_admitted_is_refused_before_vllm_sees_it():
    app = App(b"{}")
    middleware = await admitted(app)
    await admin(middleware, "POST", "/finery/retire", {"version": VERSION})
    answer = await call(middleware)
    assert (answer.status, answer.headers[b"x-finery-retired"], app.paths) == (409, b"1", [])
    await admin(middleware, "POST", "/finery/admit", {"version": VERSION})
    assert (await call(middleware)).status == 200


async def test_a_request_is_in_flight_until_its_last_byte_and_survives_retirement():
    app = App(b"data: {}\n\n", b"", content_type="text/event-stream")
    middleware = await admitted(app)
    app.may_end.clear()
    running = asyncio.create_task(call(middleware))
    while not app.paths:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (await admin(middleware, "GET", "/finery/state"))[1]["in_flight"] == {VERSION: 1}
    assert (await admin(middleware, "POST", "/finery/retire", {"version": VERSION}))[1] == {"in_flight": 1}
    app.may_end.set()
    assert (await running).status == 200
    assert (await admin(middleware, "POST", "/finery/retire", {"version": VERSION}))[1] == {"in_flight": 0}


@pytest.mark.parametrize("model", [BASE, VERSION])
async def test_a_vllm_that_is_to_end_lets_no_request_in_and_finishes_those_it_has(model):
    app = App(b"data: {}\n\n", b"", content_type="text/event-stream")
    middleware = await admitted(app)
    # A vLLM that comes after it may have tools.
    headers = {"x-finery-replica-token": "r" * 8, "x-finery-version": model, "x-finery-alias": ALIAS, "x-finery-needs": "tools"}
    app.may_end.clear()
    running = asyncio.create_task(call(middleware))
    while not app.paths:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await admin(middleware, "POST", "/finery/drain") == (200, {"in_flight": 1})
    answer = await call(middleware, headers=headers)
    assert (answer.status, answer.headers[b"x-finery-retired"], len(app.paths)) == (409, b"1", 1)
    # A load that was under way.
    await admin(middleware, "POST", "/finery/admit", {"version": VERSION})
    assert (await call(middleware)).status == 409
    app.may_end.set()
    assert (await running).status == 200
    assert (await admin(middleware, "GET", "/finery/state"))[1]["in_flight"] == {}


async def test_a_request_whose_client_left_is_not_in_flight():
    async def broken(scope, receive, send):
        raise OSError("gone")

    middleware = await admitted(broken)
    with pytest.raises(OSError, match="gone"):
        await call(middleware)
    assert (await admin(middleware, "GET", "/finery/state"))[1]["in_flight"] == {}


async def test_the_state_shows_vllms_numbers_held_the_engines_and_remove_frees_one():
    middleware, engine = await admitted(App(b"{}")), Engine()
    state = (await admin(middleware, "GET", "/finery/state"))[1]
    adapters = {VERSION: {"id": 7, "path": "/state/cache/x"}}
    assert state == {"admitted": sorted([BASE, VERSION]), "in_flight": {}, "adapters": adapters, "requests": {}}
    assert await admin(middleware, "GET", "/finery/held", engine=engine) == (200, {"adapter_ids": [3, 7]})
    assert await admin(middleware, "POST", "/finery/remove", {"adapter_id": 7}, engine=engine) == (200, {"removed": True})
    assert engine.removed == (7,)


async def test_admitting_says_what_vllm_has_under_the_name():
    middleware = FineryMiddleware(App(b"{}"), CONFIG)
    adapter = {"id": 7, "path": "/state/cache/x"}
    assert await admin(middleware, "POST", "/finery/admit", {"version": VERSION}) == (200, {"adapter": adapter})
    assert (await admin(middleware, "POST", "/finery/admit", {"version": "unknown"}))[0] == 400
    assert (await admin(middleware, "GET", "/finery/state"))[1]["admitted"] == sorted([BASE, VERSION])


@pytest.mark.parametrize("body", [{}, {"version": ["x"]}, []])
async def test_a_malformed_control_call_is_refused(body):
    status, answer = await admin(FineryMiddleware(App(b"{}"), CONFIG), "POST", "/finery/admit", body)
    assert status == 400, answer


async def test_a_websocket_is_closed_and_lifespan_passes():
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    middleware = FineryMiddleware(app, CONFIG)
    await middleware({"type": "lifespan"}, receive, send)
    await middleware({"type": "websocket", "path": "/v1/realtime"}, receive, send)
    assert seen == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]
