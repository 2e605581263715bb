"""OpenAI's surface for tokens, by the official client: every field is passed on within bounds or refused with its reason."""

import asyncio
import contextlib
import json
import re

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types import CreateEmbeddingResponse
from prometheus_client import REGISTRY

from finery_gateway.http_server import MAX_HEAD_BYTES, HttpServer, listen
from finery_gateway.json_bounds import check_schema
from finery_gateway.usage import ResponsesTap, StreamTap

BASE = "SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "The capital of France?"}]
CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings"
LEAST = {
    CHAT: {"messages": MESSAGES},
    RESPONSES: {"input": "x"},
    COMPLETIONS: {"prompt": "x"},
    EMBEDDINGS: {"input": "x"},
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}


def _nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"properties": schema}
    return schema


def _format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


REFUSED = [
    # What OpenAI has and no model here can do: path, fields, the field that the error names, a word of what is wanted.
    (CHAT, {"audio": {"voice": "x", "format": "wav"}}, "audio", "text"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "text"),
    (CHAT, {"store": True}, "store", "False"),
    (CHAT, {"metadata": {"a": "b"}}, "metadata", "not stored"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction", "leave it out"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "leave it out"),
    (CHAT, {"verbosity": "low"}, "verbosity", "message"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "web"),
    (CHAT, {"service_tier": "priority"}, "service_tier", "auto"),
    (CHAT, {"functions": [FUNCTION]}, "functions", "tools"),
    (CHAT, {"function_call": "auto"}, "function_call", "tools"),
    (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "False"),
    (COMPLETIONS, {"best_of": 2}, "best_of", "n"),
    (COMPLETIONS, {"suffix": "x"}, "suffix", "leave it out"),
    (RESPONSES, {"store": True}, "store", "False"),
    (RESPONSES, {"background": True}, "background", "stream"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
    (RESPONSES, {"conversation": "conv_1"}, "conversation", "whole conversation"),
    (RESPONSES, {"prompt": {"id": "p"}}, "prompt", "whole conversation"),
    (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning", "leave it out"),
    (RESPONSES, {"max_tool_calls": 3}, "max_tool_calls", "built-in"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    (RESPONSES, {"tools": [{"type": "mcp", "server_url": "http://169.254.169.254"}]}, "tools.0.type", "function"),
    (RESPONSES, {"include": ["file_search_call.results"]}, "include.0", "message.output_text.logprobs"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]}, "input", "text"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "function_call_output"),
    # vLLM's own, unsafe behind a shared door.
    (RESPONSES, {"previous_input_messages": []}, "previous_input_messages", "unknown"),
    (RESPONSES, {"enable_response_messages": True}, "enable_response_messages", "unknown"),
    (RESPONSES, {"request_id": "resp_of_another"}, "request_id", "unknown"),
    (RESPONSES, {"vllm_xargs": {}}, "vllm_xargs", "unknown"),
    (RESPONSES, {"cache_salt": "x"}, "cache_salt", "unknown"),
    (CHAT, {"priority": -1}, "priority", "unknown"),
    (CHAT, {"session_id": "x"}, "session_id", "unknown"),
    (CHAT, {"stop_token_ids": [1]}, "stop_token_ids", "unknown"),
    (EMBEDDINGS, {"truncate_prompt_tokens": 1}, "truncate_prompt_tokens", "unknown"),
    (EMBEDDINGS, {"messages": MESSAGES}, "messages", "unknown"),
    # Bounds.
    (CHAT, {"n": 9}, "n", "8"),
    (CHAT, {"max_completion_tokens": 2_000_000}, "max_completion_tokens", "1048576"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"stop": "x" * 257}, "stop", "256"),
    (CHAT, {"tools": [TOOL] * 65}, "tools", "64"),
    (CHAT, {"tools": []}, "tools", "1"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": _nested(40)}}]}, "tools.0.function", "32 levels"),
    (CHAT, {"response_format": _format(_nested(40))}, "response_format.json_schema", "32 levels"),
    (
        CHAT,
        {"response_format": _format({"anyOf": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]})},
        "response_format",
        "32 levels",
    ),
    (CHAT, {"response_format": _format({"maxItems": 10**9})}, "response_format.json_schema", "maxItems"),
    (CHAT, {"response_format": _format({"$ref": "http://169.254.169.254/x"})}, "response_format.json_schema", "$ref"),
    (
        CHAT,
        {"response_format": _format({"pattern": "a{1,1000000}"})},
        "response_format.json_schema: pattern",
        "got the repetition {1,1000000}",
    ),
    (RESPONSES, {"tools": [FLAT_TOOL | {"parameters": {"pattern": "(" * 40 + ")" * 40}}]}, "tools.0: pattern", "32 levels"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "go together"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": _nested(40)}}}, "text.format", "32 levels"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
    (RESPONSES, {"metadata": {str(number): "x" for number in range(17)}}, "metadata", "16"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens", "1"),
    (EMBEDDINGS, {"input": ["x"] * 257}, "input", "256"),
    (EMBEDDINGS, {"input": ""}, "input", "1"),
    (EMBEDDINGS, {"encoding_format": "binary"}, "encoding_format", "base64"),
    (EMBEDDINGS, {"dimensions": 0}, "dimensions", "1"),
    # Fields that contradict each other.
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "one of them"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "tools"),
    (CHAT, {"parallel_tool_calls": False}, "parallel_tool_calls", "tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "f"),
    (RESPONSES, {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "f"),
    (RESPONSES, {"top_logprobs": 2}, "top_logprobs", "include"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id", "missing"),
]


@pytest.fixture
async def plain(world):
    async with httpx.AsyncClient(base_url=world.url, headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        yield plain


async def test_what_is_not_offered_is_refused_by_name_with_what_is_wanted_and_never_reaches_vllm(plain, world):
    for path, fields, name, wanted in REFUSED:
        answer = await plain.post(path, json={"model": BASE} | LEAST[path] | fields)
        assert answer.status_code == 400, fields
        message = answer.json()["error"]["message"]
        assert name in message, (fields, message)
        assert wanted in message, (fields, message)
    assert world.vllm.requests == []


@pytest.mark.parametrize(
    ("pattern", "got"),
    [
        ("x" * 2049, "2049 characters"),
        ("(a{1000}){1000}", "1000000 characters"),
        ("a{50}{50}", "2500 characters"),
        ("a{50}+{50}", "2500 characters"),
        ("(?:[a-z]{2}|\\d{,1000}|(b{1000})+){2}", "4010 characters"),
        ("[](a{1000}){1000}]", "1000002 characters"),
        ("a{1025,}", "repetition {1025,}"),
        ("(" * 40, "32 levels"),
    ],
)
def test_a_pattern_costs_what_it_repeats_written_out(pattern, got):
    for name, schema in (("pattern", {"pattern": pattern}), ("patternProperties", {"patternProperties": {pattern: {}}})):
        with pytest.raises(ValueError, match=rf"{name}: got .*{re.escape(got)}.*wanted"):
            check_schema({"properties": {"a": schema}}, limit_bytes=10_000)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[A-Za-z0-9._%+-]{1,64}@[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63}){1,4}$",
        r"^\d{4}-\d{2}-\d{2}T[0-9:]{8}(?:\.\d{1,9})?Z?$",
        r"^.{0,1000}$",
        r"\(a{3}\){3}[^()\]{9999}]*",
        "",
    ],
)
def test_patterns_of_every_day_are_within_bounds(pattern):
    # A property may have that name too.
    check_schema({"pattern": pattern, "properties": {"pattern": {"type": "string"}, "patternProperties": {}}}, limit_bytes=10_000)


HOSTILE_BODIES = [
    b'{"model": "m", "messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    b'{"model": "SmolLM2-135M-Instruct", "messages": [{"role":"user","content":"x"}], "response_format": {"type": "json_schema", '
    b'"json_schema": {"name": "x", "schema": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}}}",
    b'{"model": "SmolLM2-135M-Instruct", "messages": [{"role":"user","content":"x"}], "temperature": NaN}',
    b'{"model": "SmolLM2-135M-Instruct", "messages": [{"role":"user","content":"x"}], "seed": 1' + b"0" * 6_000 + b"}",
    b'{"model": "SmolLM2-135M-Instruct", "messages": [{"role":"user","content":["x", 1, null, {"type": {}}]}]}',
    b'{"model": ["m"], "messages": "x"}',
    b'"model"',
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("body", HOSTILE_BODIES, ids=range(len(HOSTILE_BODIES)))
async def test_hostile_bodies_are_400_and_tell_nothing_of_the_inside(plain, world, body):
    for path in LEAST:
        answer = await plain.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        for word in ("pydantic", "Traceback", "finery_gateway", "/work", ".py", "TextPart", "tuple[", "function-"):
            assert word not in answer.text
    assert world.vllm.requests == []


@pytest.mark.parametrize("model", ["../../etc/passwd", "m\r\nx-finery-version: v", "ü", "\x00", "x" * 512, "http://169.254.169.254/"])
async def test_hostile_model_names_are_not_there(plain, world, model):
    answer = await plain.post(CHAT, json={"model": model, "messages": MESSAGES})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert world.vllm.requests == []


async def test_every_field_of_openais_that_is_offered_reaches_vllm(client, world):
    sampling = {"temperature": 0.5, "top_p": 0.9, "frequency_penalty": 1, "presence_penalty": -1, "seed": 7, "logit_bias": {"5": 1}}
    await client.chat.completions.create(
        model=BASE,
        messages=[{"role": "system", "content": [{"type": "text", "text": "x"}]}, *MESSAGES],
        **sampling,
        n=2,
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=3,
        stop=["a", "b"],
        response_format=_format({"type": "object", "default": None}),
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "f"}},
        parallel_tool_calls=False,
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        store=False,
        modalities=["text"],
        service_tier="auto",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True},
    )
    headers, body = world.vllm.requests[-1]
    assert headers["x-finery-needs"] == "tools"
    assert {name: body[name] for name in sampling} == sampling
    assert (body["n"], body["max_completion_tokens"], body["logprobs"], body["top_logprobs"]) == (2, 5, True, 3)
    assert body["response_format"] == _format({"type": "object", "default": None})
    assert (body["tools"], body["tool_choice"]["function"], body["parallel_tool_calls"]) == ([TOOL], {"name": "f"}, False)
    assert not body.keys() & {"user", "safety_identifier", "prompt_cache_key", "store", "modalities", "service_tier"}


async def test_only_a_request_that_lets_the_model_call_tools_needs_them(client, world):
    for choice, needs in (("none", False), ("auto", True)):
        await client.chat.completions.create(model=BASE, messages=MESSAGES, tools=[TOOL], tool_choice=choice)
        assert ("x-finery-needs" in world.vllm.requests[-1][0]) is needs


async def test_a_vllm_without_tools_is_a_clear_error(client, world):
    world.vllm.error = (400, {"error": {"message": "This model is served without tools.", "param": "tools", "code": 400}})
    with pytest.raises(openai.BadRequestError, match="without tools") as caught:
        await client.chat.completions.create(model=BASE, messages=MESSAGES, tools=[TOOL])
    assert caught.value.param == "tools"


async def test_an_answers_message_can_be_sent_back_as_it_came(client, world):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    nulls = dict.fromkeys(("content", "refusal", "annotations", "audio", "function_call", "reasoning"))
    answered = {"role": "assistant", "tool_calls": [call], **nulls}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "5"}
    await client.chat.completions.create(model=BASE, messages=[*MESSAGES, answered, result], tools=[TOOL])
    assert world.vllm.requests[-1][1]["messages"][1:] == [{"role": "assistant", "tool_calls": [call]}, result]


async def test_a_response_comes_whole_and_streamed_under_the_alias_and_is_counted(client, world):
    world.serving.flip(world.project, "my-model", "job-8-cafe")
    world.vllm.admitted.add("job-8-cafe")
    before = _tokens(world)
    whole = await client.responses.create(model="my-model", input="The capital of France?", instructions="Be short.")
    assert (whole.output_text, whole.model, whole.usage.input_tokens) == ("Paris", "my-model", 7)
    events = [event async for event in await client.responses.create(model="my-model", input="x", stream=True)]
    assert [event.type for event in events] == ["response.created", "response.output_text.delta", "response.completed"]
    assert events[-1].response.usage.output_tokens == 3
    assert {event.response.model for event in events if hasattr(event, "response")} == {"my-model"}
    assert [now - then for now, then in zip(_tokens(world), before, strict=True)] == [14, 6]
    for _, body in world.vllm.requests:
        assert body["store"] is False
        assert len(body["cache_salt"]) == 64
    assert set(world.vllm.paths) == {RESPONSES}


async def test_a_response_is_carried_on_by_its_own_items(client, world):
    first = await client.responses.create(model=BASE, input="x")
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}", "status": "completed"}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "5"}
    items = [{"role": "user", "content": "x"}, *first.output, call, result]
    await client.responses.create(model=BASE, input=items, tools=[FLAT_TOOL])
    sent = world.vllm.requests[-1][1]["input"]
    assert sent[0] == {"role": "user", "content": "x"}
    assert sent[1]["content"] == [{"type": "output_text", "text": "Paris", "annotations": []}]
    assert sent[2:] == [call, result]


async def test_stored_responses_are_nobodys(plain):
    assert (await plain.get(f"{RESPONSES}/resp_1")).status_code == 404
    assert (await plain.post(f"{RESPONSES}/resp_1/cancel")).status_code == 404


def test_the_counts_of_a_response_are_its_own_wherever_the_stream_is_cut():
    echoed = b'event: response.created\ndata: {"response":{"tools":[{"usage":{"output_tokens":99}}],"usage":null}}\n\n'
    last = b'event: response.completed\ndata: {"response":{"tools":[{"input_tokens":99}],"usage":{"input_tokens":5,"output_tokens":6}}}\n\n'
    body = echoed + last
    for cut in range(len(body) + 1):
        tap = ResponsesTap()
        assert tap.feed(body[:cut]) + tap.feed(body[cut:]) + tap.end() == body
        assert (tap.usage.prompt_tokens, tap.usage.completion_tokens, tap.has_failed) == (5, 6, False)
    tap = ResponsesTap()
    tap.feed(echoed)
    assert (tap.usage.prompt_tokens, tap.usage.completion_tokens) == (0, 0)


def test_a_number_that_is_no_count_is_none():
    tap = ResponsesTap()
    tap.feed(b'event: response.completed\ndata: {"usage":{"output_tokens":' + b"9" * 400 + b"}}\n\n")
    assert tap.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("tap", "event"),
    [
        (StreamTap(hide_usage=False), b'data: {"error":{"message":"the engine died","code":500}}\n\n'),
        (ResponsesTap(), b'event: response.failed\ndata: {"response":{"status":"failed","usage":{"output_tokens":1}}}\n\n'),
        (ResponsesTap(), b'event: error\ndata: {"type":"error","message":"x"}\n\n'),
    ],
)
def test_a_stream_that_ends_with_an_error_has_failed(tap, event):
    tap.feed(b'data: {"choices":[{"delta":{"content":"no \\"error\\" yet"}}]}\n\n')
    assert not tap.has_failed
    tap.feed(event)
    assert tap.has_failed


