"""What people decide of a version that serves already: a canary's weight, promotion, rolling back, pins.

Owns that each is one transaction, done once however often it is asked for, and that of two at once one wins. Leaves loading, draining
and unloading to `reconcile`, which sees in the database what is wanted.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import AbortedError, AlreadyExistsError, FailedPreconditionError
from finery_serving.aliases import (
    alias_not_found,
    body_digest,
    check_etag,
    check_request_id,
    check_served,
    check_weight,
    drop_canary,
    find_alias,
    mark_changed,
    new_etag,
    serve,
)
from finery_serving.changes import Changes
from finery_serving.metrics import SWAPS
from finery_serving.records import BEFORE_FLIP, Alias, RolloutState, Served
from finery_serving.tables import AliasRow, RequestRow, RevisionRow, RolloutRow, changing

_Act = Callable[[AsyncSession, AliasRow], Awaitable[str]]


class Releases:
    """Every method sees its project only and answers the alias as it is afterwards. Changes are signalled once they are committed."""

    def __init__(self, database: Database, *, changes: Changes) -> None:
        self._db = database
        self._changes = changes

    async def set_weight(self, project: str, alias: str, *, weight: int, etag: str = "") -> Alias:
        """Gives the canary `weight` percent of the requests.

        Raises InvalidArgumentError, NotFoundError, AbortedError (`etag`), FailedPreconditionError without a canary.
        """
        check_weight(weight, param="weight")
        async with changing(self._db) as session:
            row = await _locked(session, project, alias)
            check_etag(row, etag=etag, alias=alias)
            _canary(row)
            if row.canary_weight != weight:
                row.canary_weight = weight
                mark_changed(row)
            changed = await _flushed(session, row)
        self._changes.notify()
        return changed

    async def promote(self, project: str, alias: str, *, request_id: str, etag: str = "") -> Alias:
        """Flips the alias to its canary; the canary's rollout is DRAINING then.

        The same request id and body promote once. Raises InvalidArgumentError, AlreadyExistsError (the request id was used for something
        else), NotFoundError, AbortedError (something else changed the alias first), FailedPreconditionError without a canary.
        """
        return await self._once(project, alias, action="promote", request_id=request_id, etag=etag, act=_promote)

    async def roll_back(self, project: str, alias: str, *, served: Collection[str], request_id: str, etag: str = "") -> Alias:
        """Ends what is newer than the serving version, a canary or rollouts under way; else begins a rollout of the version before it.

        The same request id and body roll back once. Raises as `promote` does, FailedPreconditionError where there was nothing before, or
        a version whose base model is not among `served` any more.
        """
        act = partial(_roll_back, served=served)
        return await self._once(project, alias, action="roll_back", request_id=request_id, etag=etag, act=act)

    async def pin(self, project: str, alias: str, *, max_pins: int) -> Alias:
        """Keeps the alias' version loaded.

        `max_pins` aliases of its base model can be pinned. Projects that have one may pin even shares of them; what a project pinned while
        others had none stays. Raises NotFoundError, FailedPreconditionError where there are as many pins, or the project has its share.
        """
        async with changing(self._db) as session:
            row = await _locked(session, project, alias)
            # Of two at once, at whichever agents, the second counts the first: both must not take the last room.
            await session.execute(sa.select(RevisionRow.number).with_for_update())
            if not row.pinned:
                _check_pins(await _pins_by_project(session, row.base_model), project=project, max_pins=max_pins, alias=alias)
            row.pinned, row.updated_at = True, datetime.now(UTC)
            pinned = await _flushed(session, row)
        self._changes.notify()
        return pinned

    async def unpin(self, project: str, alias: str) -> Alias:
        """Lets the alias' version make room again. Raises NotFoundError."""
        async with changing(self._db) as session:
            row = await _locked(session, project, alias)
            row.pinned, row.updated_at = False, datetime.now(UTC)
            unpinned = await _flushed(session, row)
        self._changes.notify()
        return unpinned

    async def _once(self, project: str, alias: str, *, action: str, request_id: str, etag: str, act: _Act) -> Alias:
        """Does `act` to the alias, unless this request has done it before."""
        check_request_id(request_id)
        body_sha256 = body_digest([action, alias, etag])
        seen = etag or await self._etag(project, alias)
        outcome = None
        try:
            async with changing(self._db) as session:
                row = await _locked(session, project, alias)
                # Behind the lock: of one request that comes twice at once, the second finds the first done.
                if not await _is_known(session, project, request_id, body_sha256=body_sha256):
                    # Without an etag as well: what was read when the request came in must still hold, or two at once would both act.
                    check_etag(row, etag=seen, alias=alias)
                    session.add(RequestRow(project=project, request_id=request_id, body_sha256=body_sha256, created_at=datetime.now(UTC)))
                    outcome = await act(session, row)
                done = await _flushed(session, row)
        except IntegrityError as error:
            raise AbortedError(f"Another request changed {alias} at the same moment; repeat this one.") from error
        if outcome is not None:
            SWAPS.labels(outcome).inc()
        self._changes.notify()
        return done

    async def _etag(self, project: str, alias: str) -> str:
        async with self._db.read() as session:
            return await session.scalar(sa.select(AliasRow.etag).where(AliasRow.project == project, AliasRow.alias == alias)) or ""


