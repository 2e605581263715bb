"""Databases: opening, transactions, migrations by several at once, and errors in plain words."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from sqlalchemy.exc import DBAPIError

from finery_common.database import Database
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError, UnavailableError


@contextlib.asynccontextmanager
async def _closing(db: Database) -> AsyncIterator[Database]:
    try:
        yield db
    finally:
        await db.close()


_REVISION = """
import sqlalchemy as sa
from alembic import op
revision = "{revision}"
down_revision = {down}
def upgrade() -> None:
    {body}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that ships one migration: the table `notes`, and one note."""
    name = f"shipped_{tmp_path.name.replace('-', '_')}"
    versions = tmp_path / name / "versions"
    versions.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    body = 'op.create_table("notes", sa.Column("text", sa.Text())); op.execute("INSERT INTO notes VALUES (\'first\')")'
    (versions / "0001_notes.py").write_text(_REVISION.format(revision="0001", down=None, body=body))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _add_revision(package: str, body: str) -> None:
    folder = Path(next(iter(sys.modules[package].__path__)))
    (folder / "versions" / "0002_more.py").write_text(_REVISION.format(revision="0002", down="'0001'", body=body))


async def _notes(db: Database) -> list[str]:
    async with db.read() as session:
        return list(await session.scalars(sa.text("SELECT text FROM notes ORDER BY text")))


async def test_a_migration_runs_once_and_its_rerun_changes_nothing(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")
    await database.migrate(package, version_table="notes_version")
    assert await _notes(database) == ["first"]


async def test_two_databases_migrating_at_once_migrate_once(database: Database, database_url: str, package: str) -> None:
    other = await Database.open(database_url, schema="test")
    async with _closing(other):
        await asyncio.gather(*(db.migrate(package, version_table="notes_version") for db in (database, other) * 3))
        assert await _notes(other) == ["first"]


_OPEN_AND_MIGRATE = """
import asyncio, sys
from finery_common.database import Database
async def run(url, package):
    db = await Database.open(url, schema="test")
    await db.migrate(package, version_table="notes_version")
    await db.close()