@pytest.mark.parametrize(
    "begun",
    [b"GET / HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: "],
    ids=["head", "trailer"],
)
async def test_headers_without_end_are_refused_before_they_fill_the_memory(begun):
    pytest.importorskip("httptools")
    listener = listen("127.0.0.1", 0)
    server = HttpServer(FastAPI())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(begun)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 16 * MAX_HEAD_BYTES and not reader.at_eof():
            writer.write(b"a" * 65536)
            await writer.drain()
            # The kernel may take all of it before the server has had its turn.
            await asyncio.sleep(0.01)
            sent += 65536
    with contextlib.suppress(ConnectionError):
        assert b"Transfer" in begun or b"400" in (await reader.read(64)).split(b"\r\n")[0]
    assert sent < 16 * MAX_HEAD_BYTES
    writer.close()
    server.should_exit = True
    await serving


async def test_embeddings_come_from_models_that_have_them(client, world):
    world.vllm.embeds = True
    before = _tokens(world)
    answer = await client.embeddings.create(model=BASE, input=["a", "b"], encoding_format="float")
    assert isinstance(answer, CreateEmbeddingResponse)
    assert ([item.embedding for item in answer.data], answer.model) == ([[0.5, -1.0]] * 2, BASE)
    assert [now - then for now, then in zip(_tokens(world), before, strict=True)] == [4, 0]
    assert world.vllm.requests[-1][1]["input"] == ["a", "b"]


