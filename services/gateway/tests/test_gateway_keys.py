"""API keys and the gateway's tables, on both databases."""

import asyncio
import hashlib
import json
import stat
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from finery_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, UnauthenticatedError, UnavailableError
from finery_gateway import keys as keys_module
from finery_gateway.creates import Attempt, Creates
from finery_gateway.keys import CACHE_TTL_S, GRACE_S, KeyStore
from finery_gateway.limits import KeyLimits
from finery_gateway.tables import ApiKeyRow, Base, migrate


@pytest.fixture
async def db(database):
    await migrate(database)
    return database


async def test_the_migrations_make_the_tables_that_the_code_expects(db):
    def differences(session: Session) -> list[str]:
        found = sa.inspect(session.connection())
        wanted = {table.name: {(c.name, c.nullable) for c in table.columns} for table in Base.metadata.tables.values()}
        return [name for name, columns in wanted.items() if {(c["name"], c["nullable"]) for c in found.get_columns(name)} != columns]

    async with db.read() as session:
        assert await session.run_sync(differences) == []


async def test_a_key_opens_its_project_and_only_its_digest_is_kept(db):
    store = KeyStore(db)
    made, text = await store.create("alpha")
    assert text.startswith("sk-finery-")
    assert await store.project_of(text) == "alpha"
    async with db.read() as session:
        row = (await session.scalars(sa.select(ApiKeyRow))).one()
    assert row.digest == hashlib.sha256(text.encode()).hexdigest()
    assert text not in str(vars(row))
    assert made.hint == text[-4:]
    with pytest.raises(UnauthenticatedError):
        await store.project_of(text + "x")
    with pytest.raises(InvalidArgumentError, match="No/Good"):
        await store.create("No/Good")


async def test_a_key_that_many_requests_bring_is_looked_up_once_and_holds_for_a_while_without_the_database(db, monkeypatch):
    now_s, num_reads, is_down = [0.0], 0, False
    store = KeyStore(db, clock=lambda: now_s[0])
    _, text = await store.create("alpha")
    read = db.read

    def counted():
        nonlocal num_reads
        num_reads += 1
        if is_down:
            raise UnavailableError("The database cannot be reached.")
        return read()

    monkeypatch.setattr(db, "read", counted)
    assert {await task for task in [asyncio.ensure_future(store.project_of(text)) for _ in range(20)]} == {"alpha"}
    assert num_reads == 1
    is_down = True
    now_s[0] = GRACE_S - 1
    assert await store.project_of(text) == "alpha"
    now_s[0] = GRACE_S + 1
    with pytest.raises(UnavailableError):
        await store.project_of(text)
    is_down = False
    assert await store.project_of(text) == "alpha"


async def test_a_revoked_key_ends_everywhere_within_the_caches_life(db):
    now_s = [0.0]
    here, there = KeyStore(db, clock=lambda: now_s[0]), KeyStore(db, clock=lambda: now_s[0])
    made, text = await here.create("alpha")
    await there.project_of(text)
    with pytest.raises(NotFoundError):
        await here.revoke("beta", key_id=made.id)
    assert (await here.revoke("alpha", key_id=made.id)).revoked_at is not None
    with pytest.raises(UnauthenticatedError):
        await here.project_of(text)
    now_s[0] += CACHE_TTL_S
    with pytest.raises(UnauthenticatedError):
        await there.project_of(text)


async def test_limits_are_kept_with_the_key_and_changed_one_by_one(db):
    now_s = [0.0]
    here, there = KeyStore(db, clock=lambda: now_s[0]), KeyStore(db, clock=lambda: now_s[0])
    made, text = await here.create("alpha", limits=KeyLimits(requests_per_minute=60, concurrent_streams=2))
    assert made.limits == (await here.list("alpha"))[0].limits == KeyLimits(requests_per_minute=60, concurrent_streams=2)
    assert (await there.grant_of(text)).limits == made.limits
    changed = await here.update("alpha", key_id=made.id, limits={"tokens_per_minute": 10**9, "requests_per_minute": None})
    assert changed.limits == (await here.grant_of(text)).limits == KeyLimits(tokens_per_minute=10**9, concurrent_streams=2)
    assert (await there.grant_of(text)).limits == made.limits
    now_s[0] += CACHE_TTL_S
    assert (await there.grant_of(text)).limits == changed.limits
    for project, limits, error in (
        ("beta", {"requests_per_minute": 1}, NotFoundError),
        ("alpha", {"requests_per_minute": 0}, InvalidArgumentError),
        ("alpha", {}, InvalidArgumentError),
    ):
        with pytest.raises(error):
            await here.update(project, key_id=made.id, limits=limits)
    assert (await here.list("alpha"))[0].limits == changed.limits
    assert (await here.create("alpha"))[0].limits == KeyLimits()


