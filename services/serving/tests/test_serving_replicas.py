"""Several agents over one database, each with a stand-in for vLLM's process: what one is told, all do."""

import asyncio
import secrets
from contextlib import AsyncExitStack
from types import SimpleNamespace

import httpx
import pytest

from finery_common.errors import UnavailableError
from finery_serving import registry
from finery_serving.records import RolloutState

STEP_S = 40.0


@pytest.fixture
async def two(running):
    """Two agents whose vLLMs answer and who know of each other."""
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(running(name=name)) for name in ("a", "b")]
        await until(agents, lambda: all(len(here.registry.ready) == 2 for here in agents))
        yield agents


async def until(agents, holds):
    async with asyncio.timeout(STEP_S):
        while not holds():  # noqa: ASYNC110 - the agents signal each on its own
            await asyncio.sleep(0.05)


async def deploy(here, project, ref, alias="m", **options):
    return await here.store.deploy(
        project, alias, adapter=ref, base_model="base", served=("base",), request_id=secrets.token_hex(4), **options
    )


async def ended(here, project, alias="m", *, state=RolloutState.READY):
    async with asyncio.timeout(STEP_S):
        while True:
            found = await here.store.get(project, alias)
            if found.rollout.state == state:
                return found
            await asyncio.sleep(0.05)


def held(agents):
    return [set(here.residency.versions) for here in agents]


async def answers(address, token, version, **fields):
    transport = httpx.AsyncHTTPTransport(uds=address.removeprefix("unix://"))
    headers = {"x-finery-replica-token": token, "x-finery-version": version, "x-finery-alias": "m"}
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm", headers=headers) as client:
        return (await client.post("/v1/completions", json={"model": version, "prompt": "x", "max_tokens": 1, **fields})).status_code


async def test_a_version_is_on_every_replica_before_its_alias_flips_and_the_old_one_leaves_them_all(two, project, publish):
    await deploy(two[0], project, publish())
    first = await ended(two[1], project)
    assert held(two) == [{first.version}, {first.version}]
    # Told to the other agent.
    await deploy(two[1], project, publish(step=2))
    second = await ended(two[0], project)
    assert held(two) == [{second.version}, {second.version}]
    for here in two:
        route = await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=STEP_S)
        [target] = route.targets
        assert (target.version, len(target.replicas)) == (second.version, 2)
        assert [await answers(address, token, second.version) for address, token in target.replicas] == [200, 200]


async def test_a_version_that_one_replica_cannot_load_fails_and_the_old_one_serves_on_both(two, project, publish):
    await deploy(two[0], project, publish())
    good = await ended(two[0], project)
    # The copies of one agent alone are damaged, as by a disk.
    fetch = two[1].routes._staging.fetch

    async def damaged(adapter):
        path = await fetch(adapter)
        if adapter.manifest_sha256 == bad.manifest_sha256:
            (path / "refuse").touch()
        return path

    two[1].routes._staging.fetch = damaged
    bad = publish(step=2)
    await deploy(two[0], project, bad)
    failed = await ended(two[0], project, state=RolloutState.FAILED)
    assert (failed.version, failed.rollout.error["code"]) == (good.version, "adapter_not_loadable")
    await until(two, lambda: held(two) == [{good.version}, {good.version}])


async def test_a_base_model_is_served_by_every_replica_and_a_dead_one_by_none(running, project):
    async with running(name="a") as here:
        async with running(name="b") as there:
            await until([], lambda: len(here.registry.ready) == len(there.registry.ready) == 2)
            assert len((await here.routes.resolve(project, model="base", after_epoch=0, timeout_s=5)).targets[0].replicas) == 2
        # It has taken its row out.
        await until([], lambda: len(here.registry.live) == 1)
        assert len((await here.routes.resolve(project, model="base", after_epoch=0, timeout_s=5)).targets[0].replicas) == 1


def failing_twice(owner, name, monkeypatch):
    work, failures = getattr(owner, name), iter(("first", "second"))

    async def broken():
        if failure := next(failures, None):
            raise RuntimeError(failure)
        return await work()

    monkeypatch.setattr(owner, name, broken)


async def test_an_agent_goes_on_after_what_nobody_expected(running, project, publish, monkeypatch):
    async with running(name="a") as here:
        failing_twice(here.registry, "_look", monkeypatch)
        failing_twice(here.store, "snapshot", monkeypatch)
        await deploy(here, project, publish())
        await ended(here, project)


