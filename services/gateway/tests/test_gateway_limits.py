"""Limits of keys through the whole gateway, as the official client meets them."""

import asyncio

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from finery_gateway.admission import cost_of
from finery_gateway.limits import KeyLimits

BASE = "SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "The capital of France?"}]


async def _limited(world, **limits) -> tuple[str, str]:
    """Id and text of a key of the world's project."""
    key, text = await world.gateway.keys.create(world.project, limits=KeyLimits(**limits))
    return key.id, text


async def _chat(client, model=BASE, **fields):
    return await client.chat.completions.create(model=model, messages=MESSAGES, **fields)


def _tokens_left(world, key_id: str, **limits) -> int:
    return world.gateway.limits.charge(key_id, KeyLimits(**limits)).tokens.remaining


async def _until(check) -> None:
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110 - it ends in another task
            await asyncio.sleep(0.01)


async def test_a_request_too_many_is_429_as_openai_has_it_and_another_key_goes_on(world):
    _, text = await _limited(world, requests_per_minute=3)
    before = _refused("requests")
    async with world.client(text) as client, world.client() as other:
        seen = [(await client.chat.completions.with_raw_response.create(model=BASE, messages=MESSAGES)).headers for _ in range(3)]
        assert [headers["x-ratelimit-remaining-requests"] for headers in seen] == ["2", "1", "0"]
        assert (seen[0]["x-ratelimit-limit-requests"], seen[0]["x-ratelimit-reset-requests"]) == ("3", "20s")
        assert "x-ratelimit-limit-tokens" not in seen[0]
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="3, and one request more would be too many; try again in 20s") as caught:
                await _chat(client, stream=stream)
            assert (caught.value.code, caught.value.type, caught.value.param) == ("rate_limit_exceeded", "requests", None)
            headers = caught.value.response.headers
            assert headers["retry-after"] == "20"
            assert (headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-reset-requests"]) == ("0", "1m0s")
            assert "x-should-retry" not in headers
        assert len(world.vllm.requests) == 3
        unlimited = await other.chat.completions.with_raw_response.create(model=BASE, messages=MESSAGES)
        assert not any(name.startswith("x-ratelimit") for name in unlimited.headers)
        world.clock.now_s += 20
        await _chat(client)
    assert _refused("requests") == before + 2


async def test_the_clients_own_retry_gets_through_after_retry_after(world):
    key_id, text = await _limited(world, requests_per_minute=60)
    world.gateway.limits.charge(key_id, KeyLimits(requests_per_minute=60), requests=60)
    world.clock.run()
    async with world.client(text, max_retries=1) as client:
        answer = await client.chat.completions.with_raw_response.create(model=BASE, messages=MESSAGES)
    assert answer.retries_taken == 1
    assert answer.parse().choices[0].message.content == "Paris"


async def test_every_route_counts_as_a_request_and_what_is_wrong_does_too(world):
    _, text = await _limited(world, requests_per_minute=3)
    async with world.client(text) as client:
        await client.files.list()
        with pytest.raises(openai.NotFoundError):
            await client.fine_tuning.jobs.retrieve("ftjob-000000000000000000000000")
        with pytest.raises(openai.BadRequestError):
            await _chat(client, max_tokens=0)
        with pytest.raises(openai.RateLimitError):
            await client.files.list()
        with pytest.raises(openai.RateLimitError):
            await _chat(client)
    async with httpx.AsyncClient(base_url=world.url) as plain:
        assert (await plain.get("/healthz", headers={"authorization": f"Bearer {text}"})).status_code == 200


async def test_tokens_are_taken_before_and_settled_by_what_vllm_counted(world):
    limits = {"tokens_per_minute": 600}
    key_id, text = await _limited(world, **limits)
    async with world.client(text) as client:
        answer = await client.chat.completions.with_raw_response.create(model=BASE, messages=MESSAGES, max_tokens=300)
        taken = 600 - int(answer.headers["x-ratelimit-remaining-tokens"])
        assert 310 <= taken <= 340
        assert answer.headers["x-ratelimit-limit-tokens"] == "600"
        assert answer.headers["x-ratelimit-reset-tokens"] == f"{taken / 10:g}s"
        await _until(lambda: _tokens_left(world, key_id, **limits) == 600 - 10)
        async for _ in await _chat(client, stream=True, max_tokens=300):
            pass
        await _until(lambda: _tokens_left(world, key_id, **limits) == 600 - 10 - 9)


async def test_tokens_in_flight_are_not_there_for_others_of_the_same_key(world):
    limits = {"tokens_per_minute": 600, "requests_per_minute": 10}
    key_id, text = await _limited(world, **limits)
    world.vllm.endless = True
    before = _refused("tokens")
    async with world.client(text) as client:
        stream = await _chat(client, stream=True, max_tokens=500)
        await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError, match="tokens per minute") as caught:
            await _chat(client, max_tokens=100)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "tokens")
        # 20 tokens or so are missing, at 10 a second.
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 6
        # What was refused is none of the requests.
        assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "9"
        await stream.close()
        # The prompt by its estimate, and the two words that came.
        await _until(lambda: 560 <= _tokens_left(world, key_id, **limits) <= 585)
        world.vllm.endless = False
        await _chat(client, max_tokens=100)
    assert _refused("tokens") == before + 1


