"""API keys: making, checking, limiting and revoking them, and `python -m finery_gateway.keys create|list|update|revoke`.

A key is `sk-finery-` and 256 random bits; the table holds its SHA-256. A slow password hash would buy nothing: nobody can guess 256
random bits, and every request pays for the check. A key belongs to one project and sees nothing of another.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.database import Database
from finery_common.errors import (
    FailedPreconditionError,
    FineryError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from finery_common.resource_names import PROJECT
from finery_gateway.limits import LIMIT_NAMES, KeyLimits
from finery_gateway.settings import GatewaySettings
from finery_gateway.tables import ApiKeyRow, migrate

PREFIX = "sk-finery-"
DEFAULT_PROJECT = "default"
CACHE_TTL_S = 5.0
GRACE_S = 60.0
_CACHE_SIZE = 10_000
_FIRST_KEY_ID = "key-first"
_LIMITS_HELP = {
    "requests_per_minute": "REST requests a minute",
    "tokens_per_minute": "prompt and generated tokens a minute",
    "concurrent_streams": "generations at one time",
}


@dataclass(frozen=True)
class ApiKey:
    """What may be shown of a key."""

    id: str
    project: str
    hint: str
    """Its last four characters."""
    created_at: datetime
    revoked_at: datetime | None
    limits: KeyLimits


@dataclass(frozen=True)
class Grant:
    """What a good key opens."""

    key_id: str
    project: str
    limits: KeyLimits


class KeyStore:
    """The keys of an installation. Checks are remembered for `CACHE_TTL_S`: a revoked key ends, and new limits hold, that much later;
    while the database cannot be asked, `GRACE_S` later.
    """

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        # With the time of the check.
        self._known: dict[str, tuple[Grant, float]] = {}
        self._asking: dict[str, asyncio.Task[Grant]] = {}

    async def project_of(self, key: str) -> str:
        """The project that `key` opens. Raises UnauthenticatedError for a wrong or revoked one."""
        return (await self.grant_of(key)).project

    async def grant_of(self, key: str) -> Grant:
        """What `key` opens, and its limits. Raises UnauthenticatedError for a wrong or revoked one."""
        digest = _digest(key)
        grant, checked_s = self._known.get(digest, (None, 0.0))
        age_s = self._clock() - checked_s
        if grant is not None and age_s < CACHE_TTL_S:
            return grant
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._ask(digest))
            task.add_done_callback(lambda done: self._asked(digest, done))
        try:
            # One question for all who wait; it goes on when one of them leaves.
            return await asyncio.shield(task)
        except UnavailableError:
            if grant is None or age_s >= GRACE_S:
                raise
            return grant

    def _asked(self, digest: str, done: asyncio.Task[Grant]) -> None:
        del self._asking[digest]
        if not done.cancelled():
            done.exception()  # Seen, though everybody who waited may have left.

    async def _ask(self, digest: str) -> Grant:
        async with self._db.read() as session:
            row = await session.scalar(sa.select(ApiKeyRow).where(ApiKeyRow.digest == digest, ApiKeyRow.revoked_at.is_(None)))
        if row is None:
            self._known.pop(digest, None)
            raise UnauthenticatedError(
                "The API key is not known here or was revoked; send `Authorization: Bearer sk-finery-…` with a valid one."
            )
        if len(self._known) >= _CACHE_SIZE:
            self._known.clear()
        grant = Grant(row.id, row.project, _limits(row))
        self._known[digest] = (grant, self._clock())
        return grant

    async def create(self, project: str, *, limits: KeyLimits | None = None) -> tuple[ApiKey, str]:
        """A new key of `project`, with its text, which nothing can show again. Raises InvalidArgumentError for a malformed project."""
        row, text = _new_key(project, key_id=f"key-{secrets.token_hex(6)}", limits=limits or KeyLimits())
        async with self._db.begin() as session:
            session.add(row)
        return _shown(row), text

    async def list(self, project: str | None = None) -> tuple[ApiKey, ...]:
        """Every key, oldest first, of `project` where given."""
        query = sa.select(ApiKeyRow).order_by(ApiKeyRow.created_at)
        if project is not None:
            query = query.where(ApiKeyRow.project == project)
        async with self._db.read() as session:
            return tuple(_shown(row) for row in await session.scalars(query))

    async def update(self, project: str, *, key_id: str, limits: Mapping[str, int | None]) -> ApiKey:
        """Sets the limits that are named, None for unlimited, and leaves the others.

        Raises NotFoundError where `project` has no such key that is still good, InvalidArgumentError for none or one out of bounds.
        """
        if not limits:
            raise InvalidArgumentError(f"No limit was named; wanted one or more of {', '.join(LIMIT_NAMES)}.")
        async with self._db.begin() as session:
            row = await _good_key(session, project, key_id=key_id)
            for name, value in asdict(replace(_limits(row), **limits)).items():
                setattr(row, name, value)
            self._known.pop(row.digest, None)
            return _shown(row)

    async def revoke(self, project: str, *, key_id: str) -> ApiKey:
        """Ends a key. Raises NotFoundError where `project` has none of that id that is still good."""
        async with self._db.begin() as session:
            row = await _good_key(session, project, key_id=key_id)
            row.revoked_at = datetime.now(UTC)
            self._known.pop(row.digest, None)
            return _shown(row)

    async def ensure_first(self, file: Path) -> bool:
        """On an empty table makes the first key, of project `default`, and leaves it in `file` with mode 600; true where it did."""
        row, text = _new_key(DEFAULT_PROJECT, key_id=_FIRST_KEY_ID, limits=KeyLimits())
        try:
            async with self._db.begin() as session:
                if await session.scalar(sa.select(ApiKeyRow.id).limit(1)) is not None:
                    return False
                session.add(row)
                await session.flush()
                # Before the commit: a key in the table that nobody was told would leave the installation closed.
                await asyncio.to_thread(write_private, file, text + "\n")
        except IntegrityError:
            return False  # Another process of this installation was first.
        except OSError as error:
            raise FailedPreconditionError(
                f"The first API key cannot be written to {file}: {error.strerror}; make the folder writable."
            ) from error
        return True


def write_private(file: Path, text: str) -> None:
    """Writes `file` whole, readable by its owner only from the first byte on. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def _good_key(session: AsyncSession, project: str, *, key_id: str) -> ApiKeyRow:
    query = sa.select(ApiKeyRow).where(ApiKeyRow.id == key_id, ApiKeyRow.project == project, ApiKeyRow.revoked_at.is_(None))
    row = await session.scalar(query)
    if row is None:
        raise NotFoundError(f"There is no key {key_id} in project {project} that is not revoked; list shows what there is.")
    return row