async def test_an_agent_whose_row_cannot_be_taken_out_ends_in_order(running, monkeypatch):
    async with running(name="a") as here:

        async def fail(*_):
            raise RuntimeError("as nobody expected")

        monkeypatch.setattr(here.registry, "_write", fail)


async def test_an_agent_that_cannot_look_knows_of_no_others_death(two, monkeypatch):
    monkeypatch.setattr(registry, "HEALTH_INTERVAL_S", 1.0)

    async def fail():
        raise UnavailableError("The database cannot be reached.")

    monkeypatch.setattr(two[0].registry, "_look", fail)
    await asyncio.sleep(2.5)
    assert len(two[0].registry.live) == 2


async def test_an_agent_that_can_look_again_gives_the_others_time_to_tell_of_themselves(two, monkeypatch):
    monkeypatch.setattr(registry, "HEALTH_INTERVAL_S", 1.5)
    monkeypatch.setattr(registry, "_FORGOTTEN_S", 2.0)
    here, there = (item.registry for item in two)
    look, lived = here._look, []

    async def fail():
        raise UnavailableError("The database cannot be reached.")

    async def look_and_count():
        await look()
        lived.append((len(here.live), len(here._others)))

    monkeypatch.setattr(here, "_look", fail)
    monkeypatch.setattr(there, "_tell", fail)
    await asyncio.sleep(3)
    monkeypatch.setattr(here, "_look", look_and_count)
    await until(two, lambda: lived)
    assert lived[0] == (2, 1)
    # This one never does.
    await until(two, lambda: len(here.live) == 1 and not here._others)


async def test_an_agent_whose_vllm_hangs_tells_of_itself_and_looks_all_the_same(two, monkeypatch):
    monkeypatch.setattr(registry, "HEALTH_INTERVAL_S", 3.0)

    async def hang():
        await asyncio.Event().wait()

    monkeypatch.setattr(two[0].registry, "_client", SimpleNamespace(state=hang))
    two[0].registry._count_after_s = 0.0
    await asyncio.sleep(5)
    assert [len(here.registry.live) for here in two] == [2, 2]


async def test_a_replica_whose_agent_gives_no_sign_is_left_out_and_another_takes_the_lead(two, project, publish, monkeypatch):
    monkeypatch.setattr(registry, "HEALTH_INTERVAL_S", 1.0)
    leader, other = sorted(two, key=lambda here: here.registry.own.id)
    assert (leader.registry.leads, other.registry.leads) == (True, False)

    async def silence():
        await asyncio.Event().wait()

    # Its agent hangs: no beat, no look at the database, no work.
    monkeypatch.setattr(leader.registry, "_tell", silence)
    await until(two, lambda: other.registry.leads)
    await deploy(other, project, publish())
    assert (await ended(other, project)).version in other.residency.versions


async def test_a_replica_that_falls_silent_is_a_change_for_the_others(two, monkeypatch):
    monkeypatch.setattr(registry, "HEALTH_INTERVAL_S", 1.0)
    here, there = two
    notify, told = here.agent.changes.notify, []

    def recorded():
        told.append(len(here.registry.live))
        notify()

    async def silence():
        await asyncio.Event().wait()

    monkeypatch.setattr(here.agent.changes, "notify", recorded)
    monkeypatch.setattr(there.registry, "_tell", silence)
    await until(two, lambda: 1 in told)


async def test_the_row_of_a_killed_agent_is_not_believed_and_goes(running, agent_database, monkeypatch):
    monkeypatch.setattr(registry, "_FORGOTTEN_S", 1.5)
    async with running(name="a") as here:
        row = registry.ReplicaRow(
            id="replica-0",
            base_model="base",
            address="unix:///gone",
            beat=7,
            state={"id": "replica-0", "address": "unix:///gone", "is_ready": True},
        )
        async with agent_database.begin() as session:
            session.add(row)
        await until([], lambda: "replica-0" in here.registry._others)
        assert [replica.id for replica in here.registry.live] == [here.registry.own.id]
        await until([], lambda: "replica-0" not in here.registry._others)


async def test_a_cold_version_is_loaded_by_the_replica_that_its_alias_prefers_whoever_is_asked(running, project, publish):
    async with AsyncExitStack() as stack:
        two = [await stack.enter_async_context(running(name=name, max_cpu_loras=1)) for name in ("a", "b")]
        await until(two, lambda: all(len(here.registry.ready) == 2 for here in two))
        refs = {f"m{number}": publish() for number in range(5)}
        for alias, ref in refs.items():
            await deploy(two[0], project, ref, alias)
            await ended(two[0], project, alias)
        for alias in refs:
            for here in two:
                route = await here.routes.resolve(project, model=alias, after_epoch=0, timeout_s=STEP_S)
                address, token = route.targets[0].replicas[0]
                assert await answers(address, token, route.version) == 200
        assert [len(versions) for versions in held(two)] == [1, 1]


