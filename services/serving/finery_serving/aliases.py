"""Aliases and rollouts in the database: the desired state, which outlives every process.

Owns idempotent deploys, the flip by compare-and-swap, and the order of rollouts of one alias. Leaves carrying them out to `rollout`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, InvalidArgumentError, NotFoundError
from finery_serving.changes import Changes
from finery_serving.tables import AliasRow, RolloutRow

_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,256}")
_ADAPTER_PREFIX = re.compile(r"projects/(?P<project>[^/]+)/adapters/(?P<job_id>[A-Za-z0-9_][A-Za-z0-9_-]*)-(?P<step>[0-9]+)/")
_MAX_REQUEST_ID = 128
_MAX_PAGE_SIZE = 1000


class RolloutState(StrEnum):
    """How far a rollout is; the names are those of the wire."""

    PENDING = "PENDING"
    STAGING = "STAGING"
    LOADING = "LOADING"
    PROBING = "PROBING"
    DRAINING = "DRAINING"
    READY = "READY"
    FAILED = "FAILED"

    @property
    def is_final(self) -> bool:
        """Nothing follows."""
        return self in (RolloutState.READY, RolloutState.FAILED)

    @property
    def is_before_flip(self) -> bool:
        """The alias may still change by it."""
        return not self.is_final and self != RolloutState.DRAINING


_BEFORE_FLIP = [state.value for state in RolloutState if state.is_before_flip]
_ACTIVE = [state.value for state in RolloutState if not state.is_final]


@dataclass(frozen=True)
class Rollout:
    """A version on its way to an alias. `swap_s` is from staged to flipped, in seconds."""

    number: int
    project: str
    alias: str
    version: str
    job_id: str
    adapter: ArtifactRef
    state: RolloutState
    error: Mapping[str, object] | None
    swap_s: float | None


@dataclass(frozen=True)
class Alias:
    """A public model name of a project. `version` and `adapter` are empty before the first flip, which `epoch` counts."""

    project: str
    alias: str
    base_model: str
    version: str
    job_id: str
    adapter: ArtifactRef | None
    etag: str
    epoch: int
    rollout: Rollout
    created_at: datetime
    updated_at: datetime


def version_of(adapter: ArtifactRef) -> tuple[str, str]:
    """vLLM's name for an adapter, `<job>-<step>-<first 8 of the manifest's digest>`, and its job.

    Raises InvalidArgumentError for what lies elsewhere.
    """
    match = _ADAPTER_PREFIX.fullmatch(adapter.prefix)
    if match is None or adapter.kind != "adapter":
        raise InvalidArgumentError(
            f"adapter: got {adapter.kind} {adapter.prefix!r}, wanted an adapter under projects/{{project}}/adapters/{{job}}-{{step}}/",
            param="adapter",
        )
    return f"{match['job_id']}-{match['step']}-{adapter.manifest_sha256[:8]}", match["job_id"]


class AliasStore:
    """Every method that takes a project sees that project only. Changes are signalled once they are committed."""

    def __init__(self, database: Database, *, changes: Changes) -> None:
        self._db = database
        self._changes = changes

    async def deploy(self, project: str, alias: str, *, adapter: ArtifactRef, base_model: str, request_id: str, etag: str = "") -> Alias:
        """Records that `adapter` shall serve under `alias`, which is made where it does not exist.

        The same request id and body answer the same rollout's alias. Raises InvalidArgumentError, AlreadyExistsError (the request id was
        used for something else), NotFoundError (repeated after the alias was deleted; or another project's adapter), AbortedError (`etag`).
        """
        _check_deploy(project, alias, adapter=adapter, base_model=base_model, request_id=request_id)
        version, job_id = version_of(adapter)
        body = json.dumps([alias, adapter.model_dump(mode="json"), etag], sort_keys=True)
        body_sha256 = hashlib.sha256(body.encode()).hexdigest()
        try:
            async with self._db.begin() as session:
                if (
                    known := await self._known_request(session, project, alias, request_id=request_id, body_sha256=body_sha256)
                ) is not None:
                    return known
                now = datetime.now(UTC)
                rollout = RolloutRow(
                    project=project, alias=alias, request_id=request_id, body_sha256=body_sha256, version=version, job_id=job_id,
                    adapter=adapter.model_dump(mode="json"), state=RolloutState.PENDING, created_at=now, updated_at=now,
                )  # fmt: skip
                row = await session.get(AliasRow, (project, alias), with_for_update=True)
                _check_etag(row, etag=etag, alias=alias)
                session.add(rollout)
                await session.flush()
                if row is None:
                    row = AliasRow(project=project, alias=alias, base_model=base_model, version="", job_id="", epoch=0, created_at=now)
                    row.etag = _new_etag()
                    session.add(row)
                row.rollout_number = rollout.number
                row.updated_at = now
                made = _alias(row, rollout)
        except IntegrityError as error:
            raise AbortedError(f"Another request changed {alias} at the same moment; repeat this one.") from error
        self._changes.notify()
        return made

    async def get(self, project: str, alias: str) -> Alias:
        """The alias as it is now. Raises NotFoundError."""
        async with self._db.read() as session:
            found = await self._find(session, project, alias)
        if found is None:
            raise _not_found(project, alias)
        return found

    async def list(self, project: str, *, page_size: int = 0, page_token: str = "") -> tuple[tuple[Alias, ...], str]:
        """Aliases of `project` by name after `page_token`, and the token of the next page; a `page_size` of 0 means 1,000, the most."""
        if page_size < 0:
            raise InvalidArgumentError(f"page_size: got {page_size}, wanted 0 to {_MAX_PAGE_SIZE}", param="page_size")
        size = min(page_size or _MAX_PAGE_SIZE, _MAX_PAGE_SIZE)
        query = _SELECT.where(AliasRow.project == project, AliasRow.alias > page_token).order_by(AliasRow.alias).limit(size + 1)
        async with self._db.read() as session:
            found = [_alias(*row) for row in (await session.execute(query))]
        return tuple(found[:size]), found[size - 1].alias if len(found) > size else ""

    async def delete(self, project: str, alias: str, *, etag: str = "") -> None:
        """Takes the alias out and ends its rollouts as FAILED. Raises NotFoundError, AbortedError (`etag`)."""
        async with self._db.begin() as session:
            row = await session.get(AliasRow, (project, alias), with_for_update=True)
            if row is None:
                raise _not_found(project, alias)
            _check_etag(row, etag=etag, alias=alias)
            await session.delete(row)
            await session.flush()
            error = {"code": "alias_deleted", "message": f"{alias} was deleted before its rollout was done."}
            ended = sa.update(RolloutRow).where(RolloutRow.project == project, RolloutRow.alias == alias, RolloutRow.state.in_(_ACTIVE))
            await session.execute(ended.values(state=RolloutState.FAILED, error=error, updated_at=datetime.now(UTC)))
        self._changes.notify()

    async def desired(self) -> tuple[Alias, ...]:
        """Every alias of every project that serves something, newest change first."""
        async with self._db.read() as session:
            rows = (await session.execute(_SELECT.where(AliasRow.version != "").order_by(AliasRow.updated_at.desc()))).all()
        return tuple(_alias(*row) for row in rows)

    async def active_rollouts(self) -> tuple[Rollout, ...]:
        """Rollouts that are not done, in the order they came in."""
        async with self._db.read() as session:
            query = sa.select(RolloutRow).where(RolloutRow.state.in_(_ACTIVE)).order_by(RolloutRow.number)
            return tuple(_rollout(row) for row in await session.scalars(query))

    async def advance(self, rollout: Rollout, to: RolloutState) -> None:
        """Notes how far the rollout is. Raises AbortedError where it has ended meanwhile: its alias was deleted."""
        await self._update(rollout, states=_BEFORE_FLIP, state=to)

    async def flip(self, rollout: Rollout, *, etag: str, swap_s: float) -> None:
        """Puts the rollout's version under its alias if that still has `etag`; the rollout is DRAINING then. Raises AbortedError if not."""
        now = datetime.now(UTC)
        async with self._db.begin() as session:
            values = {"state": RolloutState.DRAINING, "swap_s": swap_s, "updated_at": now}
            await _update_rollout(session, rollout, states=_BEFORE_FLIP, values=values)
            flipped = await session.scalar(
                sa.update(AliasRow)
                .where(AliasRow.project == rollout.project, AliasRow.alias == rollout.alias, AliasRow.etag == etag)
                .values(
                    version=rollout.version,
                    adapter=rollout.adapter.model_dump(mode="json"),
                    job_id=rollout.job_id,
                    etag=_new_etag(),
                    epoch=AliasRow.epoch + 1,
                    updated_at=now,
                )
                .returning(AliasRow.epoch)
            )
            if flipped is None:
                raise AbortedError(f"{rollout.alias} was changed by something else during this rollout; deploy again.")
        self._changes.notify()

    async def finish(self, rollout: Rollout, *, error: Mapping[str, object] | None = None) -> None:
        """Ends the rollout: READY, or FAILED with `error`. One that has ended already stays as it is."""
        state = RolloutState.READY if error is None else RolloutState.FAILED
        try:
            await self._update(rollout, states=_ACTIVE, state=state, error=error and dict(error))
        except AbortedError:
            return

    async def _update(self, rollout: Rollout, *, states: list[str], **values: object) -> None:
        async with self._db.begin() as session:
            await _update_rollout(session, rollout, states=states, values={**values, "updated_at": datetime.now(UTC)})
        self._changes.notify()

    async def _find(self, session: AsyncSession, project: str, alias: str) -> Alias | None:
        query = _SELECT.where(AliasRow.project == project, AliasRow.alias == alias)
        row = (await session.execute(query)).one_or_none()
        return None if row is None else _alias(*row)

    async def _known_request(self, session: AsyncSession, project: str, alias: str, *, request_id: str, body_sha256: str) -> Alias | None:
        known = await session.scalar(sa.select(RolloutRow).where(RolloutRow.project == project, RolloutRow.request_id == request_id))
        if known is None:
            return None
        if known.body_sha256 != body_sha256:
            raise AlreadyExistsError(f"request_id {request_id!r} was used for another deployment; use a fresh one.", param="request_id")
        found = await self._find(session, project, alias)
        if found is None:
            raise NotFoundError(
                f"{alias} was deployed by this request_id and has been deleted since; use a fresh request_id to deploy it again."
            )
        return found


_SELECT = sa.select(AliasRow, RolloutRow).join(RolloutRow, RolloutRow.number == AliasRow.rollout_number)


def _check_deploy(project: str, alias: str, *, adapter: ArtifactRef, base_model: str, request_id: str) -> None:
    if not _ALIAS.fullmatch(alias):
        raise InvalidArgumentError(f"alias: got {alias!r}, wanted 1 to 256 letters, digits and ._:-", param="alias")
    if alias == base_model:
        raise InvalidArgumentError(f"alias: {alias!r} is the base model's own name; choose another", param="alias")
    if not 1 <= len(request_id) <= _MAX_REQUEST_ID:
        raise InvalidArgumentError(f"request_id: got {len(request_id)} characters, wanted 1 to {_MAX_REQUEST_ID}", param="request_id")
    if not adapter.prefix.startswith(f"projects/{project}/"):
        raise NotFoundError(f"There is no artifact {adapter.prefix} in project {project}.", param="adapter")


def _check_etag(row: AliasRow | None, *, etag: str, alias: str) -> None:
    if etag and (row is None or row.etag != etag):
        raise AbortedError(f"{alias} no longer has the etag {etag}; read it again and decide anew.", param="etag")


async def _update_rollout(session: AsyncSession, rollout: Rollout, *, states: list[str], values: Mapping[str, object]) -> None:
    query = sa.update(RolloutRow).where(RolloutRow.number == rollout.number, RolloutRow.state.in_(states)).values(**values)
    if await session.scalar(query.returning(RolloutRow.number)) is None:
        raise AbortedError(f"The rollout of {rollout.version} under {rollout.alias} has ended: the alias was deleted.")


def _new_etag() -> str:
    return secrets.token_hex(8)


def _not_found(project: str, alias: str) -> NotFoundError:
    return NotFoundError(
        f"There is no model {alias!r} in project {project}; list the models to see what there is.", code="model_not_found", param="model"
    )


def _rollout(row: RolloutRow) -> Rollout:
    adapter = ArtifactRef.model_validate(row.adapter)
    return Rollout(row.number, row.project, row.alias, row.version, row.job_id, adapter, RolloutState(row.state), row.error, row.swap_s)


def _alias(row: AliasRow, rollout: RolloutRow) -> Alias:
    return Alias(
        project=row.project,
        alias=row.alias,
        base_model=row.base_model,
        version=row.version,
        job_id=row.job_id,
        adapter=None if row.adapter is None else ArtifactRef.model_validate(row.adapter),
        etag=row.etag,
        epoch=row.epoch,
        rollout=_rollout(rollout),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