async def test_embeddings_of_a_model_that_has_none_are_a_clear_error(client, world):
    with pytest.raises(openai.BadRequestError, match="does not offer") as caught:
        await client.embeddings.create(model=BASE, input="a")
    assert caught.value.code == "not_supported"
    assert len(world.vllm.requests) == 1


async def test_a_model_tells_its_lineage_and_nothing_of_the_inside(client, world):
    alias = world.serving.flip(world.project, "my-model", "ftjob-1-20-cafe0123", job_id="ftjob-1")
    alias.adapter.prefix = f"projects/{world.project}/adapters/ftjob-1-20/"
    alias.adapter.manifest_sha256, alias.adapter.kind = "b" * 64, "adapter"
    listed = {model.id: model async for model in client.models.list()}
    assert set(listed) == {BASE, "my-model"}
    shown = listed["my-model"]
    assert (shown.object, shown.owned_by, shown.created > 0) == ("model", world.project, True)
    extra = shown.model_extra
    assert (extra["parent"], extra["base_model"], extra["job_id"]) == (BASE, BASE, "ftjob-1")
    assert extra["adapter"]["manifest_sha256"] == "b" * 64
    assert shown == await client.models.retrieve("my-model")
    assert listed[BASE].model_extra["parent"] is None
    for model in listed.values():
        assert "replica" not in json.dumps(model.model_dump())


def _tokens(world) -> list[float]:
    labels = [{"project": world.project, "kind": kind} for kind in ("prompt", "completion")]
    return [REGISTRY.get_sample_value("finery_gateway_tokens_total", label) or 0 for label in labels]
