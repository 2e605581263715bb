"""Chat and completions: the route, the hop, and what may go wrong on it."""

import asyncio
import contextlib
import json
import socket
from types import SimpleNamespace

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from finery.common.v1 import job_pb2
from finery.training.v1 import spec_pb2, training_pb2
from finery_gateway import http_server, upstream
from finery_gateway.client import ServingClient, UnreachableServiceError
from finery_gateway.metrics import RETRIED
from finery_gateway.proxy import Proxy
from finery_gateway.resources import RouteReplica
from finery_gateway.upstream import Upstream, UpstreamError
from finery_gateway.usage import StreamTap

BASE = "SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "The capital of France?"}]
REFUSED = [
    {"chat_template": "{{ 1 }}"},
    {"kv_transfer_params": {}},
    {"prompt_logprobs": 1},
    {"cache_salt": "mine"},
    {"add_generation_prompt": False},
    {"mm_processor_kwargs": {}},
    {"guided_regex": ".*"},
    {"structured_outputs": {"regex": ".*"}},
    {"documents": []},
    {"n": 9},
    {"n": 0},
    {"max_tokens": 0},
    {"max_tokens": 10_000_000},
    {"top_logprobs": 21},
    {"temperature": 3},
    {"stop": ["x"] * 17},
    {"stream_options": {"include_usage": True}},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 100] * 400}}}},
    {"logit_bias": {"nonsense": 1}},
]


async def _chat(client, model=BASE, **fields):
    return await client.chat.completions.create(model=model, messages=MESSAGES, **fields)


