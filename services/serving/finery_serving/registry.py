"""The replicas of one base model: what each holds and whether it lives, as every agent sees it through the database.

Owns this replica's row, its view of all others, and what one asks another to load. Leaves what a replica ought to hold to `placement`.

Clocks are compared with nobody's: a replica lives while its row's beat moves, by the reader's monotonic clock. A row that does not move is
not believed, so that one of a killed agent leads nobody astray; one that has not moved for a minute is removed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from pydantic import TypeAdapter
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import FineryError
from finery_serving.changes import Changes
from finery_serving.residency import Residency
from finery_serving.tables import LoadRequestRow, ReplicaRow, RevisionRow, changing
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_process import VllmProcess

HEALTH_INTERVAL_S = 5.0
"""A replica whose agent gives no sign for this long gets no more requests."""
_BEAT_S = 1.0
_POLL_S = 0.2
_POLL_ALONE_S = 1.0
_FORGOTTEN_S = 60.0
_RATES_S = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Replica:
    """One vLLM as its agent describes it."""

    id: str
    address: str
    is_ready: bool = False
    """vLLM answers."""
    max_resident: int = 0
    started_at: datetime | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """What vLLM holds, each with its state of `metrics.ADAPTER_STATES`; and what it could not load as "failed"."""
    answering: frozenset[str] = frozenset()
    """Those of them that have answered a probe."""
    failures: Mapping[int, dict[str, str | None]] = field(default_factory=dict[int, dict[str, str | None]])
    """Why a rollout, by its number, cannot go on here."""
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    """Requests a second of each version, smoothed."""

    def serves(self, version: str) -> bool:
        """Whether requests for `version` are let in."""
        return self.is_ready and self.versions.get(version) == "loaded"


_REPLICA = TypeAdapter(Replica)


@dataclass
class _Seen:
    """Another's row at the latest look."""

    replica: Replica
    beat: int
    changed_s: float
    """When its beat was first seen as it is."""
    is_believed: bool = False
    """It was seen to move."""


