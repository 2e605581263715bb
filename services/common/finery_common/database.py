"""The connection to a service's database: opening, transactions, migrations, and what goes wrong there in plain words.

Owns what differs between SQLite (one file per service) and PostgreSQL (one schema per service). Leaves tables to their owners, who
ship them as Alembic migrations in a package of their own and need neither an alembic.ini nor an env.py:

    finery_gateway/migrations/__init__.py
    finery_gateway/migrations/versions/__init__.py
    finery_gateway/migrations/versions/0001_keys.py:

        import sqlalchemy as sa
        from alembic import op

        revision = "0001"
        down_revision = None

        def upgrade() -> None:
            op.create_table("keys", sa.Column("digest", sa.String(64), primary_key=True))

    db = await Database.open(settings.database_url, schema="gateway")
    await db.migrate("finery_gateway.migrations", version_table="gateway_version")
    async with db.begin() as session:
        session.add(KeyRow(digest=...))

One transaction at a time per task: opening a second one inside `begin` waits for the first and fails after `LOCK_TIMEOUT_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib
import logging
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import psycopg
import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import RevisionStep
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.types import TypeDecorator

from finery_common.errors import (
    AbortedError,
    FailedPreconditionError,
    FineryError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.metrics import DATABASE_FAILURES

LOCK_TIMEOUT_S = 15
_CONNECT_TIMEOUT_S = 10
_CLOSE_S = 1.0
_SCHEMA = re.compile(r"[a-z][a-z0-9_]{0,62}")
_WANTED_URL = "want sqlite:////absolute/path.sqlite or postgresql://user:password@host:5432/database"

_log = logging.getLogger(__name__)

# Alembic's `op` and `context` are process-wide proxies: two migrations in one process take turns.
_alembic_proxies = threading.Lock()


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, aware and in UTC on both sides; SQLite stores it without its zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Database:
    """One service's database. Make it with `open`, give it back with `close`."""

    def __init__(self, url: URL, *, schema: str) -> None:
        self.url = url
        self.schema = schema
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = _async_engine(url, schema=schema)
        self._reader = self._engine.execution_options(finery_read_only=True, **({} if self.is_sqlite else {"postgresql_readonly": True}))
        # SQLite has one writer: tasks queue here, in order, and not in SQLite's polling busy handler.
        self._writer_turn: asyncio.Lock | None = asyncio.Lock() if self.is_sqlite else None

    @classmethod
    async def open(cls, url: str, *, schema: str) -> Database:
        """Connects, and makes the SQLite file with its folder or the PostgreSQL schema where missing.

        `url` is `sqlite:///path` or `postgresql://…`, with or without a driver's name. `schema` separates services in one
        PostgreSQL database; with SQLite every service has a file of its own and its tables lie in it directly.
        Raises InvalidArgumentError for a URL that is neither, UnavailableError where the database cannot be reached.
        """
        parsed = _parse_url(url)
        if not _SCHEMA.fullmatch(schema):
            raise InvalidArgumentError(f"Got the database schema {schema!r}; want lower-case letters, digits and _, at most 63.")
        await asyncio.to_thread(_prepare, parsed, schema)
        return cls(parsed, schema=schema)

    async def close(self) -> None:
        """Closes every connection, those in use once they are given back: what came later would be closed by nobody.

        Transactions still open after a second are rolled back.
        """
        pool = cast("QueuePool", self._engine.pool)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while pool.checkedout():  # noqa: ASYNC110  the pool signals nobody
                    await asyncio.sleep(0.01)
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A transaction that may write: committed at the end of the block, rolled back if it raises.

        Raises UnavailableError (locked, unreachable), ResourceExhaustedError (disk full), AbortedError (deadlock).
        """
        async with self._turn(), _translated(), AsyncSession(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A transaction in which the database refuses to write; does not wait for writers on either database."""
        async with _translated(), AsyncSession(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    async def migrate(self, package: str, *, version_table: str) -> None:
        """Brings the tables that `package` ships (its folder `versions`) to their newest revision, in one transaction.

        Safe from several processes at once: one migrates, the others wait for it. `version_table` holds the revision and is
        the package's own. Raises FailedPreconditionError where the database is newer than the package.
        """
        await asyncio.to_thread(_migrate, self.url, self.schema, package, version_table)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._writer_turn is None:
            yield
            return
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_S):
                await self._writer_turn.acquire()
        except TimeoutError as error:
            raise _locked() from error
        try:
            yield
        finally:
            self._writer_turn.release()


