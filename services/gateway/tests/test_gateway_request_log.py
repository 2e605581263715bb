"""The line of each request: what it says, and what it never does."""

import asyncio
import json
from typing import Any, cast

import httpx
import openai
import pytest
import structlog
from prometheus_client import REGISTRY
from structlog.contextvars import bound_contextvars, merge_contextvars

from finery_gateway.client import ServingClient, TrainingClient
from finery_gateway.limits import KeyLimits
from finery_gateway.resources import Route, RouteReplica, RouteTarget
from finery_gateway.routes import Routes

BASE = "SmolLM2-135M-Instruct"
SECRET = "a patient's name"


async def _chat(client, **fields):
    return await client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": SECRET}], **fields)


@pytest.fixture
def lines():
    """Every line that is logged, as it is logged."""
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as captured:
        yield captured


async def _line(lines, number: int = 0) -> dict[str, Any]:
    """A request's line is written after its answer: it is waited for."""
    async with asyncio.timeout(5):
        while len(found := [line for line in lines if line["event"] == "request"]) <= number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found[number]


async def test_an_answer_has_one_line_with_ids_counts_and_times_and_no_content(lines, client, world):
    key = (await world.gateway.keys.list(world.project))[0]
    world.serving.flip(world.project, "m", "job-8-cafe")
    world.vllm.admitted.add("job-8-cafe")
    answer = await _chat(client, extra_body={"model": "m"}, extra_headers={"x-request-id": "mine-1"})
    assert answer._request_id == "mine-1"
    line = await _line(lines)
    wanted = {
        "log_level": "info",
        "request_id": "mine-1",
        "key_id": key.id,
        "project": world.project,
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "m",
        "version": "job-8-cafe",
        "streams": False,
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }
    assert {name: line.get(name) for name in wanted} == wanted
    assert 0 < line["first_byte_seconds"] <= line["seconds"] < 5
    assert set(line) - set(wanted) == {"event", "first_byte_seconds", "seconds"}
    await _chat(client, stream=True)
    text = json.dumps(lines, default=str)
    assert SECRET not in text
    assert "Paris" not in text
    assert world.api_key not in text


async def test_a_request_id_is_made_where_none_that_can_stand_in_a_log_is_given(lines, world):
    async with httpx.AsyncClient(base_url=world.url) as plain:
        ids = [
            (await plain.get("/v1/nothing", headers={"x-request-id": given})).headers["x-request-id"] for given in ("", "a b", "x" * 129)
        ]
        assert len(set(ids)) == 3
        assert all(made.startswith("req_") for made in ids)
        assert (await plain.get("/v1/files", headers={"x-request-id": "ok-1"})).headers["x-request-id"] == "ok-1"
    line = await _line(lines, 3)
    assert (line["request_id"], line["status"], line["route"]) == ("ok-1", 401, "/v1/files")
    assert "key_id" not in line


async def test_a_refused_request_says_by_which_limit_and_a_probe_says_nothing(lines, world):
    _, text = await world.gateway.keys.create(world.project, limits=KeyLimits(tokens_per_minute=10))
    async with world.client(text) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await _chat(client, max_tokens=100)
        assert caught.value.request_id == caught.value.response.headers["x-request-id"]
        await client.get("/../healthz", cast_to=object)
    line = await _line(lines)
    assert (line["status"], line["refused_by"], line["request_id"]) == (429, "tokens", caught.value.request_id)
    assert [line["log_level"] for line in lines if line["event"] == "request"] == ["info", "debug"]


async def test_a_client_that_left_has_a_line_that_says_so(lines, client, world):
    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    await stream.close()
    line = await _line(lines)
    assert (line["status"], line["cut_off"], line["version"]) == (200, True, BASE)
    world.vllm.silent = True
    asking = asyncio.create_task(_chat(client))
    async with asyncio.timeout(5):
        await world.vllm.busy.wait()
    asking.cancel()
    line = await _line(lines, 1)
    assert (line["status"], line["cut_off"]) == (499, True)
    assert "first_byte_seconds" not in line


async def test_a_bug_of_ours_has_an_id_a_line_and_its_status_in_the_metrics(lines, client, world, monkeypatch):
    async def broken(*_args, **_options):
        raise RuntimeError("inside")

    labels = {"route": "/v1/files", "method": "GET", "status": "500", "project": world.project}
    monkeypatch.setattr(world.gateway.files, "list", broken)
    with pytest.raises(openai.InternalServerError, match="correlation id") as caught:
        await client.files.list()
    assert "inside" not in caught.value.message
    line = await _line(lines)
    assert (line["status"], line["request_id"]) == (500, caught.value.request_id)
    unexpected = next(line for line in lines if line["event"] == "unexpected error")
    assert unexpected["request_id"] == caught.value.request_id
    assert REGISTRY.get_sample_value("finery_gateway_requests_total", labels) == 1


async def test_a_watch_that_outlives_its_request_does_not_speak_under_its_id(lines):
    class Serving:
        async def resolve(self, *_args, **_options):
            return Route(targets=(RouteTarget(version="v", weight=100, replicas=(RouteReplica(address="unix:///v.sock", token="t"),)),))

        async def all_aliases(self, project):
            for alias in ():
                yield alias

        async def watch_aliases(self, _project):
            for event in ():
                yield event

    routes = Routes(cast("ServingClient", Serving()), training=cast("TrainingClient", None), cold_wait_s=1)
    with bound_contextvars(request_id="mine", service="gateway"):
        await routes.route("p", "m")
    async with asyncio.timeout(5):
        while not lines:  # noqa: ASYNC110 - it is logged by another task
            await asyncio.sleep(0.01)
    await routes.close()
    assert "watch" in lines[0]["event"]
    assert (lines[0].get("request_id"), lines[0]["service"]) == (None, "gateway")


@pytest.mark.parametrize("log_content", [True])
async def test_content_is_logged_where_the_operator_asks_for_it(lines, client, world, log_content):
    await _chat(client)
    assert [chunk async for chunk in await _chat(client, stream=True)]
    for number, words in ((0, ['"content": "Paris"', "Paris"]), (1, ["Par", "is", "[DONE]"])):
        line = await _line(lines, number)
        assert line["content_asked"]["messages"] == [{"role": "user", "content": SECRET}]
        assert all(word.replace(": ", ":") in line["content_answered"] for word in words)
    # Only of generations.
    await client.files.list()
    assert not any(name.startswith("content") for name in await _line(lines, 2))