async def test_what_is_pinned_elsewhere_stays_and_a_restarted_vllm_loads_its_share_again(two, project, publish):
    await deploy(two[0], project, publish())
    served = await ended(two[0], project)
    two[1].agent.process._process.kill()
    await until(two, lambda: len(two[0].registry.ready) == 1)
    route = await two[1].routes.resolve(project, model="m", after_epoch=0, timeout_s=STEP_S)
    assert [address for address, _ in route.targets[0].replicas] == [two[0].registry.own.address]
    await until(two, lambda: held(two) == [{served.version}, {served.version}])


async def test_a_replica_that_is_to_end_leaves_every_route_and_answers_what_it_has(two, project, publish):
    a, b = two
    await deploy(a, project, publish())
    version = (await ended(a, project)).version
    of_a, of_b = (here.agent.process.runtime for here in two)
    request = asyncio.create_task(answers(of_a.endpoint.address, of_a.replica_token, version, user="2"))
    async with asyncio.timeout(STEP_S):
        while not (await a.agent.client.state()).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await a.agent.drain(a.registry, timeout_s=STEP_S)
    assert request.done()
    assert await request == 200
    await until([b], lambda: [replica.id for replica in b.registry.ready] == [of_b.replica_id])
    assert a.agent.process.pid is not None

    late = asyncio.create_task(answers(of_b.endpoint.address, of_b.replica_token, version, user="30"))
    async with asyncio.timeout(STEP_S):
        while not (await b.agent.client.state()).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await b.agent.drain(b.registry, timeout_s=0.6)
    assert not late.done()
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


async def drained_under_way(here, address, token, **fields):
    """A drain that has begun, and a request in flight that it waits for."""
    request = asyncio.create_task(answers(address, token, "base", **fields))
    async with asyncio.timeout(STEP_S):
        while not (await here.agent.client.state()).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return asyncio.create_task(here.agent.drain(here.registry, timeout_s=STEP_S)), request


async def test_a_replica_that_is_to_end_refuses_whoever_comes_by_an_old_route(two, project):
    a, b = two
    [target] = (await b.routes.resolve(project, model="base", after_epoch=0, timeout_s=STEP_S)).targets
    runtime = a.agent.process.runtime
    old = (runtime.endpoint.address, runtime.replica_token)
    assert old in target.replicas
    draining, request = await drained_under_way(a, *old, user="3")
    async with asyncio.timeout(STEP_S):
        while (status := await answers(*old, "base")) == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert status == 409
    [target] = (await b.routes.resolve(project, model="base", after_epoch=0, timeout_s=STEP_S)).targets
    assert old not in target.replicas
    assert await request == 200
    await draining


async def test_a_replica_whose_row_cannot_say_that_it_is_to_end_answers_until_it_does(two, monkeypatch):
    """Whoever is refused would be sent there again."""
    a = two[0]
    runtime = a.agent.process.runtime
    told = asyncio.Event()
    write = a.registry._write

    async def write_late(own):
        await told.wait()
        await write(own)

    monkeypatch.setattr(a.registry, "_write", write_late)
    old = (runtime.endpoint.address, runtime.replica_token)
    draining, request = await drained_under_way(a, *old, user="4")
    await asyncio.sleep(1.2)
    assert await answers(*old, "base") == 200
    told.set()
    async with asyncio.timeout(STEP_S):
        while await answers(*old, "base") == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await request == 200
    await draining


@pytest.mark.parametrize("error", [UnavailableError("vLLM did not answer"), RuntimeError("as nobody expected")])
async def test_a_replica_drains_though_its_vllm_cannot_be_told(running, monkeypatch, error):
    async with running(name="a") as here:
        await until([here], lambda: here.registry.ready)
        runtime = here.agent.process.runtime
        state, failures = here.agent.client.state, iter([error])

        async def fail():
            raise error

        async def fail_once():
            if failure := next(failures, None):
                raise failure
            return await state()

        monkeypatch.setattr(here.agent.client, "drain", fail)
        draining, request = await drained_under_way(here, runtime.endpoint.address, runtime.replica_token, user="2")
        if isinstance(error, RuntimeError):
            monkeypatch.setattr(here.agent.client, "state", fail_once)
        await draining
        assert await request == 200
