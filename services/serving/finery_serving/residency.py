"""Which versions vLLM holds: loading, room for more, draining, unloading.

Owns the replica's observed state, its LRU order and what is exempt from it. vLLM never holds more than `max_cpu_loras` adapters, so it
never reads one again from disk in the middle of its work; a version that had to make room is loaded again when it is asked for. Leaves
what ought to be there to `reconcile`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from finery_common.errors import FailedPreconditionError, FineryError, UnavailableError
from finery_serving.changes import Changes
from finery_serving.metrics import EVICTIONS, LOAD_SECONDS
from finery_serving.vllm_client import RETRY_AFTER_S, ReplicaState, VllmClient
from finery_serving.vllm_process import VllmProcess

_POLL_S = 0.1
_REFUSE_S = 0.5
"""Those who wait to hear of a flip wait no longer for what it replaced to be refused."""

log = structlog.get_logger(__name__)


@dataclass
class _Resident:
    adapter_id: int | None
    """vLLM's number; None until it has told it."""
    path: Path
    last_used_s: float
    is_admitted: bool = False
    """Noted before vLLM is told otherwise and after it is told so: whatever becomes of the call, nobody is sent where he is refused."""
    is_refused: bool = False
    """vLLM has said that it lets no request in, and was not told otherwise since."""
    is_probed: bool = False


