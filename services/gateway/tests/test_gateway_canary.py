"""Canaries at the gateway: who gets which version, what is counted of each, and the calls that decide."""

import asyncio

import grpc
import grpc.aio
import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from finery.common.v1 import job_pb2
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery_gateway.client import ServingClient
from finery_gateway.resources import RouteTarget
from finery_gateway.splits import chosen
from finery_gateway.version_reports import VersionReports

BASE = "SmolLM2-135M-Instruct"
MESSAGES = [{"role": "user", "content": "The capital of France?"}]


@pytest.fixture
async def native(world):
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1", headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        yield plain


@pytest.fixture
def split(world):
    """`m` serves v1, and v2 as its canary."""
    world.vllm.admitted |= {"v1", "v2", "v3"}
    world.serving.flip(world.project, "m", "v1")
    return lambda weight, version="v2": world.serving.split(world.project, "m", version, weight=weight)


async def _chat(client, *, sticky=None, **fields):
    headers = {"x-finery-sticky": sticky} if sticky else {}
    return await client.chat.completions.create(model="m", messages=MESSAGES, extra_headers=headers, **fields)


async def _version(client, **fields):
    headers = {"x-finery-sticky": fields.pop("sticky")} if "sticky" in fields else {}
    answer = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, extra_headers=headers, **fields)
    return answer.headers["x-finery-version"]


def _asked(world):
    return [body["model"] for _, body in world.vllm.requests]


async def _until(holds):
    async with asyncio.timeout(5):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_callers_are_split_and_each_stays_where_it_is(client, world, split):
    split(50)
    by_header = {sticky: await _version(client, sticky=sticky) for sticky in map(str, range(12))}
    assert set(by_header.values()) == {"v1", "v2"}
    assert set(_asked(world)) == {"v1", "v2"}
    for sticky, version in by_header.items():
        assert await _version(client, sticky=sticky) == version
        assert await _version(client, user=sticky) == version
        # The header says whose request it is, whatever the body does.
        assert await _version(client, sticky=sticky, user="someone else") == version
    assert world.serving.resolved == ["m"]


async def test_who_names_no_caller_is_drawn_for_each_request(client, world, split):
    split(50)
    await asyncio.gather(*(_chat(client) for _ in range(60)))
    assert set(_asked(world)) == {"v1", "v2"}


async def test_completions_are_split_as_well(client, world, split):
    split(50)
    chat = {user: await _version(client, user=user) for user in map(str, range(20))}
    world.vllm.requests.clear()
    for user in chat:
        await client.completions.create(model="m", prompt="x", user=user)
    assert _asked(world) == list(chat.values())


async def test_a_caller_that_is_too_long_to_tell_is_refused(client, world, split):
    with pytest.raises(openai.BadRequestError, match="sticky"):
        await _chat(client, sticky="x" * 513)
    assert world.vllm.requests == []


async def test_a_change_of_weight_canary_or_version_reaches_the_gateway_by_the_watch(client, world, split):
    async def all_get(version):
        return {await _version(client, user=user) for user in map(str, range(8))} == {version}

    await _chat(client)
    split(99)
    await _until(lambda: _gets(client, "v2", user=_caller_of(world, "m", "v2")))
    split(99, "v3")
    await _until(lambda: _gets(client, "v3", user=_caller_of(world, "m", "v3")))
    split(0)
    await _until(lambda: all_get("v1"))
    world.serving.flip(world.project, "m", "v2")
    await _until(lambda: all_get("v2"))


async def test_a_weight_alone_is_a_change(client, world, split):
    split(1)
    caller = _caller_of(world, "m", "v2", weight=60, but_not=1)
    assert await _version(client, user=caller) == "v1"
    split(60)
    await _until(lambda: _gets(client, "v2", user=caller))


async def test_a_weight_that_changes_while_its_route_is_asked_for_is_not_missed(client, world, split, monkeypatch):
    resolve, answered, may_arrive = ServingClient.resolve, asyncio.Event(), asyncio.Event()
    routes, heard = world.gateway.proxy._routes, []
    changed = routes._changed

    async def held_back(self, *args, **fields):
        route = await resolve(self, *args, **fields)
        answered.set()
        await may_arrive.wait()
        return route

    def listening(project, event):
        changed(project, event)
        heard.append(event.alias.canary.weight)

    monkeypatch.setattr(ServingClient, "resolve", held_back)
    monkeypatch.setattr(routes, "_changed", listening)
    split(1)
    caller = _caller_of(world, "m", "v2", weight=60, but_not=1)
    asking = asyncio.create_task(_version(client, user=caller))
    await answered.wait()
    split(60)
    async with asyncio.timeout(5):
        while 60 not in heard:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    may_arrive.set()
    assert await asking == "v1"
    assert [await _version(client, user=caller) for _ in range(3)] == ["v2"] * 3
    assert world.serving.resolved == ["m", "m"]