async def test_a_request_that_can_never_fit_is_not_repeated_by_the_client(world):
    _, text = await _limited(world, tokens_per_minute=100)
    async with world.client(text, max_retries=2) as client:
        with pytest.raises(openai.RateLimitError, match="too large.*100 a minute; ask for fewer max_tokens") as caught:
            await _chat(client, max_tokens=200)
        assert (caught.value.type, caught.value.response.headers["x-should-retry"]) == ("tokens", "false")
        assert "retry-after" not in caught.value.response.headers
        assert world.vllm.requests == []
        # Without a bound of its own, it takes what the minute has.
        await _chat(client)


async def test_open_generations_are_bounded_and_end_when_the_client_leaves(world):
    key_id, text = await _limited(world, concurrent_streams=2)
    world.vllm.endless = True
    before = _refused("streams")
    async with world.client(text) as client, world.client() as other:
        streams = [await _chat(client, stream=True) for _ in range(2)]
        for fields in ({"stream": True}, {}):
            with pytest.raises(openai.RateLimitError, match="2 generations at a time") as caught:
                await _chat(client, **fields)
            assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "streams")
            assert caught.value.response.headers["retry-after"] == "1"
        await (await _chat(other, stream=True)).close()
        await streams[0].close()
        await _until(lambda: world.gateway.limits.num_streams(key_id) == 1)
        world.vllm.endless = False
        assert len([chunk async for chunk in await _chat(client, stream=True)]) == 2
        await _until(lambda: world.gateway.limits.num_streams(key_id) == 1)
        await streams[1].close()
        await _until(lambda: world.gateway.limits.num_streams(key_id) == 0)
    assert _refused("streams") == before + 2


@pytest.mark.parametrize("failure", ["error", "retired", "no model", "cold", "broken off", "unreachable"])
async def test_what_fails_upstream_leaves_no_generation_open_and_costs_only_what_was_seen(world, failure):
    limits = {"concurrent_streams": 1, "tokens_per_minute": 10_000}
    key_id, text = await _limited(world, **limits)
    model = "m"
    if failure != "no model":
        world.serving.flip(world.project, "m", "v1")
    if failure == "error":
        world.vllm.admitted.add("v1")
        world.vllm.error = (500, {"error": {"message": "inside"}})
    elif failure == "cold":
        world.serving.cold.add("m")
    elif failure == "broken off":
        world.vllm.admitted.add("v1")
        world.vllm.break_off = True
    elif failure == "unreachable":
        world.serving.address = "unix:///nowhere.sock"
    async with world.client(text) as client:
        for _ in range(2):
            with pytest.raises(openai.APIError) as caught:
                async for _ in await _chat(client, model=model, stream=True, max_tokens=50):
                    pass
            assert not isinstance(caught.value, openai.RateLimitError)
            await _until(lambda: world.gateway.limits.num_streams(key_id) == 0)
    used = 10_000 - _tokens_left(world, key_id, **limits)
    if failure == "broken off":
        # Twice the prompt by its estimate, and two words.
        assert used == 2 * (cost_of("/v1/chat/completions", _without_inner_fields(world.vllm.requests[-1][1])).prompt_tokens + 2)
    else:
        assert used == 0


async def test_a_client_that_leaves_before_the_first_byte_aborts_the_generation(world):
    limits = {"concurrent_streams": 1, "tokens_per_minute": 10_000}
    key_id, text = await _limited(world, **limits)
    for stream, used in ((True, range(10, 40)), (False, range(510, 540))):
        world.vllm.silent = True
        world.vllm.busy.clear()
        world.vllm.aborted.clear()
        async with world.client(text) as client:
            asking = asyncio.create_task(_chat(client, stream=stream, max_tokens=500))
            async with asyncio.timeout(5):
                await world.vllm.busy.wait()
                asking.cancel()
                await world.vllm.aborted.wait()
        await _until(lambda: world.gateway.limits.num_streams(key_id) == 0)
        # Of an answer that was to come whole, nobody knows how far it was: what was taken stays taken.
        assert 10_000 - _tokens_left(world, key_id, **limits) in used
        world.clock.now_s += 60


async def test_a_client_that_leaves_while_the_model_is_being_loaded_is_never_generated_for(world):
    limits = {"concurrent_streams": 1, "tokens_per_minute": 10_000}
    key_id, text = await _limited(world, **limits)
    world.vllm.admitted.add("v1")
    loaded = world.serving.loading = asyncio.Event()
    world.serving.flip(world.project, "m", "v1")
    async with world.client(text) as client:
        asking = asyncio.create_task(_chat(client, model="m"))
        await _until(lambda: world.serving.resolved == ["m"])
        assert world.gateway.limits.num_streams(key_id) == 1
        asking.cancel()
        await _until(lambda: world.gateway.limits.num_streams(key_id) == 0)
        assert _tokens_left(world, key_id, **limits) == 10_000
        loaded.set()
        assert (await _chat(client, model="m")).model == "m"
    # The one question served the second request, too; the first was never sent.
    assert (len(world.vllm.requests), world.serving.resolved) == (1, ["m"])


async def test_new_limits_hold_at_once_where_they_are_set(world):
    key_id, text = await _limited(world)
    async with world.client(text) as client:
        await _chat(client)
        await world.gateway.keys.update(world.project, key_id=key_id, limits={"requests_per_minute": 1})
        await _chat(client)
        with pytest.raises(openai.RateLimitError):
            await _chat(client)
        await world.gateway.keys.update(world.project, key_id=key_id, limits={"requests_per_minute": None})
        await _chat(client)


def _without_inner_fields(body: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in body.items() if name not in ("model", "cache_salt")}


def _refused(limit: str) -> float:
    return REGISTRY.get_sample_value("finery_gateway_rate_limited_total", {"limit": limit}) or 0
