"""Agents of several base models over one database: each works for its own pool, and any of them answers for all."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest

from finery.serving.v1 import serving_pb2
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from finery_common.rpc.channel import stream
from finery_serving import deployments, registry
from finery_serving.preflight import BaseModel
from finery_serving.registry import Replica, pool_of

STEP_S = 40.0
OTHER = BaseModel("other-base", "c" * 64, {"model.q_proj.weight": (4, 4)})
THIRD = replace(OTHER, name="third-base")


async def bases(client):
    answer = await client.stub.ListDeployments(serving_pb2.ListDeploymentsRequest(), metadata=client.metadata)
    return {item.base_model: item for item in answer.deployments}


def held(client):
    return set(client.here.residency.versions)


async def until(holds):
    async with asyncio.timeout(STEP_S):
        while not holds():  # noqa: ASYNC110 - the agents signal each on its own
            await asyncio.sleep(0.05)


def know_each_other(clients):
    return all(len([replica for replica in client.here.registry.live if replica.is_ready]) == len(clients) for client in clients)


@pytest.fixture
async def both(serving):
    """An agent of each of two base models, which know of each other."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(serving(name="a")),
            await stack.enter_async_context(serving(name="b", base=OTHER, max_model_len=256)),
        ]
        await until(lambda: know_each_other(clients))
        yield clients


async def ask(route, alias):
    [replica] = route.targets[0].replicas
    headers = {"x-finery-replica-token": replica.token, "x-finery-version": route.version, "x-finery-alias": alias}
    transport = httpx.AsyncHTTPTransport(uds=replica.address.removeprefix("unix://"))
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm", headers=headers) as http:
        return (await http.post("/v1/completions", json={"model": route.version, "prompt": "x", "max_tokens": 1})).status_code


async def test_an_adapter_is_loaded_by_its_own_pool_and_found_by_every_agent(both, publish):
    base, other = both
    # Each told to the agent of the other base model.
    await base.deploy(publish(base=OTHER), "m-other")
    await other.deploy(publish(), "m-base")
    versions = [(await client.until("READY", alias)).version for client, alias in ((other, "m-base"), (base, "m-other"))]
    assert [held(client) for client in both] == [{versions[0]}, {versions[1]}]
    assert [client.here.registry.leads for client in both] == [True, True]
    for client in both:
        for alias, served_by, length in (("m-base", base, 128), ("m-other", other, 256)):
            route = await client.route(alias)
            name, runtime = served_by.here.registry.base_model, served_by.here.agent.process.runtime
            assert (route.base_model, route.max_model_len) == (name, length)
            assert [replica.address for replica in route.targets[0].replicas] == [runtime.endpoint.address]
            assert await ask(route, alias) == 200
        for name in ("base", "other-base"):
            assert await ask(await client.route(name), name) == 200
        found = await bases(client)
        assert {name: (item.base_model_sha256[0], item.max_model_len, len(item.replicas)) for name, item in found.items()} == {
            "base": ("b", 128, 1),
            "other-base": ("c", 256, 1),
        }
        assert [list(item.replicas[0].loaded_versions) for item in found.values()] == [[version] for version in versions]


async def test_every_agent_watches_the_aliases_of_all(both, project, publish):
    base, other = both
    await base.served(publish(), "m-base")
    await other.served(publish(base=OTHER), "m-other")
    request = serving_pb2.WatchAliasesRequest(parent=f"projects/{project}")
    for client in both:
        seen = {}
        async for event in stream(client.stub.WatchAliases(request, metadata=client.metadata, timeout=STEP_S)):
            seen[event.alias.alias] = event.alias.base_model
            if len(seen) == 2:
                break
        assert seen == {"m-base": "base", "m-other": "other-base"}


async def test_an_adapter_of_a_base_model_that_nobody_serves_is_refused(both, publish):
    for client in both:
        with pytest.raises(FailedPreconditionError, match="'third-base', which is not served here; served are: base, other-base") as caught:
            await client.deploy(publish(base=THIRD), "m")
        assert caught.value.code == "base_model_not_served"
        with pytest.raises(NotFoundError):
            await client.call("GetAlias", "m")
        for name in ("base", "other-base"):
            with pytest.raises(InvalidArgumentError, match="base model's own name"):
                await client.deploy(publish(), name)


