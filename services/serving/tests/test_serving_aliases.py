"""Aliases and rollouts on SQLite and PostgreSQL: idempotent deploys, flips by compare-and-swap, projects apart."""

import asyncio
from functools import partial

import pytest
import sqlalchemy as sa

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_serving.aliases import AliasStore, version_of
from finery_serving.changes import Changes
from finery_serving.records import RolloutState

BASE = "SmolLM2"


@pytest.fixture
async def store(database: Database) -> AliasStore:
    await database.migrate("finery_serving.migrations", version_table="serving_version")
    return AliasStore(database, changes=Changes())


def adapter(step=20, *, project="alpha", job="ftjob-1", digit="a") -> ArtifactRef:
    prefix = f"projects/{project}/adapters/{job}-{step}/"
    return ArtifactRef(prefix=prefix, manifest_sha256=digit * 64, kind="adapter", size_bytes=10)


async def deploy(store, alias="m", *, project="alpha", request_id="r1", ref=None, etag=""):
    return await store.deploy(
        project, alias, adapter=ref or adapter(project=project), base_model=BASE, served=(BASE,), request_id=request_id, etag=etag
    )


async def flip(store, deployed):
    alias = await store.get(deployed.project, deployed.alias)
    await store.flip(deployed.rollout, epoch=alias.epoch, swap_s=0.5)
    return await store.get(deployed.project, deployed.alias)


def test_a_version_is_named_by_job_step_and_digest():
    assert version_of(adapter(20, job="ftjob-0a1b")) == ("ftjob-0a1b-20-aaaaaaaa", "ftjob-0a1b")


async def test_a_deploy_makes_an_alias_that_serves_nothing_yet(store):
    made = await deploy(store)
    assert (made.version, made.epoch, made.rollout.state, made.rollout.version) == ("", 0, RolloutState.PENDING, "ftjob-1-20-aaaaaaaa")
    assert await store.get("alpha", "m") == made
    assert (await store.snapshot()).rollouts == (made.rollout,)
    assert (await store.snapshot()).desired == ()


async def test_the_same_request_gives_the_same_rollout_and_another_body_is_refused(store):
    first = await deploy(store)
    assert (await deploy(store)).rollout.number == first.rollout.number
    with pytest.raises(AlreadyExistsError):
        await deploy(store, "another")
    with pytest.raises(AlreadyExistsError):
        await deploy(store, ref=adapter(40))
    # Request ids are a project's own.
    assert (await deploy(store, project="beta")).project == "beta"
    assert len((await store.snapshot()).rollouts) == 2


async def test_a_flip_counts_epochs_and_changes_the_etag(store):
    made = await deploy(store)
    flipped = await flip(store, made)
    assert (flipped.version, flipped.epoch, flipped.job_id, flipped.adapter) == ("ftjob-1-20-aaaaaaaa", 1, "ftjob-1", adapter())
    assert flipped.etag != made.etag
    assert (flipped.rollout.state, flipped.rollout.swap_s) == (RolloutState.DRAINING, 0.5)
    await store.finish(flipped.rollout)
    assert (await store.get("alpha", "m")).rollout.state == RolloutState.READY
    assert (await store.snapshot()).rollouts == ()
    assert [alias.alias for alias in (await store.snapshot()).desired] == ["m"]


async def test_of_two_flips_at_one_epoch_one_wins(store):
    first, second = await deploy(store), await deploy(store, request_id="r2", ref=adapter(40))
    flips = [store.flip(item.rollout, epoch=first.epoch, swap_s=0.1) for item in (first, second)]
    results = await asyncio.gather(*flips, return_exceptions=True)
    assert sorted(type(result) for result in results if result) == [AbortedError]
    alias = await store.get("alpha", "m")
    assert alias.epoch == 1
    # The loser's rollout is untouched by its rolled-back flip.
    assert sorted(item.state for item in (await store.snapshot()).rollouts) == [RolloutState.DRAINING, RolloutState.PENDING]


async def test_a_deploy_with_a_stale_etag_is_aborted(store):
    made = await deploy(store)
    await flip(store, made)
    with pytest.raises(AbortedError):
        await deploy(store, request_id="r2", ref=adapter(40), etag=made.etag)
    with pytest.raises(AbortedError):
        await deploy(store, "new", request_id="r3", etag="x")
    current = await store.get("alpha", "m")
    assert (await deploy(store, request_id="r4", ref=adapter(40), etag=current.etag)).rollout.version == "ftjob-1-40-aaaaaaaa"


async def test_of_two_deploys_with_one_etag_one_wins(store):
    before = await flip(store, await deploy(store))
    deploys = [deploy(store, request_id=f"d{step}", ref=adapter(step), etag=before.etag) for step in (40, 60)]
    results = await asyncio.gather(*deploys, return_exceptions=True)
    [won] = [result for result in results if not isinstance(result, BaseException)]
    assert sorted(type(result).__name__ for result in results if result is not won) == ["AbortedError"]
    assert (won.version, won.epoch, won.etag != before.etag) == (before.version, before.epoch, True)
    assert await store.get("alpha", "m") == won
    # Repeated, it is the one that won; and what it answers is good for the next.
    step = 40 if won.rollout.version.startswith("ftjob-1-40-") else 60
    assert await deploy(store, request_id=f"d{step}", ref=adapter(step), etag=before.etag) == won
    await deploy(store, request_id="next", ref=adapter(80), etag=won.etag)


