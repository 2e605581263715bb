"""Canaries, promotion, rolling back and pins in the database, on SQLite and PostgreSQL: each once, and of two at once one wins."""

import asyncio
import secrets
from functools import partial

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.migrations.versions import __name__ as migrations
from finery_serving.records import RolloutState
from finery_serving.releases import Releases

BASE = "SmolLM2"


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
async def store(database: Database, changes: Changes) -> AliasStore:
    await database.migrate("finery_serving.migrations", version_table="serving_version")
    return AliasStore(database, changes=changes)


@pytest.fixture
def releases(database: Database, changes: Changes) -> Releases:
    return Releases(database, changes=changes)


def adapter(step: int, *, project: str = "alpha") -> ArtifactRef:
    return ArtifactRef(prefix=f"projects/{project}/adapters/ftjob-1-{step}/", manifest_sha256="a" * 64, kind="adapter", size_bytes=10)


def version(step: int) -> str:
    return f"ftjob-1-{step}-aaaaaaaa"


async def deploy(store, step, *, alias="m", weight=None, etag="", project="alpha"):
    request_id = secrets.token_hex(8)
    return await store.deploy(
        project,
        alias,
        adapter=adapter(step, project=project),
        base_model=BASE,
        served=(BASE,),
        request_id=request_id,
        etag=etag,
        canary_weight=weight,
    )


async def serving(store, step, *, alias="m"):
    """Rolls `step` out as the whole alias."""
    made = await deploy(store, step, alias=alias)
    await store.flip(made.rollout, epoch=made.epoch, swap_s=0.1)
    await store.finish((await store.get("alpha", alias)).rollout)
    return await store.get("alpha", alias)


async def canary(store, step, *, weight=10):
    made = await deploy(store, step, weight=weight)
    await store.start_canary(made.rollout, epoch=made.epoch, swap_s=0.1)
    return await store.get("alpha", "m")


def promote(releases, *, request_id="p", etag="", project="alpha"):
    return releases.promote(project, "m", request_id=request_id, etag=etag)


def roll_back(releases, *, request_id="b", etag="", project="alpha"):
    return releases.roll_back(project, "m", served=(BASE,), request_id=request_id, etag=etag)


async def at_once(releases, first, second, *, have_etags=False):
    """Results of two calls: neither has begun to write before the other has read."""
    read, met = releases._etag, asyncio.Barrier(2)

    async def read_and_meet(project, alias):
        etag = await read(project, alias)
        await met.wait()
        return etag

    if not have_etags:
        releases._etag = read_and_meet
    return await asyncio.gather(first, second, return_exceptions=True)


async def both(releases, first, second, *, have_etags=False):
    """The winner's alias of two calls that come at once, the other of which is aborted."""
    results = await at_once(releases, first, second, have_etags=have_etags)
    won = [result for result in results if not isinstance(result, BaseException)]
    assert [type(result) for result in results if isinstance(result, BaseException)] == [AbortedError]
    return won[0]


async def test_a_canary_serves_beside_the_version_and_flips_nothing(store):
    before = await serving(store, 1)
    after = await canary(store, 2, weight=25)
    assert (after.version, after.canary.version, after.canary_weight) == (version(1), version(2), 25)
    assert [served.adapter for served in after.serving] == [adapter(1), adapter(2)]
    assert (after.epoch, after.etag != before.etag) == (before.epoch + 1, True)
    assert (after.rollout.state, after.rollout.canary_weight, after.rollout.swap_s) == (RolloutState.CANARY, 25, 0.1)
    assert (await store.snapshot()).rollouts == ()
    assert (await store.snapshot()).desired == (after,)


async def test_a_canary_beside_nothing_or_itself_is_refused_at_once(store):
    with pytest.raises(FailedPreconditionError, match="Nothing serves"):
        await deploy(store, 1, weight=10)
    assert (await store.list("alpha"))[0] == ()
    await serving(store, 1)
    with pytest.raises(FailedPreconditionError, match="another version"):
        await deploy(store, 1, weight=10)


async def test_a_canary_may_follow_a_first_rollout_that_is_under_way_and_fails_where_that_fails(store):
    first = await deploy(store, 1)
    second = await deploy(store, 2, weight=10)
    await store.finish(first.rollout, error={"code": "x", "message": "no"})
    with pytest.raises(FailedPreconditionError, match="Nothing serves"):
        await store.start_canary(second.rollout, epoch=second.epoch, swap_s=0.1)