async def test_keys_made_before_there_were_limits_are_unlimited(database):
    await migrate(database)
    # As the first revision left it.
    async with database.begin() as session:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_streams"):
            await session.execute(sa.text(f"ALTER TABLE api_keys DROP COLUMN {name}"))
        await session.execute(sa.text("UPDATE gateway_version SET version_num = '0001'"))
        old = {"id": "key-old", "project": "alpha", "digest": hashlib.sha256(b"sk-finery-old").hexdigest(), "at": "2026-01-01 00:00:00"}
        insert = "INSERT INTO api_keys (id, project, digest, hint, created_at) VALUES (:id, :project, :digest, 'yold', :at)"
        await session.execute(sa.text(insert), old)
    await migrate(database)
    grant = await KeyStore(database).grant_of("sk-finery-old")
    assert (grant.key_id, grant.project, grant.limits) == ("key-old", "alpha", KeyLimits())


async def test_the_first_key_is_written_once_for_its_owner_only(db, tmp_path):
    file = tmp_path / "state" / "api_key"
    made = await asyncio.gather(*(KeyStore(db).ensure_first(file) for _ in range(3)))
    assert sorted(made) == [False, False, True]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert await KeyStore(db).project_of(file.read_text().strip()) == "default"
    assert not await KeyStore(db).ensure_first(file)


async def test_a_first_key_that_cannot_be_written_is_not_in_the_table(db, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="make the folder writable"):
        await KeyStore(db).ensure_first(tmp_path / "file" / "api_key")
    assert await KeyStore(db).list() == ()


async def test_an_idempotency_key_holds_for_a_day(db):
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    creates = Creates(db, now=lambda: now[0])

    async def run(request_id: str, *, body: object = 1) -> str:
        return await creates.run("p", collection="jobs", attempt=Attempt("k"), body=body, request_id=request_id, create=_echo)

    assert await run("a") == "a"
    now[0] += timedelta(hours=23)
    assert await run("b") == "a"
    with pytest.raises(AlreadyExistsError):
        await run("b", body=2)
    now[0] += timedelta(hours=2)
    assert await run("c", body=2) == "c"


async def test_a_retry_counts_within_a_minute(db):
    now = [datetime(2030, 1, 1, tzinfo=UTC)]
    creates = Creates(db, now=lambda: now[0])

    async def run(request_id: str, *, retries: int) -> str:
        attempt = Attempt(retries=retries)
        return await creates.run("p", collection="jobs", attempt=attempt, body=1, request_id=request_id, create=_echo)

    assert await run("a", retries=0) == "a"
    assert await run("b", retries=1) == "a"
    now[0] += timedelta(seconds=61)
    assert await run("c", retries=1) == "c"


async def test_a_create_that_failed_on_our_side_is_repeated_under_its_id(db):
    creates = Creates(db)
    asked: list[str] = []

    async def lost(request_id: str) -> str:
        asked.append(request_id)
        raise UnavailableError("gone")

    with pytest.raises(UnavailableError):
        await creates.run("p", collection="jobs", attempt=Attempt("k"), body=1, request_id="a", create=lost)
    assert await creates.run("p", collection="jobs", attempt=Attempt("k"), body=1, request_id="b", create=_echo) == "a"
    assert asked == ["a"]


async def _echo(request_id: str) -> str:
    return request_id


def test_the_command_makes_lists_and_revokes_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FINERY_STATE_DIR", str(tmp_path))
    assert keys_module.main(["create", "--project", "alpha"]) == 0
    text = capsys.readouterr().out.strip()
    assert keys_module.main(["list"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["project"], shown["hint"], shown["revoked_at"]) == ("alpha", text[-4:], None)
    assert shown["limits"] == {"requests_per_minute": None, "tokens_per_minute": None, "concurrent_streams": None}
    which = ["--project", "alpha", "--id", shown["id"]]
    assert keys_module.main(["update", *which, "--tokens-per-minute", "5000", "--concurrent-streams", "3"]) == 0
    assert keys_module.main(["update", *which, "--concurrent-streams", "unlimited"]) == 0
    updated = [json.loads(line)["limits"] for line in capsys.readouterr().out.splitlines()]
    assert [limits["concurrent_streams"] for limits in updated] == [3, None]
    assert [limits["tokens_per_minute"] for limits in updated] == [5000, 5000]
    assert keys_module.main(["update", *which, "--requests-per-minute", "0"]) == 1
    assert "requests_per_minute: got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        keys_module.main(["update", *which, "--requests-per-minute", "many"])
    assert "got 'many', wanted a whole number or `unlimited`" in capsys.readouterr().err
    assert keys_module.main(["update", *which]) == 1
    assert "No limit was named" in capsys.readouterr().err
    assert keys_module.main(["revoke", "--project", "alpha", "--id", shown["id"]]) == 0
    assert json.loads(capsys.readouterr().out)["revoked_at"] is not None
    assert keys_module.main(["revoke", "--project", "alpha", "--id", shown["id"]]) == 1
    assert shown["id"] in capsys.readouterr().err
