"""The replicas of an installation: what each serves and holds and whether it lives, as every agent sees it through the database.

Those of one base model are a pool, in which one leads. Owns this replica's row, its view of all others, and what one asks another to
load. Leaves what a replica ought to hold to `placement`.

Clocks are compared with nobody's: a replica lives while its row's beat moves, by the reader's monotonic clock. A row that does not move is
not believed, so that one of a killed agent leads nobody astray; one that has not moved for a minute is removed, the last of a base
model after 15, for it may only be starting anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import structlog
from pydantic import TypeAdapter
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from finery_common.artifacts import ArtifactRef
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError, FineryError
from finery_serving.aliases import check_served
from finery_serving.changes import Changes
from finery_serving.preflight import BaseModel
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
_COUNT_S = 1.0
_REMEMBERED_S = 900.0
"""The row of a base model's last replica stays for this long, and with it that the base model is served."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Replica:
    """One vLLM as its agent describes it."""

    id: str
    address: str
    base_model: str = ""
    base_model_sha256: str = ""
    """Empty as an agent of an earlier release tells of itself, and so are the limits that follow."""
    max_lora_rank: int = 0
    max_model_len: int = 0
    """In tokens."""
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


@dataclass(frozen=True)
class Pool:
    """A base model that is served. Its limits are what every replica keeps to, for a version may be placed on any; `live` is empty while
    none lives.
    """

    base_model: str
    base_model_sha256: str
    max_lora_rank: int
    max_model_len: int
    max_resident: int
    live: tuple[Replica, ...]

    @property
    def max_pins(self) -> int:
        """How many aliases may be pinned: one place stays free, for all other versions and for a pinned alias' next one."""
        return self.max_resident - 1

    def check_canary(self) -> None:
        """Raises FailedPreconditionError where a version and its canary cannot be loaded at once."""
        if self.max_resident < 2:
            raise FailedPreconditionError(
                "vLLM holds one adapter at a time, so that a version and its canary would take turns; raise FINERY_MAX_CPU_LORAS.",
                code="no_room_for_canary",
            )


def pool_of(replicas: Sequence[Replica], *, live: Sequence[Replica]) -> Pool:
    """The pool of `replicas`, at least one, as they tell of themselves."""
    told = [replica for replica in replicas if replica.base_model_sha256] or replicas
    return Pool(
        told[0].base_model,
        told[0].base_model_sha256,
        min(replica.max_lora_rank for replica in told),
        min(replica.max_model_len for replica in told),
        min(replica.max_resident for replica in told),
        tuple(live),
    )


@dataclass
class _Seen:
    """Another's row at the latest look."""

    replica: Replica
    beat: int
    changed_s: float
    """When its beat was first seen as it is; later by what this agent could not look since."""
    is_believed: bool = False
    """It was seen to move."""