@pytest.mark.parametrize("weight", [-1, 0, 100])
async def test_a_weight_that_is_no_share_is_refused(store, releases, weight):
    await serving(store, 1)
    with pytest.raises(InvalidArgumentError, match="1 to 99"):
        await deploy(store, 2, weight=weight)
    await canary(store, 2)
    with pytest.raises(InvalidArgumentError, match="1 to 99"):
        await releases.set_weight("alpha", "m", weight=weight)


async def test_the_weight_is_part_of_the_request(store):
    await serving(store, 1)
    ask = partial(store.deploy, "alpha", "m", adapter=adapter(2), base_model=BASE, served=(BASE,), request_id="r")
    first = await ask(canary_weight=10)
    assert (await ask(canary_weight=10)).rollout.number == first.rollout.number
    for other in (20, None):
        with pytest.raises(AlreadyExistsError):
            await ask(canary_weight=other)


async def test_a_second_canary_takes_the_first_ones_place(store):
    await serving(store, 1)
    first = await canary(store, 2)
    second = await canary(store, 3, weight=50)
    assert (second.version, second.canary.version, second.canary_weight) == (version(1), version(3), 50)
    assert await state_of(store, first.rollout) == RolloutState.ROLLED_BACK
    assert second.rollout.state == RolloutState.CANARY


async def test_a_plain_deploy_over_a_canary_takes_the_whole_alias(store):
    await serving(store, 1)
    first = await canary(store, 2)
    after = await serving(store, 3)
    assert (after.version, after.canary, after.canary_weight, after.previous.version) == (version(3), None, 0, version(1))
    assert await state_of(store, first.rollout) == RolloutState.ROLLED_BACK


async def test_a_canary_whose_alias_was_changed_meanwhile_is_aborted(store, releases):
    await serving(store, 1)
    await canary(store, 2)
    made = await deploy(store, 3, weight=10)
    await promote(releases)
    for start in (store.start_canary, store.flip):
        with pytest.raises(AbortedError, match="changed by something else"):
            await start(made.rollout, epoch=made.epoch, swap_s=0.1)
    assert await state_of(store, made.rollout) == RolloutState.PENDING


async def test_a_canary_that_failed_leaves_what_serves(store):
    await serving(store, 1)
    made = await deploy(store, 2, weight=10)
    await store.advance(made.rollout, RolloutState.LOADING)
    assert await store.finish(made.rollout, error={"code": "x", "message": "no"})
    after = await store.get("alpha", "m")
    assert (after.version, after.canary, after.rollout.state) == (version(1), None, RolloutState.FAILED)


async def test_a_rollout_that_is_a_canary_neither_fails_nor_is_done(store):
    await serving(store, 1)
    after = await canary(store, 2)
    for error in ({"code": "x", "message": "late"}, None):
        assert not await store.finish(after.rollout, error=error)
    with pytest.raises(AbortedError):
        await store.advance(after.rollout, RolloutState.LOADING)
    assert await store.get("alpha", "m") == after


async def test_a_weight_is_changed_under_an_etag(store, releases):
    await serving(store, 1)
    with pytest.raises(FailedPreconditionError, match="no canary"):
        await releases.set_weight("alpha", "m", weight=20)
    before = await canary(store, 2)
    after = await releases.set_weight("alpha", "m", weight=20, etag=before.etag)
    assert (after.canary_weight, after.epoch, after.etag != before.etag) == (20, before.epoch + 1, True)
    assert await releases.set_weight("alpha", "m", weight=20) == after
    with pytest.raises(AbortedError):
        await releases.set_weight("alpha", "m", weight=30, etag=before.etag)
    with pytest.raises(NotFoundError):
        await releases.set_weight("beta", "m", weight=20)


async def test_a_promotion_flips_to_the_canary_and_remembers_what_served(store, releases):
    await serving(store, 1)
    before = await canary(store, 2)
    after = await promote(releases, etag=before.etag)
    assert (after.version, after.adapter, after.canary, after.canary_weight) == (version(2), adapter(2), None, 0)
    assert (after.previous.version, after.previous.adapter) == (version(1), adapter(1))
    assert (after.epoch, after.etag != before.etag) == (before.epoch + 1, True)
    assert (after.rollout.state, after.rollout.replaced) == (RolloutState.DRAINING, version(1))
    assert (await store.snapshot()).rollouts == (after.rollout,)


async def test_the_same_request_promotes_once_and_another_body_is_refused(store, releases):
    await serving(store, 1)
    await canary(store, 2)
    after = await promote(releases)
    assert await promote(releases) == after
    await canary(store, 3)
    assert (await promote(releases)).canary.version == version(3)
    for call in (promote(releases, etag="x"), roll_back(releases, request_id="p")):
        with pytest.raises(AlreadyExistsError):
            await call
    with pytest.raises(NotFoundError):
        await promote(releases, project="beta")
    for request_id in ("", "x" * 129):
        with pytest.raises(InvalidArgumentError):
            await promote(releases, request_id=request_id)


