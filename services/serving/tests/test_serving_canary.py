"""Canaries from gRPC to a stand-in for vLLM's process: the split, promotion, rolling back, pins, and crashes in the middle of each."""

import asyncio

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client import REGISTRY

from finery.serving.v1 import serving_pb2
from finery_common.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.rpc.channel import stream
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.records import RolloutState
from finery_serving.releases import Releases
from finery_serving.vllm_client import VllmClient

STEP_S = 30.0


async def ask(route, version, *, alias="m", **fields):
    headers = {"x-finery-replica-token": route.targets[0].replicas[0].token, "x-finery-version": version, "x-finery-alias": alias}
    transport = httpx.AsyncHTTPTransport(uds=route.targets[0].replicas[0].address.removeprefix("unix://"))
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
        return await http.post("/v1/completions", json={"model": version, "max_tokens": 1, **fields}, headers=headers)


async def test_a_canary_is_reached_shown_and_promoted(serving, publish):
    async with serving() as client:
        old = await client.served(publish())
        assert await client.split() == [(old.version, 100)]
        alias = await client.with_canary(publish(step=2), weight=10)
        new = alias.canary.version
        assert (alias.version, alias.canary.weight, alias.rollout.canary_weight) == (old.version, 10, 10)
        assert (alias.canary.adapter.prefix.split("-")[-1], alias.canary.job_id) == ("2/", new.rsplit("-", 2)[0])
        assert await client.split() == [(old.version, 90), (new, 10)]
        route = await client.route()
        assert (route.version, route.epoch) == (old.version, alias.epoch)
        for version in (old.version, new):
            assert (await ask(route, version)).json()["model"] == "m"
        await client.loaded(old.version, new)
        await client.call("SetCanaryWeight", weight=40)
        assert await client.split() == [(old.version, 60), (new, 40)]

        promoted = await client.call("PromoteAlias", etag=(await client.call("GetAlias")).etag)
        assert (promoted.version, promoted.HasField("canary"), promoted.previous.version) == (new, False, old.version)
        assert await client.split() == [(new, 100)]
        assert (await client.until("READY")).version == new
        await client.loaded(new)
        assert (await ask(route, old.version)).headers["x-finery-retired"] == "1"


async def test_a_promotion_drains_what_served(serving, publish):
    async with serving() as client:
        old = await client.served(publish())
        await client.with_canary(publish())
        route = await client.route()
        request = asyncio.create_task(ask(route, old.version, user="1.5"))
        async with asyncio.timeout(5):
            while not (await client.here.agent.client.state()).in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await client.call("PromoteAlias")
        assert (await client.route(after_epoch=route.epoch)).version != old.version
        assert not request.done()
        assert old.version in client.here.residency.versions
        await client.until("READY")
        assert old.version not in client.here.residency.versions
        assert (await request).json()["model"] == "m"


@pytest.mark.parametrize("how", ["flipped", "promoted"])
async def test_nobody_hears_of_a_version_before_what_it_replaced_is_refused(serving, publish, monkeypatch, how):
    """With a vLLM that is slow to be told."""
    retire = VllmClient.retire

    async def retire_slowly(self, version):
        await asyncio.sleep(0.2)
        return await retire(self, version)

    async with serving() as client:
        before = (await client.served(publish())).version
        monkeypatch.setattr(VllmClient, "retire", retire_slowly)
        monkeypatch.setattr("finery_serving.residency._REFUSE_S", STEP_S)
        second = publish(step=2)
        if how == "promoted":
            await client.with_canary(second)
        watch = client.stub.WatchAliases(
            serving_pb2.WatchAliasesRequest(parent=f"projects/{client.project}"), metadata=client.metadata, timeout=STEP_S
        )
        events = aiter(stream(watch))
        assert (await anext(events)).alias.version == before
        await (client.call("PromoteAlias") if how == "promoted" else client.deploy(second))
        while (await anext(events)).alias.version == before:
            pass
        assert before not in (await client.here.agent.client.state()).admitted