async def test_a_base_model_answers_whole_and_streamed(client, world):
    answer = await _chat(client)
    assert answer.choices[0].message.content == "Paris"
    assert (answer.model, answer.usage.completion_tokens) == (BASE, 3)
    chunks = [chunk async for chunk in await _chat(client, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris"
    assert (await client.completions.create(model=BASE, prompt="The capital of France is")).choices[0].text == "Paris"


async def test_vllm_gets_the_version_the_token_and_a_salt_of_the_project(client, stranger, world):
    world.serving.flip(world.project, "my-model", "job-8-cafe")
    world.vllm.admitted.add("job-8-cafe")
    answer = await _chat(client, model="my-model", temperature=0, user="someone")
    assert answer.model == "my-model"
    headers, body = world.vllm.requests[-1]
    assert (headers["x-finery-alias"], headers["x-finery-version"]) == ("my-model", "job-8-cafe")
    assert (body["model"], body["temperature"]) == ("job-8-cafe", 0)
    assert "authorization" not in headers
    assert "user" not in body
    await _chat(stranger)
    other = world.vllm.requests[-1][1]["cache_salt"]
    assert len(body["cache_salt"]) == 64
    assert other != body["cache_salt"]
    assert world.project not in body["cache_salt"]


async def test_the_usage_of_a_stream_is_shown_to_who_asked_and_always_counted(client, world):
    before = _tokens(world)
    chunks = [chunk async for chunk in await _chat(client, stream=True)]
    assert all(chunk.choices for chunk in chunks)
    chunks = [chunk async for chunk in await _chat(client, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage.completion_tokens == 2
    await _chat(client)
    assert _tokens(world) - before == 2 + 2 + 3


async def test_a_model_of_another_project_or_none_is_not_there(client, stranger, world):
    world.serving.flip(world.project, "my-model", "v1")
    for caller, model in ((stranger, "my-model"), (client, "nothing")):
        with pytest.raises(openai.NotFoundError):
            await _chat(caller, model=model)
    assert world.vllm.requests == []


async def test_a_retired_version_is_resolved_again_before_the_first_byte(client, world):
    world.vllm.admitted |= {"v1", "v2"}
    world.serving.flip(world.project, "m", "v1")
    await _chat(client, model="m")
    # Swapped behind the back of the watch.
    world.serving.aliases[f"projects/{world.project}/aliases/m"].version = "v2"
    world.vllm.admitted.discard("v1")
    assert (await _chat(client, model="m")).model == "m"
    assert [body["model"] for _, body in world.vllm.requests] == ["v1", "v1", "v2"]


async def test_an_alias_that_moves_on_while_its_request_is_under_way_costs_its_caller_nothing(client, world):
    versions = ["v1", "v2", "v3", "v4", "v5"]
    world.serving.flip(world.project, "m", "v1")

    def move_on(version: str) -> None:
        newer = versions[min(versions.index(version) + 1, 4)]
        world.vllm.admitted = {newer}
        world.serving.flip(world.project, "m", newer)

    world.vllm.on_request = move_on
    assert (await _chat(client, model="m")).model == "m"
    assert [body["model"] for _, body in world.vllm.requests] == versions


async def test_a_flip_reaches_the_gateway_by_the_watch(client, world):
    world.vllm.admitted |= {"v1", "v2"}
    world.serving.flip(world.project, "m", "v1")
    await _chat(client, model="m")
    world.serving.flip(world.project, "m", "v2")
    async with asyncio.timeout(5):
        while world.vllm.requests[-1][1]["model"] != "v2":
            await _chat(client, model="m")


async def test_a_route_is_asked_for_once_by_many(client, world):
    await asyncio.gather(*(_chat(client) for _ in range(20)))
    assert world.serving.resolved == [BASE]
    await _chat(client)
    assert world.serving.resolved == [BASE]


async def test_a_request_is_sent_again_however_long_its_vllm_took_to_die(client, world, monkeypatch):
    """A second is what a model may take here to be there."""
    send = Proxy._send

    async def die_late(self, generation, replica, *, version):
        monkeypatch.setattr(Proxy, "_send", send)
        await asyncio.sleep(1.2)
        raise UpstreamError("the connection broke")

    monkeypatch.setattr(Proxy, "_send", die_late)
    assert (await _chat(client)).model == BASE
    assert len(world.vllm.requests) == 1


@pytest.mark.parametrize(("pause_s", "num_tries"), [(0.0, 8), (0.6, 2)])
async def test_a_version_that_stays_retired_is_503_with_retry_after(client, world, monkeypatch, pause_s, num_tries):
    """After all tries, or after the second that a model may take here to be there."""
    monkeypatch.setattr("finery_gateway.proxy._PAUSE_S", pause_s)
    world.serving.flip(world.project, "m", "never-admitted")
    with pytest.raises(openai.InternalServerError) as caught:
        await _chat(client, model="m")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert len(world.vllm.requests) == num_tries


async def test_a_cold_model_is_503_with_retry_after_when_it_takes_too_long(client, world):
    world.serving.cold.add("m")
    with pytest.raises(openai.InternalServerError, match="being loaded") as caught:
        await _chat(client, model="m")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1


def _finished_job(world, *, deployment: str) -> str:
    """Puts a job that succeeded into the training service; answers its model's name."""
    job_hex = "0123456789abcdef01234567"
    alias = f"ft:{BASE}:{world.project}:news:{job_hex}"
    name = f"projects/{world.project}/jobs/ftjob-{job_hex}"
    state = training_pb2.JobDeployment(state=f"DEPLOYMENT_STATE_{deployment}", alias=alias)
    world.training.jobs[name] = training_pb2.Job(
        name=name,
        spec=spec_pb2.TrainingSpec(base_model=BASE),
        suffix="news",
        training_file="file-1",
        state=job_pb2.JOB_STATE_SUCCEEDED,
        deployment=state,
    )
    world.training.jobs[name].create_time.GetCurrentTime()
    return alias


async def test_a_job_that_has_just_succeeded_answers_as_soon_as_its_model_is_there(client, world):
    alias = _finished_job(world, deployment="PENDING")
    world.vllm.admitted.add("v1")
    asked = asyncio.create_task(_chat(client, model=alias))
    async with asyncio.timeout(5):
        while alias not in world.serving.resolved:  # noqa: ASYNC110  the fake has no event for it
            await asyncio.sleep(0.01)
    world.serving.flip(world.project, alias, "v1")
    assert (await asked).model == alias


async def test_a_job_whose_model_was_taken_out_is_not_there(client, world):
    with pytest.raises(openai.NotFoundError):
        await _chat(client, model=_finished_job(world, deployment="READY"))


async def test_a_vllm_that_is_not_there_is_503(client, world):
    world.serving.address = "unix:///nowhere/v.sock"
    with pytest.raises(openai.InternalServerError, match="try again|Try again") as caught:
        await _chat(client)
    assert caught.value.status_code == 503
    assert world.serving.resolved == [BASE, BASE]


async def test_vllms_errors_become_the_envelope(client, world):
    world.vllm.error = (
        400,
        {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "param": "max_tokens", "code": 400}},
    )
    with pytest.raises(openai.BadRequestError, match="too large") as caught:
        await _chat(client, stream=True)
    assert (caught.value.param, caught.value.type) == ("max_tokens", "invalid_request_error")
    world.vllm.error = (500, {"error": {"message": "CUDA error in /opt/vllm/secret.py"}})
    with pytest.raises(openai.InternalServerError) as caught:
        await _chat(client)
    assert "secret" not in caught.value.message


async def test_a_client_that_hangs_up_aborts_the_generation(client, world):
    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(5):
        await world.vllm.aborted.wait()


@contextlib.asynccontextmanager
async def _unread_stream(world, model):
    """A connection on which a stream was asked for, by a client that takes little at a time."""
    body = json.dumps({"model": model, "messages": MESSAGES, "stream": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.api_key}\r\ncontent-type: application/json"
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    plain.connect(("127.0.0.1", int(world.url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=plain, limit=65536)
    writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    yield reader
    writer.close()


async def test_a_client_that_stops_reading_is_cut_and_its_generation_aborted(world, monkeypatch):
    monkeypatch.setattr(http_server, "TAKEN_WITHIN_S", 0.2)
    world.vllm.floods = True
    world.vllm.admitted.add("v1")
    world.serving.flip(world.project, "m", "v1")
    async with _unread_stream(world, "m"), asyncio.timeout(20):
        await world.vllm.aborted.wait()
        while not (requests := world.gateway.proxy.reports.peek(world.project, "m", "v1").requests)["cancelled"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (requests["cancelled"], sum(requests.values())) == (1, 1)


async def test_a_client_that_reads_slowly_is_not_cut(world, monkeypatch):
    monkeypatch.setattr(http_server, "TAKEN_WITHIN_S", 0.5)
    monkeypatch.setattr(http_server, "MIN_TAKEN_BYTES", 1)
    world.vllm.floods = True
    async with _unread_stream(world, BASE) as reader, asyncio.timeout(20):
        for _ in range(10):
            await reader.readexactly(1_000_000)
            await asyncio.sleep(0.2)
    assert not world.vllm.aborted.is_set()


async def test_a_stream_that_breaks_off_ends_with_an_error(client, world):
    world.vllm.break_off = True
    with pytest.raises(openai.APIError, match="stopped in the middle"):
        async for _ in await _chat(client, stream=True):
            pass


async def test_a_field_that_is_not_allowed_or_out_of_bounds_never_reaches_vllm(world):
    async with httpx.AsyncClient(base_url=world.url, headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        for fields in REFUSED:
            answer = await plain.post("/v1/chat/completions", json={"model": BASE, "messages": MESSAGES} | fields)
            assert answer.status_code == 400, fields
            assert next(iter(fields)) in answer.json()["error"]["message"]
    assert world.vllm.requests == []


async def test_completions_refuse_prompt_logprobs_by_the_back_door(client, world):
    with pytest.raises(openai.BadRequestError, match="echo"):
        await client.completions.create(model=BASE, prompt="x", echo=True, logprobs=1)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        await client.completions.create(model=BASE, prompt="x", best_of=2)
    assert world.vllm.requests == []


async def test_tools_schemas_and_sampling_reach_vllm_as_they_were_sent(client, world):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    await _chat(client, tools=[tool], tool_choice="auto", response_format=schema, n=2, stop=["a"], extra_body={"top_k": 5})
    body = world.vllm.requests[-1][1]
    assert body["tools"] == [tool]
    assert body["response_format"] == schema
    assert (body["n"], body["stop"], body["top_k"], body["tool_choice"]) == (2, ["a"], 5, "auto")


def test_a_stream_cut_anywhere_comes_out_whole_and_without_the_usage_event():
    events = [
        b'data: {"choices":[{"text":"\\"choices\\":[]"}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":6}}\n\n',
    ]
    whole = b"".join([*events, b"data: [DONE]\n\n"])
    for cut in range(len(whole) + 1):
        tap = StreamTap(hide_usage=True)
        out = tap.feed(whole[:cut]) + tap.feed(whole[cut:]) + tap.end()
        assert out == events[0] + b"data: [DONE]\n\n"
        assert (tap.usage.prompt_tokens, tap.usage.completion_tokens) == (5, 6)


def _tokens(world) -> float:
    return REGISTRY.get_sample_value("finery_gateway_tokens_total", {"project": world.project, "kind": "completion"}) or 0


async def test_a_replica_that_does_not_answer_is_left_out_and_its_requests_go_to_another(client, world):
    world.serving.more_addresses, world.serving.address = [world.serving.address], "unix:///nowhere/v.sock"
    before = RETRIED.labels("connection")._value.get()
    for _ in range(20):
        await _chat(client)
    # The first request that is sent there, if any is; for 5 s after that, none.
    assert RETRIED.labels("connection")._value.get() - before <= 1


@pytest.mark.parametrize(("fault", "streams"), [("has_ended", False), ("has_ended", True), ("break_off_first", True)])
async def test_a_request_is_sent_again_where_no_token_of_its_answer_came(client, world, fault, streams):
    """A vLLM that ends has its server answer for a while, and begins streams that wait for their first token."""
    faults = iter((True, False))
    world.vllm.on_request = lambda _: setattr(world.vllm, fault, next(faults))
    before = RETRIED.labels("connection")._value.get()
    answer = await _chat(client, stream=streams)
    if streams:
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices]) == "Paris"
    assert len(world.vllm.requests) == 2
    assert RETRIED.labels("connection")._value.get() - before == 1
    assert world.gateway.proxy._suspects
    assert [upstream.num_in_flight for upstream in world.gateway.proxy._upstreams.values()] == [0]


@pytest.fixture
async def ending(tmp_path):
    """A replica that is to end, with the number of its requests: it refuses all, whatever their version."""
    here = SimpleNamespace(address=f"unix://{tmp_path}/ending.sock", num_asked=0)

    async def refuse(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        here.num_asked += 1
        writer.write(b"HTTP/1.1 409 Conflict\r\nx-finery-retired: 1\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_unix_server(refuse, here.address.removeprefix("unix://")):
        yield here


@pytest.mark.parametrize("alias", ["", "m"])
async def test_a_replica_that_is_to_end_is_asked_once_though_its_route_stays(client, world, ending, alias):
    """Agents that have not heard of it yet go on to name it, and it has the fewest requests."""
    world.vllm.admitted.add("v1")
    world.serving.flip(world.project, "m", "v1")
    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    world.serving.more_addresses = [ending.address]
    world.gateway.proxy._routes._known.clear()
    assert (await _chat(client, model=alias or BASE)).model == (alias or BASE)
    assert ending.num_asked == 1
    await stream.close()


async def test_a_base_model_whose_replica_ends_is_asked_for_anew(client, world, ending):
    living, world.serving.address = world.serving.address, ending.address
    asking = asyncio.create_task(_chat(client))
    async with asyncio.timeout(5):
        while not ending.num_asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    world.serving.address = living
    assert (await asking).model == BASE
    await _chat(client)
    assert world.serving.resolved == [BASE] * (ending.num_asked + 1)


async def test_a_replica_that_lives_is_found_among_many_that_are_gone(client, world):
    gone = [f"unix:///nowhere/{number}.sock" for number in range(4)]
    world.serving.more_addresses, world.serving.address = [*gone[1:], world.serving.address], gone[0]
    for _ in range(10):
        world.gateway.proxy._suspects.clear()
        assert (await _chat(client)).model == BASE


async def test_an_agent_that_ends_while_it_is_asked_for_a_route_fails_no_request(client, world, monkeypatch):
    resolve, num_asked = ServingClient.resolve, 0

    async def cut_off(self, *args, **fields):
        nonlocal num_asked
        num_asked += 1
        if num_asked < 3:
            raise UnreachableServiceError("The serving service cannot be reached at the moment.")
        return await resolve(self, *args, **fields)

    monkeypatch.setattr(ServingClient, "resolve", cut_off)
    assert (await _chat(client)).model == BASE
    assert num_asked == 3


async def test_a_base_model_whose_vllm_is_gone_takes_no_other_with_it(client, world):
    world.serving.more_bases["other-base"] = "unix:///nowhere/v.sock"
    with pytest.raises(openai.InternalServerError) as caught:
        await _chat(client, "other-base")
    assert caught.value.status_code == 503
    assert (await _chat(client)).model == BASE


async def test_requests_go_to_the_replica_with_the_fewest_in_flight(world):
    proxy = world.gateway.proxy
    replicas = [RouteReplica(address=f"unix:///{name}", token="t") for name in "ab"]
    proxy._upstreams = {replica.address: Upstream(replica.address, timeout_s=1) for replica in replicas}
    proxy._upstreams["unix:///a"].num_in_flight = 2
    proxy._upstreams["unix:///b"].num_in_flight = 1
    assert {proxy._least_busy(replicas).address for _ in range(20)} == {"unix:///b"}
    proxy._upstreams["unix:///a"].num_in_flight = 1
    assert {proxy._least_busy(replicas).address for _ in range(50)} == {"unix:///a", "unix:///b"}
    proxy._suspect("unix:///b")
    assert {proxy._least_busy(replicas).address for _ in range(20)} == {"unix:///a"}
    proxy._suspect("unix:///a")
    assert len({proxy._least_busy(replicas).address for _ in range(50)}) == 2


async def test_what_is_kept_of_a_replica_goes_after_its_last_request(client, world, tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "IDLE_S", 0.0)
    upstreams, first = world.gateway.proxy._upstreams, world.serving.address

    async def asked_at_another(name):
        (tmp_path / name).symlink_to(first.removeprefix("unix://"))
        world.serving.address = f"unix://{tmp_path / name}"
        world.gateway.proxy._routes._known.clear()
        await _chat(client)
        return world.serving.address

    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    # Broken for another request.
    world.gateway.proxy._suspect(first)
    second = await asked_at_another("second.sock")
    assert set(upstreams) == {first, second}
    await stream.close()
    async with asyncio.timeout(5):
        while upstreams[first].num_in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    third = await asked_at_another("third.sock")
    assert set(upstreams) == {third}


async def test_a_request_is_in_flight_until_its_answer_is_closed(client, world):
    await _chat(client)
    assert [upstream.num_in_flight for upstream in world.gateway.proxy._upstreams.values()] == [0]
    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    assert [upstream.num_in_flight for upstream in world.gateway.proxy._upstreams.values()] == [1]
    await stream.close()
    await world.vllm.aborted.wait()
    async with asyncio.timeout(5):
        while any(upstream.num_in_flight for upstream in world.gateway.proxy._upstreams.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