asyncio.run(run(*sys.argv[1:]))
"""


async def test_processes_opening_and_migrating_at_once_migrate_once(database_url: str, package: str) -> None:
    command = [sys.executable, "-W", "error", "-c", _OPEN_AND_MIGRATE, database_url, package]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [await asyncio.create_subprocess_exec(*command, env=env) for _ in range(3)]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    db = await Database.open(database_url, schema="test")
    async with _closing(db):
        assert await _notes(db) == ["first"]


async def test_a_failed_migration_leaves_nothing_behind(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")
    _add_revision(package, 'op.create_table("more", sa.Column("x", sa.Integer())); raise RuntimeError("half way")')
    with pytest.raises(RuntimeError, match="half way"):
        await database.migrate(package, version_table="notes_version")
    _add_revision(package, 'op.create_table("more", sa.Column("x", sa.Integer()))')
    await database.migrate(package, version_table="notes_version")
    async with database.read() as session:
        assert await session.scalar(sa.text("SELECT count(*) FROM more")) == 0


async def test_a_database_newer_than_the_package_is_refused(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")
    async with database.begin() as session:
        await session.execute(sa.text("UPDATE notes_version SET version_num = '9999'"))
    with pytest.raises(FailedPreconditionError, match="9999.*newer version of Finery"):
        await database.migrate(package, version_table="notes_version")


async def test_a_block_that_raises_is_rolled_back(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")

    async def change_my_mind() -> None:
        async with database.begin() as session:
            await session.execute(sa.text("INSERT INTO notes VALUES ('second')"))
            raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        await change_my_mind()
    assert await _notes(database) == ["first"]


async def test_a_cancelled_writer_leaves_the_database_writable(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")
    inside = asyncio.Event()

    async def write_forever() -> None:
        async with database.begin() as session:
            await session.execute(sa.text("INSERT INTO notes VALUES ('lost')"))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write_forever())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.begin() as session:
        await session.execute(sa.text("INSERT INTO notes VALUES ('kept')"))
    assert await _notes(database) == ["first", "kept"]


async def test_a_read_transaction_cannot_write(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")
    with pytest.raises((DBAPIError, UnavailableError), match="read-only|READONLY"):
        async with database.read() as session:
            await session.execute(sa.text("INSERT INTO notes VALUES ('second')"))
    async with database.begin() as session:
        await session.execute(sa.text("INSERT INTO notes VALUES ('second')"))
    assert await _notes(database) == ["first", "second"]


async def test_concurrent_writers_take_turns(database: Database, package: str) -> None:
    await database.migrate(package, version_table="notes_version")

    async def double() -> None:
        async with database.begin() as session:
            count = await session.scalar(sa.text("SELECT count(*) FROM notes"))
            await session.execute(sa.text("INSERT INTO notes VALUES (:text)"), {"text": f"note {count:03}"})

    await asyncio.gather(*(double() for _ in range(30)))
    assert len(await _notes(database)) == 31


async def test_sqlite_is_durable_enforces_foreign_keys_and_lets_readers_pass_a_writer(tmp_path: Path) -> None:
    db = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'made' / 'here' / 'a.sqlite'}", schema="test")
    async with _closing(db), db.begin() as writer, db.read() as reader:
        assert await writer.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert await writer.scalar(sa.text("PRAGMA foreign_keys")) == 1
        assert await writer.scalar(sa.text("PRAGMA synchronous")) == 2
        assert await reader.scalar(sa.text("SELECT 1")) == 1


async def test_schemas_of_one_postgresql_database_do_not_meet(postgres_url: str, package: str) -> None:
    first, second = await Database.open(postgres_url, schema="first"), await Database.open(postgres_url, schema="second")
    async with _closing(first), _closing(second):
        for db in (first, second):
            await db.migrate(package, version_table="notes_version")
        async with first.begin() as session:
            await session.execute(sa.text("INSERT INTO notes VALUES ('mine')"))
        assert await _notes(first) == ["first", "mine"]
        assert await _notes(second) == ["first"]


async def test_a_restarted_postgresql_connection_is_replaced(postgres_url: str) -> None:
    db = await Database.open(postgres_url, schema="test")
    async with _closing(db):
        with pytest.raises(UnavailableError, match="Check that it runs"):
            async with db.begin() as session:
                await session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
        async with db.read() as session:
            assert await session.scalar(sa.text("SELECT current_schema()")) == "test"


@pytest.mark.parametrize(
    "statements",
    [
        ["SET TRANSACTION READ ONLY", "CREATE TABLE refused (x int)"],
        ["SET LOCAL statement_timeout = 50", "SELECT pg_sleep(10)"],
        ["SET LOCAL idle_in_transaction_session_timeout = 50", "SELECT 1"],
        ["DO $$ BEGIN RAISE EXCEPTION 'disk' USING ERRCODE = '58030'; END $$"],
    ],
)
async def test_what_postgresql_refuses_for_the_moment_is_unavailable(postgres_url: str, statements: list[str]) -> None:
    db = await Database.open(postgres_url, schema="test")
    async with _closing(db):

        async def run_all() -> None:
            async with db.begin() as session:
                for statement in statements:
                    await session.execute(sa.text(statement))
                    await asyncio.sleep(0.3)

        with pytest.raises(UnavailableError, match=r"25006|57014|25P03|58030"):
            await run_all()
        async with db.begin() as session:
            assert await session.scalar(sa.text("SELECT 1")) == 1


async def test_a_full_disk_is_named_and_nothing_is_saved(tmp_path: Path, package: str) -> None:
    db = await Database.open(f"sqlite:///{tmp_path / 'a.sqlite'}", schema="test")
    async with _closing(db):
        await db.migrate(package, version_table="notes_version")

        async def write_much() -> None:
            async with db.begin() as session:
                await session.execute(sa.text("PRAGMA max_page_count = 1"))
                await session.execute(sa.text("INSERT INTO notes VALUES (:text)"), {"text": "x" * 100_000})

        with pytest.raises(ResourceExhaustedError, match="disk is full.*Free space"):
            await write_much()
        assert await _notes(db) == ["first"]


async def test_a_database_locked_too_long_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finery_common.database.LOCK_TIMEOUT_S", 0.1)
    url = f"sqlite:///{tmp_path / 'a.sqlite'}"
    first, second = await Database.open(url, schema="test"), await Database.open(url, schema="test")
    async with _closing(first), _closing(second), first.begin() as session:
        await session.execute(sa.text("CREATE TABLE held (x)"))
        for db in (first, second):
            with pytest.raises(UnavailableError, match="locked by another writer"):
                async with db.begin() as other:
                    await other.execute(sa.text("SELECT 1"))


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(FailedPreconditionError, match="damaged"):
        await Database.open(f"sqlite:///{tmp_path / 'a.sqlite'}", schema="test")


async def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match="cannot be used: File exists"):
        await Database.open(f"sqlite:///{tmp_path / 'file' / 'a.sqlite'}", schema="test")


async def test_postgresql_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        failures = REGISTRY.get_sample_value("finery_database_failures_total") or 0.0
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await Database.open(f"postgresql://nobody@127.0.0.1:{bound.getsockname()[1]}/none", schema="test")
        assert (REGISTRY.get_sample_value("finery_database_failures_total") or 0.0) > failures


async def test_a_wrong_database_name_or_password_is_told(postgres_url: str) -> None:
    for url in (postgres_url + "x", postgres_url.replace("finery:", "finery:wrong")):
        with pytest.raises(UnavailableError, match="password and name in its URL") as caught:
            await Database.open(url, schema="test")
        assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://a/b", "sqlite://", "sqlite:///:memory:", "oracle+what://a"])
async def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="want sqlite"):
        await Database.open(url, schema="test")


@pytest.mark.parametrize("schema", ["", "Upper", 'a"b', "1a", "a" * 64])
async def test_other_schema_names_are_refused(tmp_path: Path, schema: str) -> None:
    with pytest.raises(InvalidArgumentError, match="want lower-case letters"):
        await Database.open(f"sqlite:///{tmp_path / 'a.sqlite'}", schema=schema)


async def test_what_is_in_use_while_a_database_closes_leaves_no_connection_behind(database_url):
    database = await Database.open(database_url, schema="test")
    is_open, may_end = asyncio.Event(), asyncio.Event()

    async def read(database):
        async with database.read() as session:
            await session.scalar(sa.text("select 1"))
            is_open.set()
            await may_end.wait()

    reading = asyncio.create_task(read(database))
    await is_open.wait()
    closing = asyncio.create_task(database.close())
    await asyncio.sleep(0.05)
    may_end.set()
    await asyncio.gather(reading, closing)
    del database, reading, closing
    await asyncio.sleep(0.05)
    gc.collect()