async def test_one_request_that_comes_twice_at_once_is_answered_twice(store, releases):
    await serving(store, 1)
    before = await canary(store, 2)
    first, second = await at_once(releases, promote(releases), promote(releases))
    assert first == second == await store.get("alpha", "m")
    assert first.epoch == before.epoch + 1


async def test_without_a_canary_nothing_is_promoted(store, releases):
    before = await serving(store, 1)
    with pytest.raises(FailedPreconditionError, match="no canary"):
        await promote(releases)
    with pytest.raises(AbortedError):
        await promote(releases, etag="old")
    assert await store.get("alpha", "m") == before
    # A request that was refused is not used up.
    await canary(store, 2)
    assert (await promote(releases)).version == version(2)


@pytest.mark.parametrize("with_etag", [True, False])
async def test_of_two_promotions_at_once_one_wins(store, releases, with_etag):
    await serving(store, 1)
    before = await canary(store, 2)
    etag = before.etag if with_etag else ""
    won = await both(releases, promote(releases, etag=etag), promote(releases, request_id="q", etag=etag), have_etags=with_etag)
    assert won == await store.get("alpha", "m")
    assert (won.version, won.epoch) == (version(2), before.epoch + 1)


@pytest.mark.parametrize("with_etag", [True, False])
async def test_of_two_roll_backs_at_once_one_wins(store, releases, with_etag):
    await serving(store, 1)
    before = await serving(store, 2)
    etag = before.etag if with_etag else ""
    won = await both(releases, roll_back(releases, etag=etag), roll_back(releases, request_id="c", etag=etag), have_etags=with_etag)
    assert [rollout.version for rollout in (await store.snapshot()).rollouts] == [version(1)]
    assert won.rollout.version == version(1)


async def test_of_a_promotion_and_a_roll_back_at_once_one_wins(store, releases):
    await serving(store, 1)
    await canary(store, 2)
    won = await both(releases, promote(releases), roll_back(releases))
    assert won == await store.get("alpha", "m")
    assert won.canary is None


async def test_rolling_back_drops_a_canary(store, releases):
    await serving(store, 1)
    before = await canary(store, 2)
    after = await roll_back(releases, etag=before.etag)
    assert (after.version, after.canary, after.canary_weight, after.rollout.state) == (version(1), None, 0, RolloutState.ROLLED_BACK)
    assert (after.epoch, after.previous) == (before.epoch + 1, None)
    assert (await store.snapshot()).rollouts == ()
    assert await roll_back(releases, etag=before.etag) == after


async def test_rolling_back_without_a_canary_rolls_the_version_before_out_and_once_more_returns(store, releases):
    await serving(store, 1)
    before = await serving(store, 2)
    for number, (wanted, replaced) in enumerate([(1, 2), (2, 1)]):
        begun = await roll_back(releases, request_id=f"b{number}")
        assert (begun.version, begun.rollout.version, begun.rollout.state) == (version(replaced), version(wanted), RolloutState.PENDING)
        assert (begun.rollout.adapter, begun.epoch) == (adapter(wanted), before.epoch + number)
        assert begun.etag != before.etag
        await store.flip(begun.rollout, epoch=begun.epoch, swap_s=0.1)
        after = await store.get("alpha", "m")
        assert (after.version, after.previous.version) == (version(wanted), version(replaced))
        await store.finish(after.rollout)


async def test_rolling_back_twice_does_not_undo_itself(store, releases):
    await serving(store, 1)
    await serving(store, 2)
    begun = await roll_back(releases)
    with pytest.raises(AbortedError, match="being rolled back already"):
        await roll_back(releases, request_id="c")
    assert (await store.snapshot()).rollouts == (begun.rollout,)


async def test_rolling_back_ends_a_rollout_under_way_and_what_serves_goes_on(store, releases):
    await serving(store, 1)
    before = await serving(store, 2)
    made = await deploy(store, 3, weight=10)
    await store.advance(made.rollout, RolloutState.LOADING)
    after = await roll_back(releases)
    assert (after.version, after.epoch, after.rollout.state) == (version(2), before.epoch, RolloutState.ROLLED_BACK)
    for call in (store.advance(made.rollout, RolloutState.PROBING), store.start_canary(made.rollout, epoch=after.epoch, swap_s=0.1)):
        with pytest.raises(AbortedError, match="has ended"):
            await call


