"""The agent over its restarts and vLLM's deaths, with a real store and database and a stand-in for vLLM's process."""

import asyncio
import os
import secrets
import signal
import time

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from finery_common.errors import FailedPreconditionError, NotFoundError, UnavailableError
from finery_common.rpc.server import RpcServer, token_authenticator
from finery_common.rpc.tokens import TokenSigner
from finery_serving import reconcile, vllm_client
from finery_serving.__main__ import tell_readiness
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.records import RolloutState
from finery_serving.staging import Staging

BASE = "base"


async def deploy(store, project, ref, alias="m"):
    return await store.deploy(project, alias, adapter=ref, base_model=BASE, served=(BASE,), request_id=secrets.token_hex(4))


async def until(here, project, alias, *states):
    async with asyncio.timeout(40):
        while True:
            seen = here.agent.changes.count
            found = await here.store.get(project, alias)
            if found.rollout.state in states:
                return found
            await here.agent.changes.wait_after(seen)


async def unloaded(here, version):
    async with asyncio.timeout(10):
        while version in here.residency.versions:
            await here.agent.changes.wait_after(here.agent.changes.count)


@pytest.mark.parametrize("reached", [RolloutState.PENDING, RolloutState.STAGING, RolloutState.LOADING, RolloutState.PROBING])
async def test_a_rollout_that_a_crash_cut_short_is_carried_out(running, agent_database, project, publish, reached):
    before = AliasStore(agent_database, changes=Changes())
    made = await deploy(before, project, publish())
    if reached != RolloutState.PENDING:
        await before.advance(made.rollout, reached)
    async with running() as here:
        assert (await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=30)).version == made.rollout.version
        assert (await until(here, project, "m", RolloutState.READY)).epoch == 1


async def test_a_flip_outlives_a_crash_and_its_version_is_loaded_again(running, agent_database, project, publish):
    before = AliasStore(agent_database, changes=Changes())
    made = await deploy(before, project, publish())
    await before.flip(made.rollout, epoch=made.epoch, swap_s=0.1)
    async with running() as here:
        assert (await until(here, project, "m", RolloutState.READY)).epoch == 1
        async with asyncio.timeout(30):
            while here.residency.versions != (made.rollout.version,):
                await here.agent.changes.wait_after(here.agent.changes.count)


async def test_rollouts_of_one_alias_go_in_order_and_the_last_stays(running, project, publish):
    async with running() as here:
        made = [await deploy(here.store, project, publish(step=step)) for step in (1, 2, 3)]
        await here.routes.resolve(project, model="m", after_epoch=2, timeout_s=30)
        last = await until(here, project, "m", RolloutState.READY)
        assert (last.version, last.epoch) == (made[2].rollout.version, 3)
        for earlier in made[:2]:
            await unloaded(here, earlier.rollout.version)


async def test_an_adapter_that_vllm_refuses_fails_without_its_path(running, project, publish, tmp_path):
    async with running() as here:
        await deploy(here.store, project, publish())
        good = await until(here, project, "m", RolloutState.READY)
        await deploy(here.store, project, publish("refuse"))
        failed = await until(here, project, "m", RolloutState.FAILED)
        assert (failed.version, failed.epoch) == (good.version, 1)
        assert failed.rollout.error is not None
        assert failed.rollout.error["code"] == "adapter_not_loadable"
        assert str(tmp_path) not in str(failed.rollout.error["message"])


async def test_an_adapter_that_kills_vllm_fails_in_the_end_and_the_old_one_comes_back(running, project, publish, monkeypatch):
    monkeypatch.setattr("finery_serving.rollout._MAX_ATTEMPTS", 2)
    async with running() as here:
        await deploy(here.store, project, publish())
        await until(here, project, "m", RolloutState.READY)
        await deploy(here.store, project, publish("die"))
        failed = await until(here, project, "m", RolloutState.FAILED)
        assert failed.rollout.error is not None
        assert failed.rollout.error["code"] == "unavailable"
        route = await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=30)
        assert route.version == failed.version


async def test_a_drain_waits_for_the_last_request_and_the_copy_goes_after_it(running, project, publish, tmp_path):
    old, new = publish(), publish()
    async with running() as here:
        await deploy(here.store, project, old)
        await until(here, project, "m", RolloutState.READY)
        route = await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=30)
        request = asyncio.create_task(ask(route, user="1.5"))
        async with asyncio.timeout(5):
            while not (await here.agent.client.state()).in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await deploy(here.store, project, new)
        await here.routes.resolve(project, model="m", after_epoch=route.epoch, timeout_s=30)
        assert not request.done()
        assert (tmp_path / "cache" / old.manifest_sha256).is_dir()
        await until(here, project, "m", RolloutState.READY)
        assert request.done()
        assert (await request).json()["model"] == "m"
        assert (await ask(route)).headers["x-finery-retired"] == "1"
        async with asyncio.timeout(10):
            while (tmp_path / "cache" / old.manifest_sha256).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (tmp_path / "cache" / new.manifest_sha256).is_dir()