async def test_a_route_looked_for_during_a_flip_does_not_let_the_old_version_in_again(serving, publish, monkeypatch):
    is_healthy, flips = VllmClient.is_healthy, []

    async def after_a_flip(self):
        monkeypatch.setattr(VllmClient, "is_healthy", is_healthy)
        flips.append(await client.served(second))
        return await is_healthy(self)

    async with serving() as client:
        before, second = (await client.served(publish())).version, publish(step=2)
        monkeypatch.setattr(VllmClient, "is_healthy", after_a_flip)
        found = (await client.route()).version
        assert found == flips[0].version != before
        assert before not in client.here.residency.versions


async def test_a_canary_that_is_rolled_back_finishes_what_it_began_and_is_unloaded(serving, publish):
    async with serving() as client:
        old = await client.served(publish())
        canary = (await client.with_canary(publish())).canary.version
        route = await client.route()
        request = asyncio.create_task(ask(route, canary, user="1.5"))
        async with asyncio.timeout(5):
            while not (await client.here.agent.client.state()).in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        after = await client.call("RollBackAlias")
        assert (after.version, after.HasField("canary")) == (old.version, False)
        assert after.rollout.state == serving_pb2.ROLLOUT_STATE_ROLLED_BACK
        assert await client.split() == [(old.version, 100)]
        assert (await request).json()["model"] == "m"
        await client.loaded(old.version)


async def test_rolling_back_without_a_canary_brings_the_version_before_back(serving, publish):
    async with serving() as client:
        first, second = publish(step=1), publish(step=2)
        old = await client.served(first)
        new = await client.served(second)
        await client.loaded(new.version)
        begun = await client.call("RollBackAlias", etag=new.etag)
        assert (begun.version, begun.rollout.version) == (new.version, old.version)
        with pytest.raises(AbortedError):
            await client.call("RollBackAlias", etag=new.etag)
        back = await client.until("READY")
        assert (back.version, back.adapter.prefix, back.previous.version) == (old.version, first.prefix, new.version)
        await client.loaded(old.version)


async def test_a_version_before_whose_adapter_is_gone_fails_and_what_serves_goes_on(serving, publish, object_store, tmp_path):
    async with serving() as client:
        first = publish()
        await client.served(first)
        new = await client.served(publish())
        await client.loaded(new.version)
        async with asyncio.timeout(STEP_S):
            # The sweep follows the unloading.
            while (tmp_path / "cache" / first.manifest_sha256).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        object_store.delete(first)
        await client.call("RollBackAlias")
        failed = await client.until("FAILED")
        assert (failed.version, failed.epoch) == (new.version, new.epoch)
        assert await client.split() == [(new.version, 100)]


async def test_what_cannot_be_done_to_a_canary_says_so_by_its_status(serving, publish):
    async with serving() as client:
        with pytest.raises(FailedPreconditionError, match="Nothing serves"):
            await client.deploy(publish(), weight=10)
        await client.served(publish())
        for weight in (0, 100):
            with pytest.raises(InvalidArgumentError, match="canary_weight"):
                await client.deploy(publish(), weight=weight)
        for method, fields in (("PromoteAlias", {}), ("SetCanaryWeight", {"weight": 5})):
            with pytest.raises(FailedPreconditionError, match="no canary"):
                await client.call(method, **fields)
            with pytest.raises(AbortedError):
                await client.call(method, etag="old", **fields)
        with pytest.raises(FailedPreconditionError, match="nothing to roll back to"):
            await client.call("RollBackAlias")
        for method in ("PromoteAlias", "RollBackAlias", "PinAlias", "UnpinAlias"):
            with pytest.raises(NotFoundError):
                await client.call(method, "other")


