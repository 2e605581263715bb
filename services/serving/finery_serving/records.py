"""What the tables of serving mean: aliases, the versions that they serve, rollouts.

Owns these types and reading them from rows. Leaves what may be done with them to `aliases` and `releases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from finery_common.artifacts import ArtifactRef
from finery_serving.tables import AliasRow, RolloutRow


class RolloutState(StrEnum):
    """How far a rollout is; the names are those of the wire."""

    PENDING = "PENDING"
    STAGING = "STAGING"
    LOADING = "LOADING"
    PROBING = "PROBING"
    DRAINING = "DRAINING"
    READY = "READY"
    FAILED = "FAILED"
    CANARY = "CANARY"
    ROLLED_BACK = "ROLLED_BACK"

    @property
    def is_final(self) -> bool:
        """Nothing follows."""
        return self in (RolloutState.READY, RolloutState.FAILED, RolloutState.ROLLED_BACK)

    @property
    def is_before_flip(self) -> bool:
        """The alias may still change by it, without anybody's word."""
        return not self.is_final and self not in (RolloutState.DRAINING, RolloutState.CANARY)


BEFORE_FLIP = [state.value for state in RolloutState if state.is_before_flip]
"""Words of the table, as are those that follow."""
ACTIVE = [state.value for state in RolloutState if not state.is_final]
AT_WORK = [state for state in ACTIVE if state != RolloutState.CANARY]


@dataclass(frozen=True)
class Rollout:
    """A version on its way to an alias. `swap_s` is from staged to flipped, in seconds; the flip's commit comes on top. None: not
    yet, or staged by another replica than the one that flipped.

    `canary_weight` is the share that it asks for in percent, 0 for the whole alias; `replaced` what it took the alias from, or "".
    """

    number: int
    project: str
    alias: str
    version: str
    job_id: str
    adapter: ArtifactRef
    base_model: str
    state: RolloutState
    error: Mapping[str, object] | None
    swap_s: float | None
    canary_weight: int
    replaced: str
    traceparent: str
    """The trace of the request that asked for it; empty where there is none."""


@dataclass(frozen=True)
class Served:
    """A version that an alias serves, or has served, and where it comes from."""

    version: str
    job_id: str
    adapter: ArtifactRef
    base_model: str


@dataclass(frozen=True)
class Alias:
    """A public model name of a project. `version` and `adapter` are empty before the first flip; `epoch` counts what changes routes.

    `canary` answers `canary_weight` percent of the requests; `previous` served before `version`. `base_model` is that of the version and
    of its canary.
    """

    project: str
    alias: str
    base_model: str
    version: str
    job_id: str
    adapter: ArtifactRef | None
    etag: str
    epoch: int
    rollout: Rollout
    canary: Served | None
    canary_weight: int
    previous: Served | None
    pinned: bool
    created_at: datetime
    updated_at: datetime

    @property
    def serving(self) -> tuple[Served, ...]:
        """What answers requests: the version, then its canary."""
        if self.adapter is None:
            return ()
        return Served(self.version, self.job_id, self.adapter, self.base_model), *([] if self.canary is None else [self.canary])


SELECT_ALIAS = sa.select(AliasRow, RolloutRow).join(RolloutRow, RolloutRow.number == AliasRow.rollout_number)
"""Each alias' row with that of its newest rollout."""


def rollout_of(row: RolloutRow, *, of_alias: str) -> Rollout:
    """The rollout of a row; `of_alias` is its alias' base model."""
    adapter = ArtifactRef.model_validate(row.adapter)
    return Rollout(
        row.number, row.project, row.alias, row.version, row.job_id, adapter, row.base_model or of_alias,
        RolloutState(row.state), row.error, row.swap_s, row.canary_weight, row.replaced, row.traceparent,
    )  # fmt: skip


def _served(version: str, job_id: str, adapter: Mapping[str, object] | None, *, base_model: str) -> Served | None:
    return Served(version, job_id, ArtifactRef.model_validate(adapter), base_model) if version else None


def alias_of(row: AliasRow, rollout: RolloutRow) -> Alias:
    """The alias of two rows as `SELECT_ALIAS` has them."""
    return Alias(
        project=row.project,
        alias=row.alias,
        base_model=row.base_model,
        version=row.version,
        job_id=row.job_id,
        adapter=None if row.adapter is None else ArtifactRef.model_validate(row.adapter),
        etag=row.etag,
        epoch=row.epoch,
        rollout=rollout_of(rollout, of_alias=row.base_model),
        canary=_served(row.canary_version, row.canary_job_id, row.canary_adapter, base_model=row.base_model),
        canary_weight=row.canary_weight,
        previous=_served(
            row.previous_version, row.previous_job_id, row.previous_adapter, base_model=row.previous_base_model or row.base_model
        ),
        pinned=row.pinned,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