def _new_key(project: str, *, key_id: str, limits: KeyLimits) -> tuple[ApiKeyRow, str]:
    if not PROJECT.fullmatch(project):
        raise InvalidArgumentError(f"project: got {project!r}, wanted 1 to 63 of a-z, 0-9 and - inside", param="project")
    text = PREFIX + secrets.token_urlsafe(32)
    made = {"id": key_id, "project": project, "digest": _digest(text), "hint": text[-4:], "created_at": datetime.now(UTC)}
    return ApiKeyRow(**made, revoked_at=None, **asdict(limits)), text


def _limits(row: ApiKeyRow) -> KeyLimits:
    return KeyLimits(
        requests_per_minute=row.requests_per_minute, tokens_per_minute=row.tokens_per_minute, concurrent_streams=row.concurrent_streams
    )


def _shown(row: ApiKeyRow) -> ApiKey:
    return ApiKey(row.id, row.project, row.hint, row.created_at, row.revoked_at, _limits(row))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finery_gateway.keys", description="API keys of this installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it; it is shown this once")
    create.add_argument("--project", required=True)
    _add_limits(create)
    show = commands.add_parser("list", help="one JSON object a line, without the keys themselves")
    show.add_argument("--project")
    update = commands.add_parser("update", help="change a key's limits; those not named stay")
    update.add_argument("--project", required=True)
    update.add_argument("--id", required=True, help="as `list` shows it")
    _add_limits(update)
    revoke = commands.add_parser("revoke", help="end a key")
    revoke.add_argument("--project", required=True)
    revoke.add_argument("--id", required=True, help="as `list` shows it")
    return parser.parse_args(argv)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    for name, what in _LIMITS_HELP.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=_limit, default=argparse.SUPPRESS, metavar="N", help=f"{what}, or `unlimited`")


def _limit(text: str) -> int | None:
    if text == "unlimited":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number or `unlimited`") from None


async def _run(arguments: argparse.Namespace, settings: GatewaySettings) -> str:
    db = await Database.open(settings.service_database_url("gateway"), schema="gateway")
    try:
        await migrate(db)
        store = KeyStore(db)
        limits = {name: value for name, value in vars(arguments).items() if name in LIMIT_NAMES}
        if arguments.command == "create":
            _, text = await store.create(arguments.project, limits=KeyLimits(**limits))
            return text
        if arguments.command == "update":
            shown = (await store.update(arguments.project, key_id=arguments.id, limits=limits),)
        elif arguments.command == "revoke":
            shown = (await store.revoke(arguments.project, key_id=arguments.id),)
        else:
            shown = await store.list(arguments.project)
        return "\n".join(json.dumps(asdict(key), default=lambda time: time.isoformat()) for key in shown)
    finally:
        await db.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; answers the exit status."""
    arguments = _arguments(argv)
    try:
        output = asyncio.run(_run(arguments, GatewaySettings()))
    except FineryError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    if output:
        sys.stdout.write(output + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