async def test_of_two_promotions_with_one_etag_one_wins_and_the_other_is_aborted(serving, publish):
    async with serving() as client:
        await client.served(publish())
        alias = await client.with_canary(publish())
        calls = [client.call("PromoteAlias", etag=alias.etag) for _ in range(2)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results if isinstance(result, BaseException)] == [AbortedError]
        cause = next(result for result in results if isinstance(result, BaseException)).__cause__
        assert isinstance(cause, grpc.aio.AioRpcError)
        assert cause.code() is grpc.StatusCode.ABORTED
        assert (await client.until("READY")).epoch == alias.epoch + 1


async def test_a_repeated_promotion_answers_the_same(serving, publish):
    async with serving() as client:
        await client.served(publish())
        await client.with_canary(publish())
        first = await client.call("PromoteAlias", request_id="once")
        again = await client.call("PromoteAlias", request_id="once")
        assert (again.version, again.epoch, again.etag) == (first.version, first.epoch, first.etag)


async def test_a_canary_outlives_a_crash(serving, publish):
    async with serving() as client:
        old = await client.served(publish())
        canary = (await client.with_canary(publish(), weight=30)).canary.version
    async with serving() as client:
        assert await client.split() == [(old.version, 70), (canary, 30)]
        await client.loaded(old.version, canary)
        alias = await client.call("GetAlias")
        assert alias.rollout.state == serving_pb2.ROLLOUT_STATE_CANARY
        await client.call("PromoteAlias", etag=alias.etag)
        await client.until("READY")
        await client.loaded(canary)


@pytest.mark.parametrize(("method", "fields"), [("promote", {}), ("roll_back", {"served": ("base",)})])
async def test_what_was_decided_while_the_agent_was_down_is_done_when_it_is_back(serving, publish, agent_database, project, method, fields):
    async with serving() as client:
        old = await client.served(publish())
        canary = (await client.with_canary(publish())).canary.version
        releases = Releases(agent_database, changes=client.here.agent.changes)
    await getattr(releases, method)(project, "m", request_id="r", **fields)
    async with serving() as client:
        wanted, state = (canary, "READY") if method == "promote" else (old.version, "ROLLED_BACK")
        assert (await client.until(state)).version == wanted
        assert await client.split() == [(wanted, 100)]
        await client.loaded(wanted)


async def test_a_promotion_whose_draining_a_crash_cut_short_is_done(serving, publish, agent_database, project):
    async with serving() as client:
        old = await client.served(publish())
        canary = (await client.with_canary(publish())).canary.version
        request = asyncio.create_task(ask(await client.route(), old.version, user="3"))
        async with asyncio.timeout(5):
            while not (await client.here.agent.client.state()).in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await client.call("PromoteAlias")
        await client.until("DRAINING")
    assert (await request).json()["model"] == "m"
    assert (await AliasStore(agent_database, changes=Changes()).get(project, "m")).rollout.state == RolloutState.DRAINING
    async with serving() as client:
        assert (await client.until("READY")).version == canary
        await client.loaded(canary)


async def test_a_roll_back_that_a_crash_cut_short_is_carried_out(serving, publish, agent_database, project):
    async with serving() as client:
        old = await client.served(publish())
        await client.served(publish())
        releases = Releases(agent_database, changes=client.here.agent.changes)
    await releases.roll_back(project, "m", served=("base",), request_id="r")
    async with serving() as client:
        assert (await client.until("READY")).version == old.version
        await client.loaded(old.version)


async def test_a_version_that_another_alias_serves_stays_whatever_becomes_of_the_canary(serving, publish):
    shared = publish()
    async with serving() as client:
        other = await client.served(shared, "n")
        old = await client.served(publish())
        await client.with_canary(shared)
        await client.call("RollBackAlias")
        await client.with_canary(shared)
        await client.call("PromoteAlias")
        await client.until("READY")
        await client.loaded(other.version)
        route = await client.route("n")
        assert (await ask(route, other.version, alias="n")).status_code == 200
        # And what served here is no longer held by anybody.
        assert (await ask(route, old.version)).status_code == 409