class Registry:
    """The view of one agent. `run` keeps it up to date; changes of others are signalled as one's own are."""

    def __init__(self, database: Database, *, process: VllmProcess, residency: Residency, client: VllmClient, changes: Changes) -> None:
        self._db = database
        self._process = process
        self._residency = residency
        self._client = client
        self._changes = changes
        self._others: dict[str, _Seen] = {}
        self._rates: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._counted_s = 0.0
        self._written: Replica | None = None
        self._beat = 0
        self._beaten_s = 0.0
        # The revision and the others that live, as of the latest look.
        self._viewed: tuple[int, tuple[Replica, ...]] = (-1, ())
        self.loads_asked: dict[str, ArtifactRef] = {}
        """What others wait for this replica to load: versions and their adapters."""
        self.failures: dict[int, dict[str, str | None]] = {}
        """Why rollouts cannot go on here; for whoever works at them to keep."""

    @property
    def own(self) -> Replica:
        """This replica, as it is at this moment."""
        process, residency = self._process, self._residency
        return Replica(
            process.runtime.replica_id,
            process.runtime.endpoint.address,
            process.ready,
            process.config.max_cpu_loras,
            process.started_at,
            residency.states(),
            frozenset(version for version in residency.versions if residency.has_answered(version)),
            dict(self.failures),
            dict(self._rates),
        )

    @property
    def live(self) -> tuple[Replica, ...]:
        """Every replica whose agent lives, this one first."""
        oldest_s = time.monotonic() - HEALTH_INTERVAL_S
        return self.own, *(seen.replica for seen in self._others.values() if seen.is_believed and seen.changed_s >= oldest_s)

    @property
    def ready(self) -> tuple[Replica, ...]:
        """Those of them whose vLLM answers."""
        return tuple(replica for replica in self.live if replica.is_ready)

    @property
    def leads(self) -> bool:
        """Whether this agent decides for all. For a moment two may think so: what they decide is compared with the database's state."""
        return min((replica.id for replica in self.ready), default="") == self._process.runtime.replica_id

    def rate(self, version: str) -> float:
        """Requests a second for `version` on all replicas."""
        return sum(replica.rates.get(version, 0.0) for replica in self.live)

    def token_of(self, replica: Replica) -> str:
        """What a request to `replica` has to carry."""
        return self._process.runtime.token_of(replica.id)

    async def ask_to_load(self, replica: Replica, version: str, *, adapter: ArtifactRef) -> None:
        """Asks another replica to load `version`, which shows in its `versions` when it has."""
        try:
            async with changing(self._db) as session:
                if await session.get(LoadRequestRow, (replica.id, version)) is None:
                    session.add(LoadRequestRow(replica_id=replica.id, version=version, adapter=adapter.model_dump(mode="json")))
        except IntegrityError:
            log.info("asked by another agent at the same moment", version=version)

    async def loaded(self, version: str) -> None:
        """This replica has done, or tried, what was asked of it."""
        self.loads_asked.pop(version, None)
        async with changing(self._db) as session:
            await session.execute(delete(LoadRequestRow).where(LoadRequestRow.replica_id == self.own.id, LoadRequestRow.version == version))

    async def run(self) -> None:
        """Tells of this replica and looks at the others until cancelled, then takes its row out."""
        try:
            while True:
                seen = self._changes.count
                try:
                    await self._count_requests()
                    await self._tell()
                    await self._look()
                except FineryError as error:
                    log.warning("the registry of replicas is out of reach", reason=error.message)
                    await asyncio.sleep(_BEAT_S)
                else:
                    await self._changes.wait_after(seen, timeout_s=_POLL_S if self._others else _POLL_ALONE_S)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        try:
            await asyncio.shield(self._forget(self._process.runtime.replica_id))
        except FineryError as error:
            log.warning("this replica's row stays for others to remove", reason=error.message)

    async def _count_requests(self) -> None:
        """Every 10 s, half of the rate is the latest 10 s'."""
        elapsed_s = time.monotonic() - self._counted_s
        if elapsed_s < _RATES_S or not self._process.ready:
            return
        requests = (await self._client.state()).requests
        counts = {version: item.count for version, item in requests.items()}
        new = {version: max(0, count - self._counts.get(version, 0)) / elapsed_s for version, count in counts.items()}
        rates = {version: (self._rates.get(version, 0.0) + new.get(version, 0.0)) / 2 for version in {*self._rates, *new}}
        self._rates = {version: rate for version, rate in rates.items() if rate > 1e-4}
        self._counts, self._counted_s = counts, time.monotonic()

    async def _tell(self) -> None:
        own, now_s = self.own, time.monotonic()
        if own == self._written and now_s - self._beaten_s < _BEAT_S:
            return
        self._beat += 1
        row = ReplicaRow(
            id=own.id,
            base_model=self._process.config.base_model,
            address=own.address,
            beat=self._beat,
            state=_REPLICA.dump_python(own, mode="json"),
        )
        async with self._db.begin() as session:
            await session.merge(row)
        self._written, self._beaten_s = own, now_s

    async def _look(self) -> None:
        own_id = self._process.runtime.replica_id
        async with self._db.read() as session:
            revision = await session.scalar(select(RevisionRow.number)) or 0
            rows = (await session.scalars(select(ReplicaRow).where(ReplicaRow.base_model == self._process.config.base_model))).all()
            asked = (await session.scalars(select(LoadRequestRow).where(LoadRequestRow.replica_id == own_id))).all()
        now_s = time.monotonic()
        self._others = {row.id: self._seen(row, now_s) for row in rows if row.id != own_id}
        self.loads_asked = {row.version: ArtifactRef.model_validate(row.adapter) for row in asked}
        # Who has fallen silent since the last look is news as well.
        view = (revision, self.live[1:])
        if view != self._viewed:
            self._viewed = view
            self._changes.notify()
        for replica_id, seen in self._others.items():
            if now_s - seen.changed_s > _FORGOTTEN_S:
                log.warning("a replica is gone", replica=replica_id)
                await self._forget(replica_id)

    def _seen(self, row: ReplicaRow, now_s: float) -> _Seen:
        known = self._others.get(row.id)
        if known is not None and known.beat == row.beat:
            return known
        return _Seen(_REPLICA.validate_python(row.state), row.beat, now_s, is_believed=known is not None)

    async def _forget(self, replica_id: str) -> None:
        async with changing(self._db) as session:
            await session.execute(delete(LoadRequestRow).where(LoadRequestRow.replica_id == replica_id))
            await session.execute(delete(ReplicaRow).where(ReplicaRow.id == replica_id))