async def test_a_route_is_kept_where_what_is_heard_while_it_is_asked_for_is_what_it_says(client, world, split):
    split(1)
    world.serving.loading = asyncio.Event()
    asking = asyncio.create_task(_chat(client))
    async with asyncio.timeout(5):
        while not world.gateway.proxy._routes._heard:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    world.serving.loading.set()
    await asking
    await _chat(client)
    assert world.serving.resolved == ["m"]


async def test_a_canary_that_is_retired_under_way_costs_its_callers_nothing(client, world, split):
    split(99)
    caller = _caller_of(world, "m", "v2")
    assert await _version(client, user=caller) == "v2"
    # Rolled back behind the back of the watch.
    world.serving.aliases[f"projects/{world.project}/aliases/m"].ClearField("canary")
    world.vllm.admitted.discard("v2")
    world.vllm.requests.clear()
    assert await _version(client, user=caller) == "v1"
    assert _asked(world) == ["v2", "v1"]


async def test_a_stream_ends_on_the_version_that_it_began_on(client, world, split):
    split(99)
    world.vllm.go_on = asyncio.Event()
    caller = _caller_of(world, "m", "v2")
    stream = await _chat(client, stream=True, user=caller)
    chunks = aiter(stream)
    said = [(await anext(chunks)).choices[0].delta.content]
    world.serving.flip(world.project, "m", "v3")
    world.vllm.go_on.set()
    await _until(lambda: _gets(client, "v3", user=caller))
    said += [chunk.choices[0].delta.content async for chunk in chunks]
    assert said == ["v2", "v2"]
    assert stream.response.headers["x-finery-version"] == "v2"


async def test_each_versions_requests_errors_tokens_and_times_are_counted(client, world, split, native):
    split(50)
    old, new = _caller_of(world, "m", "v1", weight=50), _caller_of(world, "m", "v2", weight=50)
    for _ in range(3):
        await _chat(client, user=old)
    async for _ in await _chat(client, user=new, stream=True):
        pass
    world.vllm.error = (500, {"error": {"message": "boom"}})
    with pytest.raises(openai.InternalServerError):
        await _chat(client, user=new)
    world.vllm.error = (400, {"error": {"message": "too long"}})
    with pytest.raises(openai.BadRequestError):
        await _chat(client, user=new)
    world.vllm.error, world.vllm.break_off = None, True
    with pytest.raises(openai.APIError):
        async for _ in await _chat(client, user=new, stream=True):
            pass
    world.vllm.break_off = False
    first, second = (await native.get("/deployments/m/versions")).json()
    assert first | {"mean_first_byte_seconds": 0, "mean_request_seconds": 0} == {
        "version": "v1", "role": "serving", "weight": 50, "answered": 3, "refused": 0, "failed": 0, "cancelled": 0,
        "prompt_tokens": 21, "completion_tokens": 9, "mean_first_byte_seconds": 0, "mean_request_seconds": 0,
    }  # fmt: skip
    assert 0 < first["mean_first_byte_seconds"] <= first["mean_request_seconds"] < 5
    counted = {name: second[name] for name in ("role", "answered", "refused", "failed", "prompt_tokens", "completion_tokens")}
    assert counted == {"role": "canary", "answered": 1, "refused": 1, "failed": 2, "prompt_tokens": 7, "completion_tokens": 2}
    metrics = _metrics(world)
    labels = {"project": world.project, "alias": "m", "version": "v2"}
    for outcome, count in (("answered", 1), ("refused", 1), ("failed", 2), ("cancelled", 0)):
        assert metrics.get_sample_value("finery_gateway_version_requests_total", {**labels, "outcome": outcome}) == count
    assert metrics.get_sample_value("finery_gateway_version_tokens_total", {**labels, "kind": "completion"}) == 2
    assert metrics.get_sample_value("finery_gateway_version_request_seconds_count", labels) == 1
    # The broken answer had begun.
    assert metrics.get_sample_value("finery_gateway_version_first_byte_seconds_bucket", {**labels, "le": "+Inf"}) == 2