class Registry:
    """The view of one agent. `run` keeps it up to date; changes of others are signalled as one's own are."""

    def __init__(
        self,
        database: Database,
        *,
        base: BaseModel,
        process: VllmProcess,
        residency: Residency,
        client: VllmClient,
        changes: Changes,
    ) -> None:
        self._db = database
        self._base = base
        self._process = process
        self._residency = residency
        self._client = client
        self._changes = changes
        self._others: dict[str, _Seen] = {}
        self._rates: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._counted_s = 0.0
        self._count_after_s = 0.0
        self._looked_s = time.monotonic()
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
            self._base.name,
            self._base.sha256,
            process.config.max_lora_rank,
            process.config.max_model_len,
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
        """Every replica of the installation whose agent lived at the latest look, this one first. Who cannot look knows of no other that it
        died.
        """
        oldest_s = self._looked_s - HEALTH_INTERVAL_S
        return self.own, *(seen.replica for seen in self._others.values() if seen.is_believed and seen.changed_s >= oldest_s)

    def ready_of(self, base_model: str) -> tuple[Replica, ...]:
        """Those of them that serve `base_model` and whose vLLM answers."""
        return tuple(replica for replica in self.live if replica.is_ready and replica.base_model == base_model)

    @property
    def ready(self) -> tuple[Replica, ...]:
        """Those of this replica's own pool."""
        return self.ready_of(self._base.name)

    @property
    def base_model(self) -> str:
        """What this replica serves."""
        return self._base.name

    @property
    def pools(self) -> dict[str, Pool]:
        """What is served, by the base model's name, in its order."""
        live: dict[str, list[Replica]] = {}
        for replica in self.live:
            live.setdefault(replica.base_model, []).append(replica)
        pools = {base: pool_of(replicas, live=replicas) for base, replicas in live.items()}
        for seen in self._others.values():
            pools.setdefault(seen.replica.base_model, pool_of([seen.replica], live=()))
        return dict(sorted(pools.items()))

    def pool(self, base_model: str) -> Pool:
        """One of them. Raises FailedPreconditionError where there is none."""
        pools = self.pools
        check_served(base_model, served=pools)
        return pools[base_model]

    @property
    def has_looked(self) -> bool:
        """Whether the rows of others have been read once."""
        return self._viewed[0] >= 0

    @property
    def leads(self) -> bool:
        """Whether this agent decides for its pool. For a moment two may think so: what they decide is compared with the database."""
        return min((replica.id for replica in self.ready), default="") == self._process.runtime.replica_id

    @property
    def rates(self) -> Mapping[str, float]:
        """Requests a second for each version on all replicas."""
        rates: Counter[str] = Counter()
        for replica in self.live:
            rates.update(replica.rates)
        return rates

    @property
    def is_told_ready(self) -> bool:
        """Whether this replica's row says that its vLLM answers, so that others send requests here."""
        return self._written is not None and self._written.is_ready

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
                    await self._changes.wait_after(seen, timeout_s=_POLL_S if self._others else _POLL_ALONE_S)
                except FineryError as error:
                    log.warning("the registry of replicas is out of reach", reason=error.message)
                    await asyncio.sleep(_BEAT_S)
                except Exception:
                    # vLLM needs no database: it outlives whatever one may answer.
                    log.exception("the registry of replicas failed as nobody expected; going on")
                    await asyncio.sleep(_BEAT_S)
        finally:
            await self._leave()

    async def _leave(self) -> None:
        """Takes this replica's row out; the last one's of its base model stays and says that nothing answers, so that whoever starts
        meanwhile knows of the base model.
        """
        own = self.own
        is_last = not any(replica.base_model == own.base_model for replica in self.live[1:])
        try:
            await asyncio.shield(self._write(replace(own, is_ready=False, versions={})) if is_last else self._forget(own.id))
        except FineryError as error:
            log.warning("this replica's row stays for others to remove", reason=error.message)
        except Exception:
            # vLLM is still to be stopped in order.
            log.exception("this replica's row stays for others to remove")

    async def _count_requests(self) -> None:
        """Every 10 s, half of the rate is the latest 10 s'. A vLLM that does not answer is not waited for: others want to hear of it."""
        if time.monotonic() < self._count_after_s or not self._process.ready:
            return
        self._count_after_s = time.monotonic() + _RATES_S
        try:
            async with asyncio.timeout(_COUNT_S):
                requests = (await self._client.state()).requests
        except (FineryError, TimeoutError):
            return
        elapsed_s = time.monotonic() - self._counted_s
        counts = {version: item.count for version, item in requests.items()}
        new = {version: max(0, count - self._counts.get(version, 0)) / elapsed_s for version, count in counts.items()}
        rates = {version: (self._rates.get(version, 0.0) + new.get(version, 0.0)) / 2 for version in {*self._rates, *new}}
        self._rates = {version: rate for version, rate in rates.items() if rate > 1e-4}
        self._counts, self._counted_s = counts, time.monotonic()

    async def _tell(self) -> None:
        own, now_s = self.own, time.monotonic()
        if own == self._written and now_s - self._beaten_s < _BEAT_S:
            return
        await self._write(own)
        self._written, self._beaten_s = own, now_s

    async def _write(self, own: Replica) -> None:
        self._beat += 1
        state = _REPLICA.dump_python(own, mode="json")
        async with self._db.begin() as session:
            await session.merge(ReplicaRow(id=own.id, base_model=own.base_model, address=own.address, beat=self._beat, state=state))

    async def _look(self) -> None:
        own_id = self._process.runtime.replica_id
        async with self._db.read() as session:
            revision = await session.scalar(select(RevisionRow.number)) or 0
            rows = (await session.scalars(select(ReplicaRow))).all()
            asked = (await session.scalars(select(LoadRequestRow).where(LoadRequestRow.replica_id == own_id))).all()
        now_s = time.monotonic()
        # Where the database was gone, it was so for those others as well, who now need a moment to tell of themselves.
        missed_s, self._looked_s = max(0.0, now_s - self._looked_s - _BEAT_S), now_s
        self._others = {row.id: self._seen(row, now_s, missed_s=missed_s) for row in rows if row.id != own_id}
        self.loads_asked = {row.version: ArtifactRef.model_validate(row.adapter) for row in asked}
        # Who has fallen silent since the last look is news as well.
        view = (revision, self.live[1:])
        if view != self._viewed:
            self._viewed = view
            self._changes.notify()
        for replica_id, seen in self._others.items():
            has_others = any(replica.base_model == seen.replica.base_model for replica in self.live)
            if now_s - seen.changed_s > (_FORGOTTEN_S if has_others else _REMEMBERED_S):
                log.warning("a replica is gone", replica=replica_id)
                await self._forget(replica_id)

    def _seen(self, row: ReplicaRow, now_s: float, *, missed_s: float) -> _Seen:
        known = self._others.get(row.id)
        if known is not None and known.beat == row.beat:
            return replace(known, changed_s=known.changed_s + missed_s)
        replica = replace(_REPLICA.validate_python(row.state), base_model=row.base_model)
        return _Seen(replica, row.beat, now_s, is_believed=known is not None)

    async def _forget(self, replica_id: str) -> None:
        async with changing(self._db) as session:
            await session.execute(delete(LoadRequestRow).where(LoadRequestRow.replica_id == replica_id))
            await session.execute(delete(ReplicaRow).where(ReplicaRow.id == replica_id))