async def test_the_end_of_one_pool_leaves_the_other_alone(serving, publish, monkeypatch):
    async with serving(name="b", base=OTHER) as other:
        async with serving(name="a") as base:
            await until(lambda: know_each_other([base, other]))
            await base.served(publish(), "m-base")
            await other.served(publish(base=OTHER), "m-other")
        await until(lambda: len(other.here.registry.live) == 1)
        assert await ask(await other.route("m-other"), "m-other") == 200
        for model in ("m-base", "base"):
            with pytest.raises(UnavailableError, match="vLLM is starting"):
                await other.route(model, timeout_s=1.0)
        # It may only be starting anew: the request is kept for it.
        assert [len(item.replicas) for item in (await bases(other)).values()] == [0, 1]
        queued = await other.deploy(publish(), "m-later")
        assert queued.base_model == "base"
        async with serving(name="c") as again:
            assert (await again.until("READY", "m-later")).version in held(again)
            assert await ask(await other.route("m-base"), "m-base") == 200
        monkeypatch.setattr(registry, "_REMEMBERED_S", 0.0)
        await until(lambda: list(other.here.registry.pools) == ["other-base"])
        with pytest.raises(FailedPreconditionError, match="served are: other-base"):
            await other.deploy(publish(), "m-base")
        with pytest.raises(UnavailableError, match="No vLLM serves base, its base model"):
            await other.route("m-base", timeout_s=1.0)


async def test_a_rollout_that_no_pool_is_left_for_fails_and_lets_the_next_one_of_its_alias_through(serving, publish, monkeypatch):
    async with serving(name="b", base=OTHER) as other:
        async with serving(name="a") as base:
            await until(lambda: know_each_other([base, other]))
        await until(lambda: len(other.here.registry.live) == 1)
        await other.deploy(publish(), "m")
        monkeypatch.setattr(registry, "_REMEMBERED_S", 0.0)
        failed = await other.until("FAILED", "m")
        assert failed.rollout.error.code == "base_model_not_served"
        assert (await other.served(publish(base=OTHER), "m")).base_model == "other-base"


async def test_an_agent_that_starts_after_the_last_of_a_base_model_has_left_knows_of_that_base_model(serving, publish):
    async with serving(name="b", base=OTHER) as other:
        async with serving(name="a") as base:
            await until(lambda: know_each_other([base, other]))
        await until(lambda: len(other.here.registry.live) == 1)
    async with serving(name="c", base=OTHER) as again:
        await until(lambda: "base" in again.here.registry.pools)
        with pytest.raises(UnavailableError, match="vLLM is starting"):
            await again.route("base", timeout_s=1.0)
        with pytest.raises(InvalidArgumentError, match="base model's own name"):
            await again.deploy(publish(base=OTHER), "base")
        assert (await again.deploy(publish(), "m")).base_model == "base"


async def test_a_cold_version_is_loaded_by_its_own_pool_whoever_is_asked(serving, publish):
    async with serving(name="a", max_cpu_loras=1) as base, serving(name="b", base=OTHER) as other:
        await until(lambda: know_each_other([base, other]))
        aliases = ["m0", "m1", "m2"]
        for alias in aliases:
            await base.served(publish(), alias)
        # What one agent sees of another's replica is a moment old; a request that is refused by it asks again.
        await until(lambda: [set(replica.versions) for replica in other.here.registry.ready_of("base")] == [held(base)])
        for alias in aliases:
            assert await ask(await other.route(alias), alias) == 200
        assert (len(held(base)), held(other)) == (1, set())


async def test_an_alias_moves_to_another_base_model_and_back(both, publish):
    base, other = both
    old = await base.served(publish(), "m")
    assert (await base.call("PinAlias", "m")).pinned
    await base.deploy(publish(base=OTHER), "m")
    new = await base.until("READY", "m")
    assert (new.base_model, new.previous.version, new.epoch, new.pinned) == ("other-base", old.version, 2, False)
    assert [held(client) for client in both] == [set(), {new.version}]
    assert await ask(await base.route("m"), "m") == 200
    await other.call("RollBackAlias")
    back = await other.until("READY", "m")
    assert (back.base_model, back.version, back.previous.version) == ("base", old.version, new.version)
    assert [held(client) for client in both] == [{old.version}, set()]