async def test_a_client_that_leaves_and_a_vllm_that_is_gone_are_counted(client, world, split):
    world.vllm.endless = True
    stream = await _chat(client, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await world.vllm.aborted.wait()
    world.serving.address = "unix:///nowhere/v.sock"
    # A change, upon which the gateway asks for the route anew.
    split(1)
    caller = _caller_of(world, "m", "v1", weight=1)
    await _until(lambda: _is_refused(client, user=caller))
    report = world.gateway.proxy.reports.peek(world.project, "m", "v1")
    # Until the gateway has heard of the change, requests are answered.
    assert report.requests["cancelled"] == 1
    assert report.requests["failed"] >= 1


async def test_what_is_counted_goes_with_its_version(client, world, split):
    split(50)
    await asyncio.gather(*(_chat(client, user=str(number)) for number in range(20)))
    assert _shown(world) == {("m", "v1"), ("m", "v2")}
    world.serving.flip(world.project, "m", "v2")
    await _until(lambda: _shows(world, {("m", "v2")}))
    assert world.gateway.proxy.reports.peek(world.project, "m", "v2").requests["answered"] > 0
    # Nor does a request that was under way bring it back.
    world.vllm.go_on = asyncio.Event()
    stream = await _chat(client, stream=True)
    world.serving.flip(world.project, "m", "v3")
    await _until(lambda: _shows(world, set()))
    world.vllm.go_on.set()
    async for _ in stream:
        pass
    assert _shown(world) == set()


def test_a_request_that_ends_after_its_alias_or_version_is_gone_brings_no_report_back():
    reports = VersionReports()
    reports.of("p", "m", "v1").count("answered")
    reports.keep_aliases("p", {"m": {"v1", "v2"}})
    reports.of("p", "m", "v2").count("answered")
    reports.keep("p", "m", {"v2"})
    reports.of("p", "m", "v1").count("failed")
    assert _samples(reports) == {("m", "v2")}
    reports.keep("p", "m", frozenset())
    reports.of("p", "m", "v2").count("answered")
    assert _samples(reports) == set()
    reports.keep("p", "m", {"v1"})
    reports.of("p", "m", "v1").count("answered")
    assert _samples(reports) == {("m", "v1")}


async def test_what_is_counted_goes_with_an_alias_that_was_deleted_while_nobody_watched(client, world, split):
    await _chat(client)
    await client.chat.completions.create(model=BASE, messages=MESSAGES)
    assert _shown(world) == {("m", "v1")}
    world.serving.aliases.clear()
    for watch in world.gateway.proxy._routes._watches.values():
        watch.cancel()
    world.gateway.proxy._routes._watches.clear()
    world.gateway.proxy._routes._known.clear()
    await client.chat.completions.create(model=BASE, messages=MESSAGES)
    await _until(lambda: _shows(world, set()))


async def test_a_version_is_deployed_as_a_canary_and_promoted_by_rest(native, client, world):
    job_id = await _trained(world, client)
    old = await native.post("/deployments", json={"job_id": job_id, "alias": "m"})
    job_id = await _trained(world, client)
    made = await native.post("/deployments", json={"job_id": job_id, "alias": "m", "canary_weight": 10})
    assert made.status_code == 201
    canary = made.json()["canary"]
    assert (made.json()["version"], canary["weight"]) == (old.json()["version"], 10)
    assert canary["version"].startswith(job_id)
    moved = await native.post("/deployments/m/canary", json={"weight": 50}, headers={"if-match": made.headers["etag"]})
    assert (moved.status_code, moved.json()["canary"]["weight"]) == (200, 50)
    for action, body in (("canary", {"weight": 60}), ("promote", None), ("rollback", None)):
        stale = await native.post(f"/deployments/m/{action}", json=body, headers={"if-match": made.headers["etag"]})
        assert (stale.status_code, stale.headers["x-should-retry"]) == (409, "false")
    promoted = await native.post("/deployments/m/promote", headers={"if-match": moved.headers["etag"]})
    assert (promoted.status_code, promoted.json()["version"], promoted.json()["canary"]) == (200, canary["version"], None)
    assert promoted.json()["previous"]["version"] == old.json()["version"]
    assert promoted.headers["etag"] != moved.headers["etag"]
    assert [(item["version"], item["role"], item["weight"]) for item in (await native.get("/deployments/m/versions")).json()] == [
        (canary["version"], "serving", 100)
    ]


async def test_a_promotion_that_arrives_twice_is_asked_for_under_one_request_id(native, world, split):
    split(10)
    for _ in range(2):
        await native.post("/deployments/m/rollback", headers={"idempotency-key": "k"})
    await native.post("/deployments/m/rollback")
    (_, first), (_, again), (_, other) = world.serving.requests
    assert first == again != other
    reused = await native.post("/deployments/m/rollback", headers={"idempotency-key": "k", "if-match": '"e1"'})
    assert (reused.status_code, reused.json()["error"]["code"]) == (409, "idempotency_key_reused")


async def test_aliases_are_pinned_by_rest(native, split):
    assert (await native.post("/deployments/m/pin")).json()["pinned"] is True
    assert (await native.get("/deployments/m")).json()["pinned"] is True
    assert (await native.post("/deployments/m/unpin")).json()["pinned"] is False


@pytest.mark.parametrize("weight", [0, 100, 1.5, None])
async def test_a_weight_that_is_no_share_never_leaves_the_gateway(native, world, split, weight):
    split(10)
    refused = await native.post("/deployments/m/canary", json={"weight": weight})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "weight")
    assert world.serving.requests == []