async def test_there_may_be_nothing_to_roll_back_to(store, releases):
    await serving(store, 1)
    await serving(store, 1)
    with pytest.raises(FailedPreconditionError, match="nothing to roll back to"):
        await roll_back(releases)
    assert (await store.snapshot()).rollouts == ()
    with pytest.raises(NotFoundError):
        await roll_back(releases, project="beta")


async def test_an_alias_that_is_deleted_takes_its_canary_along(store, releases):
    await serving(store, 1)
    before = await canary(store, 2)
    await store.delete("alpha", "m")
    assert await state_of(store, before.rollout) == RolloutState.FAILED
    assert (await store.snapshot()).desired == ()
    for call in (promote(releases), roll_back(releases)):
        with pytest.raises(NotFoundError):
            await call


async def test_no_more_aliases_are_pinned_than_there_is_room_for(store, releases):
    for number in range(3):
        await serving(store, number, alias=f"m{number}")
    before = await store.get("alpha", "m0")
    pinned = await releases.pin("alpha", "m0", max_pins=2)
    assert (pinned.pinned, pinned.etag, pinned.epoch) == (True, before.etag, before.epoch)
    assert (await releases.pin("alpha", "m0", max_pins=1)).pinned
    pins = [releases.pin("alpha", alias, max_pins=2) for alias in ("m1", "m2")]
    refused = [result for result in await asyncio.gather(*pins, return_exceptions=True) if isinstance(result, BaseException)]
    assert [type(error) for error in refused] == [FailedPreconditionError]
    assert "2 aliases are, of 2 at the most" in str(refused[0])
    assert not (await releases.unpin("alpha", "m0")).pinned
    assert [(await releases.pin("alpha", alias, max_pins=2)).pinned for alias in ("m1", "m2")] == [True, True]
    with pytest.raises(FailedPreconditionError, match="one adapter at a time"):
        await releases.pin("alpha", "m0", max_pins=0)
    for call in (releases.pin("beta", "m1", max_pins=9), releases.unpin("beta", "m1")):
        with pytest.raises(NotFoundError):
            await call


async def test_projects_that_have_an_alias_pin_even_shares(store, releases):
    for number in range(3):
        await deploy(store, number, alias=f"m{number}")
        await deploy(store, number, alias=f"m{number}", project="beta")
    for alias in ("m0", "m1"):
        assert (await releases.pin("alpha", alias, max_pins=3)).pinned
    with pytest.raises(FailedPreconditionError, match="2 aliases of this project are, its share of 3 among 2 projects; unpin"):
        await releases.pin("alpha", "m2", max_pins=3)
    assert (await releases.pin("beta", "m0", max_pins=3)).pinned
    # What is left of an uneven number goes to whoever comes first.
    with pytest.raises(FailedPreconditionError, match="3 aliases are, of 3 at the most"):
        await releases.pin("beta", "m1", max_pins=3)


async def test_aliases_of_before_this_release_are_taken_over(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'serving.sqlite'}")
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with Operations.context(operations.migration_context):
            __import__(f"{migrations}.0001_aliases", fromlist=["upgrade"]).upgrade()
        now = "2026-01-01 00:00:00.000000"
        ref = adapter(1).model_dump_json()
        connection.exec_driver_sql(
            "INSERT INTO rollouts (project, alias, request_id, body_sha256, version, job_id, adapter, state, created_at, updated_at) "
            "VALUES ('alpha', 'm', 'r', 'd', ?, 'ftjob-1', ?, 'READY', ?, ?)",
            (version(1), ref, now, now),
        )
        connection.exec_driver_sql(
            "INSERT INTO aliases VALUES ('alpha', 'm', 'SmolLM2', ?, 'ftjob-1', ?, 'e', 1, 1, ?, ?)", (version(1), ref, now, now)
        )
        connection.exec_driver_sql("CREATE TABLE serving_version (version_num VARCHAR(32) NOT NULL)")
        connection.exec_driver_sql("INSERT INTO serving_version VALUES ('0001')")
    engine.dispose()
    database = await Database.open(f"sqlite:///{tmp_path / 'serving.sqlite'}", schema="serving")
    await database.migrate("finery_serving.migrations", version_table="serving_version")
    store = AliasStore(database, changes=Changes())
    before = await store.get("alpha", "m")
    assert (before.version, before.canary, before.previous, before.pinned) == (version(1), None, None, False)
    await canary(store, 2)
    promoted = await promote(Releases(database, changes=Changes()))
    assert promoted.previous is not None
    assert promoted.previous.version == version(1)
    await database.close()


async def state_of(store, rollout) -> str:
    """A rollout's state, whatever the alias shows."""
    async with store._db.read() as session:
        return await session.scalar(sa.text("SELECT state FROM rollouts WHERE number = :number"), {"number": rollout.number})
