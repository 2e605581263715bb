"""Aliases and rollouts in the database: the desired state, which outlives every process.

Owns idempotent deploys, flips and canaries by compare-and-swap, and the order of rollouts of one alias. Leaves carrying them out to
`rollout`, and what people decide of a version that serves already to `releases`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from finery_common.tracing import traceparent
from finery_serving.changes import Changes
from finery_serving.records import ACTIVE, BEFORE_FLIP, SELECT_ALIAS, Alias, Rollout, RolloutState, Served, alias_of
from finery_serving.snapshots import Snapshot, Snapshots
from finery_serving.tables import AliasRow, RolloutRow, changing

_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,256}")
_ADAPTER_PREFIX = re.compile(r"projects/(?P<project>[^/]+)/adapters/(?P<job_id>[A-Za-z0-9_][A-Za-z0-9_-]*)-(?P<step>[0-9]+)/")
_MAX_REQUEST_ID = 128
_MAX_PAGE_SIZE = 1000
_MAX_CANARY_WEIGHT = 99


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
        self._snapshots = Snapshots(database, changes=changes)

    async def snapshot(self) -> Snapshot:
        """All aliases of all projects and the rollouts at work, no older than the latest change that this agent knows of."""
        return await self._snapshots.latest()

    async def deploy(
        self,
        project: str,
        alias: str,
        *,
        adapter: ArtifactRef,
        base_model: str,
        served: Collection[str],
        request_id: str,
        etag: str = "",
        canary_weight: int | None = None,
    ) -> Alias:
        """Records that `adapter` of `base_model` shall serve under `alias`, which is made where it does not exist, or be its canary;
        `served` are the base models that there are replicas of.

        Where `etag` is given, the alias has a new one from now on: of two who deploy over what they both have read, one does. A rollout
        that is under way goes on all the same.

        The same request id and body answer the same rollout's alias. Raises InvalidArgumentError, AlreadyExistsError (the request id was
        used for something else), NotFoundError (repeated after the alias was deleted; or another project's adapter), AbortedError
        (`etag`), FailedPreconditionError (a base model that is not served; a canary beside nothing, beside itself or beside another base
        model).
        """
        check_owned(adapter, project=project)
        _check_deploy(alias, served=served, request_id=request_id)
        version, job_id = version_of(adapter)
        body: list[object] = [alias, adapter.model_dump(mode="json"), etag]
        if canary_weight is not None:
            check_weight(canary_weight, param="canary_weight")
            body.append(canary_weight)
        body_sha256 = body_digest(body)
        try:
            async with changing(self._db) as session:
                if (
                    known := await self._known_request(session, project, alias, request_id=request_id, body_sha256=body_sha256)
                ) is not None:
                    return known
                check_served(base_model, served=served)
                now = datetime.now(UTC)
                rollout = RolloutRow(
                    project=project, alias=alias, request_id=request_id, body_sha256=body_sha256, version=version, job_id=job_id,
                    adapter=adapter.model_dump(mode="json"), base_model=base_model, state=RolloutState.PENDING,
                    canary_weight=canary_weight or 0, replaced="", traceparent=traceparent(), created_at=now, updated_at=now,
                )  # fmt: skip
                row = await session.get(AliasRow, (project, alias), with_for_update=True)
                check_etag(row, etag=etag, alias=alias)
                if canary_weight is not None:
                    await _check_canary_early(session, row, rollout)
                session.add(rollout)
                await session.flush()
                if row is None:
                    row = _new_alias(project, alias, base_model=base_model, now=now)
                    session.add(row)
                if not row.version and row.base_model != base_model:
                    row.base_model, row.pinned = base_model, False
                row.rollout_number = rollout.number
                if etag:
                    row.etag = new_etag()
                row.updated_at = now
                made = alias_of(row, rollout)
        except IntegrityError as error:
            raise AbortedError(f"Another request changed {alias} at the same moment; repeat this one.") from error
        self._changes.notify()
        return made

    async def get(self, project: str, alias: str) -> Alias:
        """The alias as it is now. Raises NotFoundError."""
        async with self._db.read() as session:
            found = await find_alias(session, project, alias)
        if found is None:
            raise alias_not_found(project, alias)
        return found

    async def list(self, project: str, *, page_size: int = 0, page_token: str = "") -> tuple[tuple[Alias, ...], str]:
        """Aliases of `project` by name after `page_token`, and the token of the next page; a `page_size` of 0 means 1,000, the most."""
        if page_size < 0:
            raise InvalidArgumentError(f"page_size: got {page_size}, wanted 0 to {_MAX_PAGE_SIZE}", param="page_size")
        size = min(page_size or _MAX_PAGE_SIZE, _MAX_PAGE_SIZE)
        query = SELECT_ALIAS.where(AliasRow.project == project, AliasRow.alias > page_token).order_by(AliasRow.alias).limit(size + 1)
        async with self._db.read() as session:
            found = [alias_of(*row) for row in (await session.execute(query))]
        return tuple(found[:size]), found[size - 1].alias if len(found) > size else ""

    async def delete(self, project: str, alias: str, *, etag: str = "") -> None:
        """Takes the alias out and ends its rollouts as FAILED. Raises NotFoundError, AbortedError (`etag`)."""
        async with changing(self._db) as session:
            row = await session.get(AliasRow, (project, alias), with_for_update=True)
            if row is None:
                raise alias_not_found(project, alias)
            check_etag(row, etag=etag, alias=alias)
            await session.delete(row)
            await session.flush()
            error = {"code": "alias_deleted", "message": f"{alias} was deleted before its rollout was done."}
            ended = sa.update(RolloutRow).where(RolloutRow.project == project, RolloutRow.alias == alias, RolloutRow.state.in_(ACTIVE))
            await session.execute(ended.values(state=RolloutState.FAILED, error=error, updated_at=datetime.now(UTC)))
        self._changes.notify()

    async def advance(self, rollout: Rollout, to: RolloutState) -> None:
        """Notes how far the rollout is. Raises AbortedError where it has ended meanwhile: rolled back, or its alias was deleted."""
        await self._update(rollout, states=BEFORE_FLIP, state=to)

    async def flip(self, rollout: Rollout, *, epoch: int, swap_s: float | None) -> None:
        """Puts the rollout's version under its alias if that is still at `epoch`; the rollout is DRAINING then. Raises AbortedError if not.

        A canary is dropped: the version has the whole alias. Where its base model is another than before, a pin ends: it was for a place
        among the versions of that one.
        """
        async with changing(self._db) as session:
            row = await _unchanged(session, rollout, epoch=epoch)
            values: dict[str, object] = {"state": RolloutState.DRAINING, "swap_s": swap_s, "replaced": row.version}
            await _update_rollout(session, rollout, states=BEFORE_FLIP, values=values)
            await drop_canary(session, row)
            row.pinned = row.pinned and row.base_model == rollout.base_model
            serve(row, Served(rollout.version, rollout.job_id, rollout.adapter, rollout.base_model))
        self._changes.notify()

    async def start_canary(self, rollout: Rollout, *, epoch: int, swap_s: float | None) -> None:
        """Makes the rollout's version its alias' canary if that is still at `epoch`; the rollout is CANARY then. Raises AbortedError if
        not, FailedPreconditionError where it is the version that serves, or nothing serves, or a version of another base model.

        It takes the place of an earlier canary.
        """
        async with changing(self._db) as session:
            row = await _unchanged(session, rollout, epoch=epoch)
            _check_canary(row, alias=rollout.alias, version=rollout.version, base_model=rollout.base_model)
            await drop_canary(session, row)
            await _update_rollout(session, rollout, states=BEFORE_FLIP, values={"state": RolloutState.CANARY, "swap_s": swap_s})
            row.canary_version, row.canary_job_id = rollout.version, rollout.job_id
            row.canary_adapter, row.canary_weight = rollout.adapter.model_dump(mode="json"), rollout.canary_weight
            mark_changed(row)
        self._changes.notify()

    async def finish(self, rollout: Rollout, *, error: Mapping[str, object] | None = None) -> bool:
        """Ends the rollout: READY after draining, or FAILED with `error` before its flip; answers whether it was at that point."""
        state = RolloutState.READY if error is None else RolloutState.FAILED
        states = [RolloutState.DRAINING.value] if error is None else BEFORE_FLIP
        try:
            await self._update(rollout, states=states, state=state, error=error and dict(error))
        except AbortedError:
            return False
        return True

    async def _update(self, rollout: Rollout, *, states: list[str], **values: object) -> None:
        async with changing(self._db) as session:
            await _update_rollout(session, rollout, states=states, values=values)
        self._changes.notify()

    async def _known_request(self, session: AsyncSession, project: str, alias: str, *, request_id: str, body_sha256: str) -> Alias | None:
        known = await session.scalar(sa.select(RolloutRow).where(RolloutRow.project == project, RolloutRow.request_id == request_id))
        if known is None:
            return None
        if known.body_sha256 != body_sha256:
            raise AlreadyExistsError(f"request_id {request_id!r} was used for another deployment; use a fresh one.", param="request_id")
        found = await find_alias(session, project, alias)
        if found is None:
            raise NotFoundError(
                f"{alias} was deployed by this request_id and has been deleted since; use a fresh request_id to deploy it again."
            )
        return found


async def find_alias(session: AsyncSession, project: str, alias: str) -> Alias | None:
    """The alias as `session` sees it."""
    row = (await session.execute(SELECT_ALIAS.where(AliasRow.project == project, AliasRow.alias == alias))).one_or_none()
    return None if row is None else alias_of(*row)


def serve(row: AliasRow, served: Served) -> None:
    """Puts `served` under the alias, and remembers what it takes the place of."""
    if row.version and row.version != served.version:
        row.previous_version, row.previous_job_id, row.previous_adapter = row.version, row.job_id, row.adapter
        row.previous_base_model = row.base_model
    row.version, row.job_id, row.adapter = served.version, served.job_id, served.adapter.model_dump(mode="json")
    row.base_model = served.base_model
    mark_changed(row)


async def drop_canary(session: AsyncSession, row: AliasRow) -> None:
    """Takes the canary, if there is one, out of the alias; its rollout is ROLLED_BACK. The caller marks the alias as changed."""
    row.canary_version, row.canary_job_id, row.canary_adapter, row.canary_weight = "", "", None, 0
    ended = sa.update(RolloutRow).where(
        RolloutRow.project == row.project, RolloutRow.alias == row.alias, RolloutRow.state == RolloutState.CANARY
    )
    await session.execute(ended.values(state=RolloutState.ROLLED_BACK, updated_at=datetime.now(UTC)))


def mark_changed(row: AliasRow) -> None:
    """What serves under the alias has changed: routes and etags that were handed out are no longer good."""
    row.etag, row.epoch, row.updated_at = new_etag(), row.epoch + 1, datetime.now(UTC)


def _check_deploy(alias: str, *, served: Collection[str], request_id: str) -> None:
    if not _ALIAS.fullmatch(alias):
        raise InvalidArgumentError(f"alias: got {alias!r}, wanted 1 to 256 letters, digits and ._:-", param="alias")
    if alias in served:
        raise InvalidArgumentError(f"alias: {alias!r} is a base model's own name; choose another", param="alias")
    check_request_id(request_id)


def check_served(base_model: str, *, served: Collection[str]) -> None:
    """Raises FailedPreconditionError unless `base_model` is one of `served`."""
    if base_model not in served:
        known = ", ".join(sorted(served)) or "none"
        raise FailedPreconditionError(
            f"The adapter was trained on {base_model!r}, which is not served here; served are: {known}. Deploy an adapter of one of these, "
            "or have the operator add replicas that serve its base model.",
            code="base_model_not_served",
            param="adapter",
        )


def check_owned(adapter: ArtifactRef, *, project: str) -> None:
    """Raises NotFoundError for another project's adapter, as for one that is not there."""
    if not adapter.prefix.startswith(f"projects/{project}/"):
        raise NotFoundError(f"There is no artifact {adapter.prefix} in project {project}.", param="adapter")


def check_request_id(request_id: str) -> None:
    """Raises InvalidArgumentError where it is missing or too long."""
    if not 1 <= len(request_id) <= _MAX_REQUEST_ID:
        raise InvalidArgumentError(f"request_id: got {len(request_id)} characters, wanted 1 to {_MAX_REQUEST_ID}", param="request_id")


def check_weight(weight: int, *, param: str) -> None:
    """Raises InvalidArgumentError for what is no share of a canary."""
    if not 1 <= weight <= _MAX_CANARY_WEIGHT:
        raise InvalidArgumentError(
            f"{param}: got {weight}, wanted 1 to {_MAX_CANARY_WEIGHT} percent; promote it to give it all", param=param
        )


async def _check_canary_early(session: AsyncSession, row: AliasRow | None, rollout: RolloutRow) -> None:
    """Refuses a canary at once where no rollout is under way that would make it possible."""
    under_way = sa.select(RolloutRow.number).where(
        RolloutRow.project == rollout.project, RolloutRow.alias == rollout.alias, RolloutRow.state.in_(BEFORE_FLIP)
    )
    if row is None or await session.scalar(under_way.limit(1)) is None:
        _check_canary(row, alias=rollout.alias, version=rollout.version, base_model=rollout.base_model)


def _check_canary(row: AliasRow | None, *, alias: str, version: str, base_model: str) -> None:
    if row is None or not row.version:
        raise FailedPreconditionError(
            f"Nothing serves under {alias} yet, so there is nothing to split with a canary; deploy without a canary weight.",
            code="no_serving_version",
        )
    if row.version == version:
        raise FailedPreconditionError(f"{version} serves {alias} already; a canary must be another version.", code="already_serving")
    if row.base_model != base_model:
        raise FailedPreconditionError(
            f"{version} was trained on {base_model!r}, but what serves {alias} on {row.base_model!r}; a canary must be of the same base "
            "model. Deploy it without a canary weight, or under another alias.",
            code="canary_of_other_base_model",
        )


def check_etag(row: AliasRow | None, *, etag: str, alias: str) -> None:
    """Raises AbortedError unless the alias has the etag, where one is given."""
    if etag and (row is None or row.etag != etag):
        raise AbortedError(f"{alias} no longer has the etag {etag}; read it again and decide anew.", param="etag")


async def _update_rollout(session: AsyncSession, rollout: Rollout, *, states: list[str], values: Mapping[str, object]) -> None:
    query = sa.update(RolloutRow).where(RolloutRow.number == rollout.number, RolloutRow.state.in_(states))
    query = query.values(**values, updated_at=datetime.now(UTC))
    if await session.scalar(query.returning(RolloutRow.number)) is None:
        raise AbortedError(f"The rollout of {rollout.version} under {rollout.alias} has ended: it was rolled back, or the alias deleted.")


async def _unchanged(session: AsyncSession, rollout: Rollout, *, epoch: int) -> AliasRow:
    """The rollout's alias, locked. Raises AbortedError unless it serves what it did at `epoch`."""
    row = await session.get(AliasRow, (rollout.project, rollout.alias), with_for_update=True)
    if row is None or row.epoch != epoch:
        raise AbortedError(f"{rollout.alias} was changed by something else during this rollout; deploy again.")
    return row


def _new_alias(project: str, alias: str, *, base_model: str, now: datetime) -> AliasRow:
    return AliasRow(
        project=project, alias=alias, base_model=base_model, version="", job_id="", etag=new_etag(), epoch=0, created_at=now,
        canary_version="", canary_job_id="", canary_weight=0, previous_version="", previous_job_id="", previous_base_model="",
        pinned=False,
    )  # fmt: skip


def new_etag() -> str:
    """One that no alias has had."""
    return secrets.token_hex(8)


def body_digest(body: object) -> str:
    """The digest of a request, the same for equal ones."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def alias_not_found(project: str, alias: str) -> NotFoundError:
    """For an alias that the project does not have."""
    return NotFoundError(
        f"There is no model {alias!r} in project {project}; list the models to see what there is.", code="model_not_found", param="model"
    )