async def _locked(session: AsyncSession, project: str, alias: str) -> AliasRow:
    row = await session.get(AliasRow, (project, alias), with_for_update=True)
    if row is None:
        raise alias_not_found(project, alias)
    return row


async def _flushed(session: AsyncSession, row: AliasRow) -> Alias:
    await session.flush()
    project, alias = row.project, row.alias
    # Rollouts are changed by statements, which the session's objects do not see.
    session.expire_all()
    found = await find_alias(session, project, alias)
    assert found is not None, "the row is locked"
    return found


async def _is_known(session: AsyncSession, project: str, request_id: str, *, body_sha256: str) -> bool:
    known = await session.get(RequestRow, (project, request_id))
    if known is not None and known.body_sha256 != body_sha256:
        raise AlreadyExistsError(f"request_id {request_id!r} was used for another request; use a fresh one.", param="request_id")
    return known is not None


async def _promote(session: AsyncSession, row: AliasRow) -> str:
    canary = _canary(row)
    begun = sa.update(RolloutRow).where(
        RolloutRow.project == row.project, RolloutRow.alias == row.alias, RolloutRow.state == RolloutState.CANARY
    )
    await session.execute(begun.values(state=RolloutState.DRAINING, replaced=row.version, updated_at=datetime.now(UTC)))
    # Its rollout is a canary's no longer, so that this leaves it alone.
    await drop_canary(session, row)
    serve(row, canary)
    return "promoted"


async def _roll_back(session: AsyncSession, row: AliasRow, *, served: Collection[str]) -> str:
    under_way = sa.update(RolloutRow).where(
        RolloutRow.project == row.project, RolloutRow.alias == row.alias, RolloutRow.state.in_(BEFORE_FLIP)
    )
    ended = under_way.values(state=RolloutState.ROLLED_BACK, updated_at=datetime.now(UTC)).returning(RolloutRow.rolls_back)
    rolled_back = (await session.scalars(ended)).all()
    if any(rolled_back):
        # Ending that one would be the opposite of what is asked for.
        raise AbortedError(f"{row.alias} is being rolled back already; wait until its rollout is done.")
    if row.canary_version:
        await drop_canary(session, row)
        mark_changed(row)
    elif rolled_back:
        row.etag, row.updated_at = new_etag(), datetime.now(UTC)
    else:
        await _roll_out_previous(session, row, served=served)
    return "rolled_back"


async def _roll_out_previous(session: AsyncSession, row: AliasRow, *, served: Collection[str]) -> None:
    if not row.previous_version:
        raise FailedPreconditionError(
            f"{row.alias} has neither a canary nor a version that served before; there is nothing to roll back to.",
            code="no_previous_version",
        )
    assert row.previous_adapter is not None, "a version has an adapter"
    base_model = row.previous_base_model or row.base_model
    check_served(base_model, served=served)
    now = datetime.now(UTC)
    rollout = RolloutRow(
        project=row.project, alias=row.alias, request_id=f"roll-back-{secrets.token_hex(16)}", body_sha256="",
        version=row.previous_version, job_id=row.previous_job_id, adapter=row.previous_adapter, base_model=base_model,
        state=RolloutState.PENDING, rolls_back=True, canary_weight=0, replaced="", created_at=now, updated_at=now,
    )  # fmt: skip
    session.add(rollout)
    await session.flush()
    # The etag changes already: of two that roll back, one does.
    row.rollout_number, row.etag, row.updated_at = rollout.number, new_etag(), now


def _canary(row: AliasRow) -> Served:
    if not row.canary_version:
        raise FailedPreconditionError(f"{row.alias} has no canary; deploy one with a canary weight first.", code="no_canary")
    return Served(row.canary_version, row.canary_job_id, ArtifactRef.model_validate(row.canary_adapter), row.base_model)


async def _pins_by_project(session: AsyncSession, base_model: str) -> dict[str, int]:
    """How many aliases of `base_model` each project has pinned; every project that has one is there."""
    num_pins = sa.func.count().filter(AliasRow.pinned).label("num_pins")
    query = sa.select(AliasRow.project, num_pins).where(AliasRow.base_model == base_model).group_by(AliasRow.project)
    rows = await session.execute(query)
    return {row.project: row.num_pins for row in rows}


def _check_pins(num_pins: Mapping[str, int], *, project: str, max_pins: int, alias: str) -> None:
    share, own, total = math.ceil(max_pins / len(num_pins)), num_pins[project], sum(num_pins.values())
    if max_pins < 1:
        text = "vLLM holds one adapter at a time;"
    elif total >= max_pins:
        text = f"{total} aliases are, of {max_pins} at the most, since all others share what room is left; unpin one or"
    elif own >= share:
        text = f"{own} aliases of this project are, its share of {max_pins} among {len(num_pins)} projects; unpin one or"
    else:
        return
    raise FailedPreconditionError(f"{alias} cannot be pinned: {text} raise FINERY_MAX_CPU_LORAS.", code="no_room_for_pins")