async def test_a_canary_is_another_projects_business_never(world, split):
    split(10)
    _, key = await world.gateway.keys.create(f"{world.project}-other")
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1/deployments/m", headers={"authorization": f"Bearer {key}"}) as other:
        for action, body in (("canary", {"weight": 5}), ("promote", None), ("rollback", None), ("pin", None), ("unpin", None)):
            assert (await other.post(f"/{action}", json=body)).status_code == 404
        assert (await other.get("/versions")).status_code == 404
    assert world.serving.requests == []


async def test_canaries_are_promoted_by_grpc_too(world, split):
    split(10)
    async with grpc.aio.insecure_channel(world.grpc_address) as channel:
        request = serving_pb2.PromoteAliasRequest(name=f"projects/{world.project}/aliases/m", request_id="r")
        credentials = (("authorization", f"Bearer {world.api_key}"),)
        promoted = await serving_pb2_grpc.ServingServiceStub(channel).PromoteAlias(request, metadata=credentials)
    assert (promoted.version, world.serving.requests) == ("v2", [("PromoteAlias", "r")])


async def _trained(world, client) -> str:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=await world.upload())
    inner = world.training.job(job.id)
    inner.state = job_pb2.JOB_STATE_SUCCEEDED
    prefix = f"projects/{world.project}/adapters/{job.id}-20/"
    inner.adapter.CopyFrom(job_pb2.ArtifactRef(prefix=prefix, manifest_sha256="a" * 64, kind="adapter", size_bytes=9))
    return job.id


def _caller_of(world, alias, version, *, weight=99, but_not=0) -> str:
    """A caller that the split between the version that serves and `version`, at `weight` percent, sends to `version`."""
    canary = world.serving.aliases[f"projects/{world.project}/aliases/{alias}"].canary.version or "v2"

    def goes(user, percent):
        targets = (RouteTarget(version="v1", weight=100 - percent), RouteTarget(version=canary, weight=percent))
        return chosen(targets, key=user).version == version

    return next(user for user in map(str, range(10_000)) if goes(user, weight) and not (but_not and goes(user, but_not)))


async def _gets(client, version, **fields) -> bool:
    return await _version(client, **fields) == version


async def _is_refused(client, **fields) -> bool:
    try:
        await _chat(client, **fields)
    except openai.InternalServerError:
        return True
    return False


def _metrics(world) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(world.gateway.proxy.reports)
    assert generate_latest(registry)
    return registry


def _shown(world) -> set[tuple[str, str]]:
    """Aliases and versions that a scrape shows."""
    return _samples(_metrics(world))


def _samples(collector) -> set[tuple[str, str]]:
    return {(sample.labels["alias"], sample.labels["version"]) for metric in collector.collect() for sample in metric.samples}


async def _shows(world, wanted) -> bool:
    return _shown(world) == wanted
