"""All aliases and the rollouts at work at one moment, read once for everybody in an agent who wants them.

A swap is some ten changes, and after each of them the reconciler, every rollout and every gateway's watch look at everything. Owns that
they share a look, and that what has not changed is not read anew. Leaves what a change is to `changes`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from finery_common.database import Database
from finery_serving.changes import Changes
from finery_serving.records import AT_WORK, SELECT_ALIAS, Alias, Rollout, alias_of, rollout_of
from finery_serving.tables import AliasRow, RolloutRow

_GOOD_FOR_S = 0.2
"""What nobody has told of is seen as late as that."""
_KEYS_AT_ONCE = 200

_Key = tuple[str, str]
_STAMPS = sa.select(AliasRow.project, AliasRow.alias, AliasRow.etag, AliasRow.updated_at, RolloutRow.number, RolloutRow.updated_at).join(
    RolloutRow, RolloutRow.number == AliasRow.rollout_number
)


@dataclass(frozen=True)
class Snapshot:
    """What one transaction has seen."""

    aliases: tuple[Alias, ...] = ()
    """Of every project, the newest change first."""
    rollouts: tuple[Rollout, ...] = ()
    """Those that want work, in the order they came in: not those which are done, nor canaries, which wait for somebody's word."""

    @property
    def desired(self) -> tuple[Alias, ...]:
        """Aliases that serve something."""
        return tuple(alias for alias in self.aliases if alias.version)

    def wants(self, version: str) -> bool:
        """Whether an alias serves `version`, or is about to."""
        coming = any(rollout.version == version and rollout.state.is_before_flip for rollout in self.rollouts)
        return coming or any(served.version == version for alias in self.desired for served in alias.serving)

    def of_project(self, project: str) -> dict[str, Alias]:
        """A project's aliases by name."""
        return {alias.alias: alias for alias in self.aliases if alias.project == project}


class Snapshots:
    """The snapshots of one agent."""

    def __init__(self, database: Database, *, changes: Changes) -> None:
        self._db = database
        self._changes = changes
        self._lock = asyncio.Lock()
        self._latest = Snapshot()
        self._count = -1
        self._read_s = 0.0
        # Aliases as they were read, each with what shows whether it has changed since.
        self._known: dict[_Key, tuple[object, Alias]] = {}

    async def latest(self) -> Snapshot:
        """One that is no older than the latest change when this was called."""
        wanted = self._changes.count
        async with self._lock:
            # Whoever waited for the lock takes what was read meanwhile, if that began late enough.
            if self._count < wanted or time.monotonic() - self._read_s > _GOOD_FOR_S:
                count, now_s = self._changes.count, time.monotonic()
                async with self._db.read() as session:
                    rollouts = await _rollouts(session)
                    aliases = await self._aliases(session)
                self._latest, self._count, self._read_s = Snapshot(aliases, rollouts), count, now_s
            return self._latest

    async def _aliases(self, session: AsyncSession) -> tuple[Alias, ...]:
        stamps = {(row[0], row[1]): tuple(row[2:]) for row in await session.execute(_STAMPS)}
        changed = [key for key, stamp in stamps.items() if key not in self._known or self._known[key][0] != stamp]
        known = {key: item for key, item in self._known.items() if key in stamps}
        for start in range(0, len(changed), _KEYS_AT_ONCE):
            keys = changed[start : start + _KEYS_AT_ONCE]
            query = SELECT_ALIAS.where(sa.tuple_(AliasRow.project, AliasRow.alias).in_(keys))
            for row in await session.execute(query):
                alias = alias_of(*row)
                known[alias.project, alias.alias] = stamps[alias.project, alias.alias], alias
        self._known = known
        return tuple(sorted((alias for _, alias in known.values()), key=lambda alias: alias.updated_at, reverse=True))


async def _rollouts(session: AsyncSession) -> tuple[Rollout, ...]:
    # With their alias, which every one of them has.
    of_alias = sa.and_(AliasRow.project == RolloutRow.project, AliasRow.alias == RolloutRow.alias)
    query = sa.select(RolloutRow, AliasRow.base_model).join(AliasRow, of_alias).where(RolloutRow.state.in_(AT_WORK))
    return tuple(rollout_of(row, of_alias=base) for row, base in await session.execute(query.order_by(RolloutRow.number)))