def _parse_url(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise InvalidArgumentError(f"The database URL cannot be read; {_WANTED_URL}.") from error
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise InvalidArgumentError(f"The SQLite database URL names no file; {_WANTED_URL}.")
        return parsed.set(drivername="sqlite+aiosqlite", database=str(Path(parsed.database).absolute()))
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidArgumentError(f"Got a database URL for {backend!r}; {_WANTED_URL}.")


def _async_engine(url: URL, *, schema: str) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url, hide_parameters=True, pool_timeout=LOCK_TIMEOUT_S)
        _listen_sqlite(engine.sync_engine)
    else:
        connect_args = {"connect_timeout": _CONNECT_TIMEOUT_S}
        engine = create_async_engine(url, hide_parameters=True, pool_timeout=LOCK_TIMEOUT_S, pool_pre_ping=True, connect_args=connect_args)
        _listen_postgresql(engine.sync_engine, schema)
    return engine


@contextlib.contextmanager
def _sync_connection(url: URL, schema: str) -> Iterator[sa.Connection]:
    """One connection of its own for work that Alembic or the first start does in a thread."""
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url.set(drivername="sqlite+pysqlite"), hide_parameters=True, poolclass=sa.NullPool)
        _listen_sqlite(engine)
    else:
        engine = sa.create_engine(url, hide_parameters=True, poolclass=sa.NullPool, connect_args={"connect_timeout": _CONNECT_TIMEOUT_S})
        _listen_postgresql(engine, schema)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _listen_sqlite(engine: sa.Engine) -> None:
    def on_connect(connection: DBAPIConnection, _record: object) -> None:
        # The driver would begin transactions late and as readers; `on_begin` says what is meant.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={int(LOCK_TIMEOUT_S * 1000)}", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: sa.Connection) -> None:
        read_only = bool(connection.get_execution_options().get("finery_read_only"))
        connection.exec_driver_sql(f"PRAGMA query_only={int(read_only)}")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)


def _listen_postgresql(engine: sa.Engine, schema: str) -> None:
    def on_connect(connection: DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f'SET search_path TO "{schema}"')
        cursor.close()
        connection.commit()

    event.listen(engine, "connect", on_connect)


def _prepare(url: URL, schema: str) -> None:
    if url.get_backend_name() == "sqlite":
        _prepare_sqlite(url)
        return
    with _translated_sync(), _sync_connection(url, schema) as connection, connection.begin():
        _lock_transaction(connection, f"schema {schema}")
        if connection.scalar(sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :schema"), {"schema": schema}) is None:
            connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"')


def _prepare_sqlite(url: URL) -> None:
    assert url.database is not None
    path = Path(url.database)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _exclusive_file(path)
        with lock, _translated_sync(), contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as connection:
            # The mode stays with the file. Two processes switching it at once would fail at once: no busy handler runs there.
            connection.execute("PRAGMA journal_mode=WAL")
    except OSError as error:
        raise FailedPreconditionError(
            f"The database folder {path.parent} cannot be used: {error.strerror}. Make it writable, or set another state directory."
        ) from error


@contextlib.contextmanager
def _exclusive_file(path: Path) -> Iterator[None]:
    """Held by one process at a time, beside the database `path`; the kernel drops it with the process."""
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_transaction(connection: sa.Connection, subject: str) -> None:
    key = int.from_bytes(hashlib.sha256(f"finery {subject}".encode()).digest()[:8], signed=True)
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _migrate(url: URL, schema: str, package: str, version_table: str) -> None:
    folder = Path(next(iter(importlib.import_module(package).__path__)))
    is_sqlite = url.get_backend_name() == "sqlite"
    file_lock = _exclusive_file(Path(url.database or "")) if is_sqlite else contextlib.nullcontext()
    with file_lock, _translated_sync(), _sync_connection(url, schema) as connection, connection.begin():
        if not is_sqlite:
            _lock_transaction(connection, f"migrate {schema} {version_table}")
        with _alembic_proxies:
            upgrade_to_head(connection, folder=folder, version_table=version_table)


def upgrade_to_head(connection: sa.Connection, *, folder: Path, version_table: str) -> None:
    """Runs the revisions under `folder` that `connection`'s database lacks, inside the transaction that is open there."""
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)

    def upgrades(revision: str, _context: object) -> list[RevisionStep]:
        # What `alembic upgrade` asks as well; it has no public name.
        return script._upgrade_revs("head", revision)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    environment = EnvironmentContext(config, script, fn=upgrades)
    try:
        with environment:
            environment.configure(connection=connection, version_table=version_table, transactional_ddl=True)
            environment.run_migrations()
    except CommandError as error:
        raise FailedPreconditionError(
            f"The database's {version_table} cannot be brought to {script.get_current_head()}: {error}. "
            "If a newer version of Finery wrote it, start that version or restore a backup."
        ) from error