async def test_what_an_alias_left_behind_stays_where_another_alias_has_it(both, publish):
    base, other = both
    ref = publish()
    old = await base.served(ref, "m")
    await base.served(ref, "n")
    await other.served(publish(base=OTHER), "m")
    assert held(base) == {old.version}
    assert await ask(await other.route("n"), "n") == 200


async def test_rollouts_of_one_alias_go_in_order_over_pools(both, publish):
    base, other = both
    for client, of in ((base, {}), (other, {"base": OTHER}), (base, {}), (other, {"base": OTHER})):
        last = await client.deploy(publish(**of), "m")
    done = await base.until("READY", "m")
    assert (done.epoch, done.version, done.base_model) == (4, last.rollout.version, "other-base")
    await until(lambda: [held(client) for client in both] == [set(), {done.version}])


async def test_a_canary_is_of_the_base_model_that_serves(both, publish):
    base, other = both
    await base.served(publish(), "m")
    for client in both:
        with pytest.raises(FailedPreconditionError, match="trained on 'other-base', but what serves m on 'base'"):
            await client.deploy(publish(base=OTHER), "m", weight=10)
    await other.deploy(publish(), "m", weight=10)
    assert [target.weight for target in (await other.route("m")).targets] == [100]
    canary = (await other.until("CANARY", "m")).canary
    assert {target.version for target in (await other.route("m")).targets} == {canary.version, (await base.call("GetAlias", "m")).version}


async def test_pins_are_counted_for_each_base_model(serving, publish):
    async with serving(name="a", max_cpu_loras=2) as base, serving(name="b", base=OTHER, max_cpu_loras=3) as other:
        await until(lambda: know_each_other([base, other]))
        for number in range(3):
            await base.served(publish(), f"base-{number}")
            await other.served(publish(base=OTHER), f"other-{number}")
        assert (await other.call("PinAlias", "base-0")).pinned
        for alias in ("other-0", "other-1"):
            assert (await base.call("PinAlias", alias)).pinned
        with pytest.raises(FailedPreconditionError, match="1 aliases are, of 1 at the most"):
            await other.call("PinAlias", "base-1")
        with pytest.raises(FailedPreconditionError, match="2 aliases are, of 2 at the most"):
            await base.call("PinAlias", "other-2")


async def test_a_store_that_does_not_answer_is_waited_for_where_one_base_model_is_served(serving, publish, monkeypatch):
    monkeypatch.setattr(deployments, "_MANIFEST_WAIT_S", 0.3)

    async def silent(_):
        await asyncio.Event().wait()

    async with serving(name="a") as base:
        manifest, base.here.deployments._staging.manifest = base.here.deployments._staging.manifest, silent
        await base.deploy(publish(), "m")
        base.here.deployments._staging.manifest = manifest
        assert (await base.until("READY", "m")).version
        async with serving(name="b", base=OTHER) as other:
            await until(lambda: know_each_other([base, other]))
            other.here.deployments._staging.manifest = silent
            with pytest.raises(UnavailableError, match="the object store does not answer"):
                await other.deploy(publish(), "n")


def test_a_pool_keeps_to_what_each_of_its_replicas_can():
    small = Replica("a", "", "base", "b" * 64, max_lora_rank=16, max_model_len=4096, max_resident=2)
    large = Replica("b", "", "base", "b" * 64, max_lora_rank=64, max_model_len=2048, max_resident=8)
    # As an agent of an earlier release tells of itself.
    old = Replica("c", "", "base", max_resident=4)
    pool = pool_of([old, small, large], live=[old])
    assert (pool.max_lora_rank, pool.max_model_len, pool.max_resident, pool.live) == (16, 2048, 2, (old,))
    assert pool.base_model_sha256 == "b" * 64


def test_one_place_stays_free_of_pins_and_a_canary_needs_two():
    one, two = (pool_of([Replica("a", "", "base", max_resident=number)], live=()) for number in (1, 2))
    assert (one.max_pins, two.max_pins) == (0, 1)
    with pytest.raises(FailedPreconditionError, match="FINERY_MAX_CPU_LORAS"):
        one.check_canary()
    two.check_canary()