class Residency:
    """The versions in one vLLM. Methods that need it raise UnavailableError while it is starting or when it dies."""

    def __init__(self, process: VllmProcess, *, client: VllmClient, max_resident: int, changes: Changes) -> None:
        self._process = process
        self._client = client
        self._max_resident = max_resident
        self._changes = changes
        self._generation = 0
        self._resident: dict[str, _Resident] = {}
        # The drop that is at each; another, or none, once somebody has pinned the version meanwhile.
        self._draining: dict[str, object] = {}
        # What each `refuse` at work has left to do.
        self._refusing: list[set[str]] = []
        self._failed: set[str] = set()
        self._pins: Tally[str] = Tally()
        self._kept: frozenset[str] = frozenset()
        self._loading: tuple[Path, ...] = ()
        # What vLLM had that nobody here knew of.
        self._strays: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether vLLM answers."""
        return self._process.ready

    @property
    def generation(self) -> int:
        """Counts the starts of vLLM; each begins with no version."""
        return self._process.generation

    @property
    def versions(self) -> tuple[str, ...]:
        """What vLLM holds, draining or not."""
        return tuple(self._resident) if self._process.ready and self._generation == self._process.generation else ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folders that vLLM may read."""
        return (*(self._resident[version].path for version in self.versions), *self._loading)

    def serves(self, version: str) -> bool:
        """Whether requests for `version` are let in; marks it as used now."""
        if self.state_of(version) != "loaded":
            return False
        self._resident[version].last_used_s = time.monotonic()
        return True

    def state_of(self, version: str) -> str:
        """One of `metrics.ADAPTER_STATES`."""
        if version not in self.versions:
            return "failed" if version in self._failed else "cold"
        return "loaded" if self._resident[version].is_admitted else "draining"

    def states(self) -> dict[str, str]:
        """What `state_of` says of every version that vLLM holds or could not load."""
        return {version: self.state_of(version) for version in {*self.versions, *self._failed}}

    def note_probe(self, version: str) -> None:
        """`version` has answered its probe, which holds for as long as it stays loaded."""
        self._resident[version].is_probed = True

    def has_answered(self, version: str) -> bool:
        """Whether `version` is let in and has answered a probe."""
        return self.state_of(version) == "loaded" and self._resident[version].is_probed

    def keep(self, versions: Collection[str]) -> None:
        """From now on `versions`, and no others, never make room. Loading them is the caller's business."""
        self._kept = frozenset(versions)

    def forget_failures(self, *, but_of: Collection[str]) -> None:
        """Of versions that nobody wants any more, nobody asks why they could not be loaded."""
        self._failed.intersection_update(but_of)

    @contextmanager
    def pinned(self, version: str) -> Iterator[None]:
        """Keeps `version` from having to make room, and from being dropped, while the block runs."""
        self._pins[version] += 1
        self._draining.pop(version, None)
        for left in self._refusing:
            left.discard(version)
        try:
            yield
        finally:
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]

    async def ensure(self, version: str, *, path: Path, deadline_s: float) -> None:
        """Loads `version` from `path` and lets requests in, unless that is so already; `deadline_s` is on the monotonic clock.

        Raises FailedPreconditionError where vLLM refuses it, UnavailableError where all versions that could make room are busy until then.
        """
        if self.serves(version):
            return
        with self.pinned(version):
            # Who asks may leave; what vLLM was told meanwhile must still be noted.
            while not await asyncio.shield(asyncio.ensure_future(self._try_load(version, path=path))):
                if time.monotonic() > deadline_s:
                    raise UnavailableError(
                        "Every adapter that vLLM has room for is answering requests; repeat later.", retry_after_s=RETRY_AFTER_S
                    )
                await asyncio.sleep(_POLL_S)

    async def refuse(self, versions: Iterable[str]) -> None:
        """Lets no request for `versions` in, but for those that somebody pins now or meanwhile; unloading them is left to `drop`.

        Gives up where vLLM, or a load that is at work, takes longer than a moment: refusing is left to `drop`, too, then.
        """
        left = {version for version in versions if self._may_be_let_in(version) and not self._pins[version]}
        if not left:
            return
        self._refusing.append(left)
        try:
            with suppress(FineryError, TimeoutError):
                async with asyncio.timeout(_REFUSE_S), self._lock:
                    while left:
                        version = left.pop()
                        if self._may_be_let_in(version):
                            await self._retire(version)
        finally:
            self._refusing = [other for other in self._refusing if other is not left]

    async def drop(self, version: str) -> None:
        """Lets no request in, waits until the last one in flight has ended, then unloads; given up where somebody pins it meanwhile.

        Raises UnavailableError where vLLM dies, and the version with it.
        """
        while version in self._draining:
            await self._changes.wait_after(self._changes.count)
        self._draining[version] = own = object()
        try:
            # The count of requests in flight is another process's.
            while not await self._try_drop(version, own):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        finally:
            if self._draining.get(version) is own:
                del self._draining[version]
            self._changes.notify()

    async def reconcile(self) -> None:
        """Brings what is known here and what vLLM has together; a load of ours that is at work has the lock.

        What vLLM has finished loading after whoever wanted it gave up is unloaded: nobody asks for such a version, since none is let in
        that is not known here. Only what the call before this saw as well, so that whoever loads and unloads past the agent is left alone.
        What vLLM no longer has is cold, and is loaded again when it is asked for.
        """
        async with self._lock:
            if not self._process.ready:
                return
            known, held = self.versions, (await self._client.state()).adapters
            strays = {version: adapter.id for version, adapter in held.items() if version not in known}
            seen, self._strays = self._strays, frozenset(strays)
            for version in seen & strays.keys():
                await self._client.unload(version, adapter_id=strays[version])
                log.warning("an adapter that vLLM had loaded too late was unloaded", version=version)
            for version in known:
                if version not in held:
                    await self._client.retire(version)
                    del self._resident[version]
                    log.warning("an adapter was no longer in vLLM", version=version)

    async def _try_drop(self, version: str, drop: object) -> bool:
        async with self._lock:
            if self._pins[version] or self._draining.get(version) is not drop or version not in self.versions:
                return True
            if await self._retire(version):
                return False
            await self._unload(version)
            return True

    async def _try_load(self, version: str, *, path: Path) -> bool:
        """Whether `version` is served now; False where nothing could make room."""
        async with self._lock:
            if not self._process.ready:
                raise UnavailableError("vLLM is starting; repeat later.", retry_after_s=RETRY_AFTER_S)
            if self._generation != self._process.generation:
                self._generation, self._resident = self._process.generation, {}
            if self.serves(version):
                return True
            is_new = version not in self._resident
            if is_new and len(self._resident) >= self._max_resident and not await self._make_room():
                return False
            self._loading = (path,)
            try:
                await self._load(version, path=path)
            finally:
                self._loading = ()
            return True

    async def _load(self, version: str, *, path: Path) -> None:
        """Registers and admits; one that was retired without being unloaded is taken over."""
        started_s = time.perf_counter()
        self._failed.discard(version)
        try:
            if version not in self._resident:
                await self._register(version, path=path)
                self._resident[version] = _Resident(None, path, time.monotonic())
            self._resident[version].is_refused = False
            try:
                known = await self._client.admit(version)
            except FailedPreconditionError:
                # What an unload that was cut short has left.
                await self._register(version, path=path)
                known = await self._client.admit(version)
        except FineryError:
            self._failed.add(version)
            raise
        assert Path(known.path) == path, "a version has one folder for good"
        self._resident[version] = _Resident(known.id, path, time.monotonic(), is_admitted=True)
        load_s = time.perf_counter() - started_s
        LOAD_SECONDS.observe(load_s)
        log.info("adapter loaded", version=version, load_s=round(load_s, 3))
        self._changes.notify()

    async def _register(self, version: str, *, path: Path) -> None:
        """Loads the adapter into vLLM, which may have it already: where an answer of its was lost."""
        try:
            await self._client.load(version, path=path)
        except FineryError:
            if version not in (await self._client.state()).adapters:
                raise

    async def _make_room(self) -> bool:
        """Unloads the version that was used longest ago among those that are idle."""
        state = await self._client.state()
        idle = [version for version in self._resident if self._may_go(version) and not state.in_flight.get(version)]
        for version in sorted(idle, key=lambda name: self._idle_s(name, state), reverse=True):
            if await self._retire(version):
                self._resident[version].is_refused = False
                await self._client.admit(version)
                self._resident[version].is_admitted = True
                continue
            await self._unload(version)
            EVICTIONS.labels(self._process.runtime.replica_id).inc()
            return True
        return False

    def _idle_s(self, version: str, state: ReplicaState) -> float:
        """Seconds since the version was last asked: routes to it are kept, so that most requests come without being announced."""
        announced_s = time.monotonic() - self._resident[version].last_used_s
        requests = state.requests.get(version)
        return announced_s if requests is None else min(announced_s, requests.idle_s)

    def _may_go(self, version: str) -> bool:
        return not self._pins[version] and version not in self._kept

    def _may_be_let_in(self, version: str) -> bool:
        return version in self.versions and not self._resident[version].is_refused

    async def _retire(self, version: str) -> int:
        resident = self._resident[version]
        resident.is_admitted = False
        num_in_flight = await self._client.retire(version)
        resident.is_refused = True
        return num_in_flight

    async def _unload(self, version: str) -> None:
        adapter_id = self._resident[version].adapter_id
        if adapter_id is None and (known := (await self._client.state()).adapters.get(version)):
            adapter_id = known.id
        await self._client.unload(version, adapter_id=adapter_id)
        del self._resident[version]
        log.info("adapter unloaded", version=version)