@contextlib.asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    with _translated_sync():
        yield


@contextlib.contextmanager
def _translated_sync() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
        translated = _translate(error)
        if translated is None:
            raise
        if isinstance(translated, (UnavailableError, FailedPreconditionError, ResourceExhaustedError)):
            DATABASE_FAILURES.inc()
        _log.warning("database: %s", error)
        raise translated from error


def _locked() -> FineryError:
    return UnavailableError(
        f"The database was locked by another writer for more than {LOCK_TIMEOUT_S} s. Try again; if it stays, see which process holds it.",
        retry_after_s=1,
    )


def _translate(error: Exception) -> FineryError | None:
    if isinstance(error, PoolTimeoutError):
        return UnavailableError("Every database connection is in use. Try again shortly.", retry_after_s=1)
    cause = error.orig if isinstance(error, DBAPIError) else error
    while cause is not None:
        if isinstance(cause, sqlite3.Error):
            return _translate_sqlite(getattr(cause, "sqlite_errorname", ""))
        if isinstance(cause, psycopg.Error):
            return _translate_postgresql(cause.sqlstate or "", cause)
        cause = cause.__cause__
    return None


def _translate_sqlite(name: str) -> FineryError | None:
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return _locked()
    if name == "SQLITE_FULL":
        return _full()
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return UnavailableError(
            f"The database file refuses that ({name}). Check that its disk is there, is writable and has space.", retry_after_s=5
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return FailedPreconditionError(f"The database file is damaged or no SQLite database ({name}). Restore it from a backup.")
    return None


def _translate_postgresql(sqlstate: str, cause: psycopg.Error) -> FineryError | None:
    if sqlstate == "53100":
        return _full()
    if sqlstate in ("40001", "40P01"):
        return AbortedError("Another transaction changed the same rows. Try again.")
    if sqlstate == "55P03":
        return _locked()
    if sqlstate == "42501":
        return FailedPreconditionError("The database user lacks a privilege. Grant it CREATE on the database and its schemas.")
    if sqlstate in ("25006", "25P03", "57014") or sqlstate.startswith("58"):
        return UnavailableError(
            f"The database did not do that now ({sqlstate}): it is read-only, took too long or has trouble of its own. Try again; if it "
            "stays, see its log.",
            retry_after_s=2,
        )
    if not sqlstate and isinstance(cause, psycopg.DataError):
        return InvalidArgumentError("A text contains the character U+0000, which cannot be stored; remove it.")
    # The driver gives no state for a connection that was refused, whoever refused it.
    if sqlstate.startswith(("08", "28", "3D", "53", "57P")) or (not sqlstate and isinstance(cause, psycopg.OperationalError)):
        return UnavailableError(
            "The database cannot be reached or refused the connection. Check that it runs, and host, user, password and name in its URL.",
            retry_after_s=1,
        )
    return None


def _full() -> FineryError:
    return ResourceExhaustedError("The database's disk is full and nothing was saved. Free space there, then try again.", code="disk_full")