async def test_a_removal_that_was_cut_short_does_not_keep_the_next_from_going(tmp_path, object_store, publish):
    staging = Staging(object_store, folder=tmp_path / "copies")
    folder = await staging.fetch(publish())
    for left in (folder.with_name(f".{folder.name}.removed"), folder.with_name(f".{'0' * 64}.removed")):
        left.mkdir()
        (left / "half").touch()
    await staging.sweep(keep=())
    assert [path for path in staging.folder.iterdir() if path.is_dir()] == []


async def test_a_version_under_two_aliases_stays_while_one_has_it(running, project, publish):
    ref = publish()
    async with running() as here:
        for alias in ("m", "n"):
            await deploy(here.store, project, ref, alias)
            await until(here, project, alias, RolloutState.READY)
        await here.store.delete(project, "m")
        route = await here.routes.resolve(project, model="n", after_epoch=0, timeout_s=30)
        assert (await ask(route, alias="n")).status_code == 200
        await here.store.delete(project, "n")
        await unloaded(here, route.version)


async def test_an_adapter_that_vllm_has_loaded_after_its_agent_gave_up_goes_again(running, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_client, "_LOAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(reconcile, "_INTERVAL_S", 0.1)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "slow").touch()
    async with running() as here:
        await here.routes.resolve("p", model=BASE, after_epoch=0, timeout_s=30)
        unload, unloaded = here.agent.client.unload, []

        async def noted(version, *, adapter_id):
            await unload(version, adapter_id=adapter_id)
            unloaded.append(version)

        monkeypatch.setattr(here.agent.client, "unload", noted)
        with pytest.raises(UnavailableError):
            await here.residency.ensure("late", path=tmp_path / "late", deadline_s=0.0)
        async with asyncio.timeout(10):
            while not unloaded:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (unloaded, (await here.agent.client.state()).adapters) == (["late"], {})


async def test_what_cannot_be_answered_in_time_says_why(running, project, publish):
    async with running() as here:
        with pytest.raises(UnavailableError, match="vLLM is starting") as caught:
            await here.routes.resolve(project, model=BASE, after_epoch=0, timeout_s=0.3)
        assert caught.value.retry_after_s
        await here.routes.resolve(project, model=BASE, after_epoch=0, timeout_s=30)
        with pytest.raises(NotFoundError):
            await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=30)
        await deploy(here.store, project, publish())
        await here.routes.resolve(project, model="m", after_epoch=0, timeout_s=30)
        started_s = time.monotonic()
        with pytest.raises(UnavailableError, match="being deployed"):
            await here.routes.resolve(project, model="m", after_epoch=1, timeout_s=0.5)
        assert time.monotonic() - started_s < 0.5


async def test_a_cold_version_whose_copy_and_artifact_are_gone_is_an_error_without_paths(running, object_store, project, publish, tmp_path):
    refs = [publish() for _ in range(2)]
    async with running(max_cpu_loras=1) as here:
        for alias, ref in zip("ab", refs, strict=True):
            await deploy(here.store, project, ref, alias)
            await until(here, project, alias, RolloutState.READY)
        (tmp_path / "cache" / refs[0].manifest_sha256).rename(tmp_path / "lost")
        object_store.delete(refs[0])
        with pytest.raises(FailedPreconditionError) as caught:
            await here.routes.resolve(project, model="a", after_epoch=0, timeout_s=30)
        assert str(tmp_path) not in caught.value.message
        assert (await here.routes.resolve(project, model="b", after_epoch=0, timeout_s=30)).epoch == 1


async def ask(route, *, alias="m", **fields):
    headers = {"x-finery-replica-token": route.targets[0].replicas[0][1], "x-finery-version": route.version, "x-finery-alias": alias}
    transport = httpx.AsyncHTTPTransport(uds=route.targets[0].replicas[0][0].removeprefix("unix://"))
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
        return await http.post("/v1/completions", json={"model": route.version, "max_tokens": 1, **fields}, headers=headers)


async def test_the_health_of_vllm_is_told_as_it_changes(running):
    server = RpcServer(address="127.0.0.1:0", servicers=[], authenticate=token_authenticator(TokenSigner("s" * 40)))
    port = await server.start()
    status = health_pb2.HealthCheckResponse
    async with running() as here, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        telling = asyncio.create_task(tell_readiness(server, here.agent))
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="vllm"), timeout=60))

        async def until_told(wanted: int) -> None:
            while (await anext(watch)).status != wanted:
                pass

        await until_told(status.SERVING)
        os.killpg(here.agent.process.pid, signal.SIGKILL)
        await until_told(status.NOT_SERVING)
        await until_told(status.SERVING)
        telling.cancel()
        await server.stop(drain_s=0)