async def test_a_deploy_with_an_etag_leaves_the_rollout_before_it_its_turn(store):
    first = await deploy(store)
    second = await deploy(store, request_id="r2", ref=adapter(40), etag=first.etag)
    await store.flip(first.rollout, epoch=first.epoch, swap_s=0.1)
    alias = await flip(store, second)
    assert (alias.version, alias.epoch) == (second.rollout.version, 2)


async def test_a_failed_rollout_leaves_what_serves(store):
    await flip(store, await deploy(store))
    second = await deploy(store, request_id="r2", ref=adapter(40))
    await store.advance(second.rollout, RolloutState.STAGING)
    await store.finish(second.rollout, error={"code": "adapter_not_servable", "message": "no"})
    alias = await store.get("alpha", "m")
    assert (alias.version, alias.epoch, alias.rollout.state) == ("ftjob-1-20-aaaaaaaa", 1, RolloutState.FAILED)
    assert alias.rollout.error == {"code": "adapter_not_servable", "message": "no"}


async def test_a_deleted_alias_is_gone_and_its_rollout_ends(store):
    made = await deploy(store)
    with pytest.raises(AbortedError):
        await store.delete("alpha", "m", etag="x")
    await store.delete("alpha", "m")
    with pytest.raises(NotFoundError):
        await store.get("alpha", "m")
    with pytest.raises(NotFoundError):
        await store.delete("alpha", "m")
    with pytest.raises(AbortedError):
        await store.advance(made.rollout, RolloutState.LOADING)
    with pytest.raises(AbortedError):
        await store.flip(made.rollout, epoch=made.epoch, swap_s=0.1)
    assert (await store.snapshot()).rollouts == ()
    with pytest.raises(NotFoundError, match="fresh request_id"):
        await deploy(store)
    assert (await deploy(store, request_id="r2")).epoch == 0


async def test_projects_do_not_see_each_other(store):
    await flip(store, await deploy(store))
    for call in (store.get("beta", "m"), store.delete("beta", "m"), deploy(store, project="beta", ref=adapter(project="alpha"))):
        with pytest.raises(NotFoundError):
            await call
    assert (await store.list("beta"))[0] == ()
    mine = await deploy(store, project="beta")
    assert mine.version == ""
    assert (await store.get("alpha", "m")).epoch == 1


async def test_pages_of_aliases_have_no_gap(store):
    for number in range(5):
        await deploy(store, f"m{number}", request_id=f"r{number}")
    seen, token = [], ""
    while True:
        page, token = await store.list("alpha", page_size=2, page_token=token)
        seen += [alias.alias for alias in page]
        if not token:
            break
    assert seen == [f"m{number}" for number in range(5)]


@pytest.mark.parametrize("alias", ["", "a/b", "a b", "ä", "x" * 257, BASE, "../m", "a\n"])
async def test_a_bad_alias_is_refused(store, alias):
    with pytest.raises(InvalidArgumentError):
        await deploy(store, alias)


@pytest.mark.parametrize(
    "ref",
    [
        ArtifactRef(prefix="projects/alpha/models/conv-1/", manifest_sha256="a" * 64, kind="model", size_bytes=1),
        ArtifactRef(prefix="projects/alpha/adapters/nostep/", manifest_sha256="a" * 64, kind="adapter", size_bytes=1),
        ArtifactRef(prefix="projects/alpha/adapters/../x-1/", manifest_sha256="a" * 64, kind="adapter", size_bytes=1),
        ArtifactRef(prefix="projects/alpha/adapters/ftjob-1-20/", manifest_sha256="a" * 64, kind="checkpoint", size_bytes=1),
    ],
)
async def test_what_is_no_adapter_is_refused(store, ref):
    with pytest.raises(InvalidArgumentError):
        await deploy(store, ref=ref)


async def test_a_base_model_must_be_served_when_a_deploy_comes_in_and_not_when_it_is_repeated(store):
    ask = partial(store.deploy, "alpha", "m", adapter=adapter(), base_model=BASE, request_id="r")
    with pytest.raises(FailedPreconditionError, match="trained on 'SmolLM2', which is not served here; served are: none"):
        await ask(served=())
    made = await ask(served=(BASE,))
    assert await ask(served=()) == made


async def test_a_rollout_of_an_earlier_release_is_of_its_alias_base_model(store, database):
    made = await deploy(store)
    async with database.begin() as session:
        await session.execute(sa.text("UPDATE rollouts SET base_model = ''"))
    assert [rollout.base_model for rollout in (await store.snapshot()).rollouts] == [BASE]
    assert (await store.get("alpha", "m")).rollout == made.rollout


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_a_deploy_needs_a_request_id(store, request_id):
    with pytest.raises(InvalidArgumentError):
        await deploy(store, request_id=request_id)


async def test_a_waiter_misses_no_change():
    changes = Changes()
    seen = changes.count
    changes.notify()
    assert await changes.wait_after(seen)
    seen = changes.count
    waiting = asyncio.create_task(changes.wait_after(seen))
    await asyncio.sleep(0)
    changes.notify()
    assert await waiting
    assert not await changes.wait_after(changes.count, timeout_s=0.01)
