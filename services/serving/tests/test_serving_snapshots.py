"""What all readers of an agent share: as new as the latest change, read once, and nothing of it old."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.releases import Releases

BASE = "SmolLM2"


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
async def store(database: Database, changes: Changes) -> AliasStore:
    await database.migrate("finery_serving.migrations", version_table="serving_version")
    return AliasStore(database, changes=changes)


@contextmanager
def counted_reads(database: Database):
    """The SELECTs that are sent while it lasts."""
    seen: list[str] = []
    engine = database._engine.sync_engine

    def note(_connection, _cursor, statement, *_):
        if statement.startswith("SELECT"):
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def deploy(store, step, *, alias="m", weight=None):
    adapter = ArtifactRef(prefix=f"projects/alpha/adapters/ftjob-1-{step}/", manifest_sha256="a" * 64, kind="adapter", size_bytes=10)
    request_id = secrets.token_hex(8)
    return await store.deploy("alpha", alias, adapter=adapter, base_model=BASE, served=(BASE,), request_id=request_id, canary_weight=weight)


async def flip(store, made):
    await store.flip(made.rollout, epoch=(await store.get("alpha", made.alias)).epoch, swap_s=0.1)


async def test_each_change_of_each_kind_shows_in_the_next_snapshot(store, database, changes):
    releases = Releases(database, changes=changes)

    async def canary():
        made = await deploy(store, 3, weight=10)
        await store.start_canary(made.rollout, epoch=made.epoch, swap_s=0.1)

    async def finish():
        await store.finish((await store.get("alpha", "m")).rollout)

    steps = {
        "deploy": lambda: deploy(store, 1),
        "deploy another": lambda: deploy(store, 1, alias="n"),
        "flip": lambda: _flip_newest(store),
        "finish": finish,
        "pin": lambda: releases.pin("alpha", "m", max_pins=4),
        "unpin": lambda: releases.unpin("alpha", "m"),
        "canary": canary,
        "weight": lambda: releases.set_weight("alpha", "m", weight=20),
        "promote": lambda: releases.promote("alpha", "m", request_id="p"),
        "finish the promotion": finish,
        "roll back": lambda: releases.roll_back("alpha", "m", served=(BASE,), request_id="b"),
        "flip back": lambda: _flip_newest(store),
        "delete": lambda: store.delete("alpha", "n"),
    }
    before = await store.snapshot()
    for name, step in steps.items():
        await step()
        after = await store.snapshot()
        listed, _ = await store.list("alpha")
        assert after.of_project("alpha") == {alias.alias: alias for alias in listed}, name
        assert after != before, name
        before = after
    assert (await store.snapshot()).of_project("beta") == {}


async def _flip_newest(store):
    await flip(store, await store.get("alpha", "m"))


async def test_many_who_look_at_once_share_one_look(store, database):
    await deploy(store, 1)
    with counted_reads(database) as seen:
        found = await asyncio.gather(*(store.snapshot() for _ in range(20)))
    assert len({id(snapshot) for snapshot in found}) == 1
    assert len(seen) == 3, "rollouts, stamps, and the one alias that is new"


async def test_of_many_aliases_only_the_changed_one_is_read_anew(store):
    for number in range(5):
        await deploy(store, number, alias=f"m{number}")
    before = (await store.snapshot()).of_project("alpha")
    await deploy(store, 9, alias="m3")
    after = (await store.snapshot()).of_project("alpha")
    assert [name for name in after if after[name] is not before[name]] == ["m3"]
    assert after["m3"].rollout.version == "ftjob-1-9-aaaaaaaa"


async def test_what_another_agent_changes_is_seen_in_a_moment_without_word_of_it(store, database):
    other = AliasStore(database, changes=Changes())
    await deploy(store, 1)
    await store.snapshot()
    await deploy(other, 1, alias="n")
    ends_s = time.monotonic() + 10
    while "n" not in (await store.snapshot()).of_project("alpha"):
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.05)


async def test_a_reader_that_is_cancelled_leaves_the_others_theirs(store):
    await deploy(store, 1)
    first, second = asyncio.create_task(store.snapshot()), asyncio.create_task(store.snapshot())
    await asyncio.sleep(0)
    first.cancel()
    assert set((await second).of_project("alpha")) == {"m"}