async def test_a_deploy_over_a_canary_drops_it_once_the_new_version_serves(serving, publish):
    async with serving() as client:
        old = await client.served(publish())
        first = (await client.with_canary(publish())).canary.version
        second = (await client.with_canary(publish(), weight=20)).canary.version
        assert await client.split() == [(old.version, 80), (second, 20)]
        await client.loaded(old.version, second)
        assert first != second
        await client.deploy(publish("refuse"))
        await client.until("FAILED")
        assert await client.split() == [(old.version, 80), (second, 20)]
        await client.deploy(publish())
        new = await client.until("READY")
        assert await client.split() == [(new.version, 100)]
        await client.loaded(new.version)


async def test_a_canary_that_cannot_be_loaded_keeps_nobody_from_an_answer(serving, publish, object_store, tmp_path):
    lost = publish()
    async with serving() as client:
        old = await client.served(publish())
        await client.with_canary(lost)
    (tmp_path / "cache" / lost.manifest_sha256).rename(tmp_path / "lost")
    object_store.delete(lost)
    async with serving() as client:
        assert await client.split() == [(old.version, 100)]
        assert (await client.call("GetAlias")).canary.weight == 10


async def test_a_canary_needs_room_for_two(serving, publish):
    async with serving(max_cpu_loras=1) as client:
        await client.served(publish())
        with pytest.raises(FailedPreconditionError, match="FINERY_MAX_CPU_LORAS"):
            await client.deploy(publish(), weight=10)
        with pytest.raises(FailedPreconditionError, match="FINERY_MAX_CPU_LORAS"):
            await client.call("PinAlias")


async def test_a_pinned_alias_never_makes_room_and_is_loaded_again_first(serving, publish):
    async with serving(max_cpu_loras=2) as client:
        versions = {alias: (await client.served(publish(), alias)).version for alias in ("a", "b", "c")}
        # It had to make room, and is loaded again for its pin.
        assert versions["a"] not in client.here.residency.versions
        assert (await client.call("PinAlias", "a")).pinned
        await client.loaded(versions["a"], versions["c"])
        with pytest.raises(FailedPreconditionError, match="1 aliases are, of 1 at the most"):
            await client.call("PinAlias", "b")
        for alias in "bcb":
            await client.route(alias)
            assert set(client.here.residency.versions) == {versions["a"], versions[alias]}
    async with serving(max_cpu_loras=2) as client:
        await client.loaded(versions["a"], versions["c"])
        assert not (await client.call("UnpinAlias", "a")).pinned
        await client.route("c")
        await client.route("b")
        assert versions["a"] not in client.here.residency.versions


async def test_a_pin_follows_the_alias_to_its_next_version(serving, publish):
    async with serving(max_cpu_loras=2) as client:
        await client.served(publish())
        await client.call("PinAlias")
        new = await client.served(publish())
        assert new.pinned
        for alias in ("a", "b"):
            await client.served(publish(), alias)
            assert new.version in client.here.residency.versions


async def test_outcomes_are_counted_and_versions_have_their_states(serving, publish):
    def total(outcome):
        return REGISTRY.get_sample_value("finery_serving_swaps_total", {"outcome": outcome}) or 0

    before = {outcome: total(outcome) for outcome in ("canary", "promoted", "rolled_back", "failed")}
    async with serving() as client:
        await client.served(publish())
        canary = (await client.with_canary(publish())).canary
        await client.loaded((await client.route()).version, canary.version)
        labels = {"adapter": "m", "version": canary.version, "replica": client.here.agent.process.runtime.replica_id}
        async with asyncio.timeout(STEP_S):
            while REGISTRY.get_sample_value("finery_serving_adapter_state", labels) != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await client.call("PromoteAlias")
        await client.until("READY")
        await client.with_canary(publish())
        await client.call("RollBackAlias")
    after = {outcome: total(outcome) for outcome in before}
    assert {outcome: after[outcome] - before[outcome] for outcome in before} == {
        "canary": 2, "promoted": 1, "rolled_back": 1, "failed": 0,
    }  # fmt: skip
