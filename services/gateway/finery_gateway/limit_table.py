"""How much of its limits each key has used, shared by every gateway process of this machine through one small mapped file.

A record is two moments (`limits.Bucket.full_at_s`, on the monotonic clock, which the processes of a machine share) and the open
generations, counted by process, so that those of a process that died can be told and dropped. An idle record says what a missing one
says, so the file needs no cleaning; the first process to open it starts it anew. Nothing here waits but for the few microseconds in
which another process writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finery_common.errors import FailedPreconditionError
from finery_gateway.limits import Bucket, KeyLimits, Refusal, Standing

MAX_PROCESSES = 64
_NUM_RECORDS = 16_384
_PROBES = 32
_NAME_BYTES = 16
_NO_NAME = bytes(_NAME_BYTES)
_MOMENTS = struct.Struct("=dd")
_STREAMS = struct.Struct(f"={MAX_PROCESSES}H")
_COUNT = struct.Struct("=H")
_RECORD_BYTES = _NAME_BYTES + _MOMENTS.size + _STREAMS.size
_FILE_BYTES = _NUM_RECORDS * _RECORD_BYTES
# struct flock of Linux on 64 bits: type, whence, start, length, pid. Such locks end with their owner, however it ends. Byte n stands for
# process n, the one after the last process for the right to write.
_FLOCK = struct.Struct("hhqqi4x")
_LOCK = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, MAX_PROCESSES, 1, 0)
_UNLOCK = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, MAX_PROCESSES, 1, 0)


class LimitTable:
    """This process's view of the table. A process that forks opens its own afterwards."""

    def __init__(self, descriptor: int, *, clock: Callable[[], float]) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._map = mmap.mmap(descriptor, _FILE_BYTES)
        self._process = 0

    @classmethod
    def open(cls, file: Path, *, clock: Callable[[], float] = time.monotonic) -> LimitTable:
        """Opens `file`, made where missing; another layout needs another name.

        Raises FailedPreconditionError where it cannot be opened, or too many processes have it open.
        """
        with contextlib.ExitStack() as failed:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                failed.callback(os.close, descriptor)
                if os.fstat(descriptor).st_size < _FILE_BYTES:
                    os.ftruncate(descriptor, _FILE_BYTES)
                table = cls(descriptor, clock=clock)
                with table._locked():
                    table._process = table._claim_process()
            except OSError as error:
                raise FailedPreconditionError(f"The limits' counts cannot be kept in {file}: {error}; make the folder writable.") from error
            failed.pop_all()
        return table

    def close(self) -> None:
        """Leaves the table; what this process had open counts no longer."""
        self._map.close()
        os.close(self._descriptor)

    def take(
        self, key_id: str, limits: KeyLimits, *, requests: int = 0, tokens: int = 0, streams: int = 0
    ) -> tuple[Standing, Refusal | None]:
        """Takes all of it, or nothing where one limit is in the way; how the key stands then."""
        with self._locked():
            now_s = self._clock()
            at = self._record(key_id, now_s=now_s)
            standing = self._standing(at, limits, now_s=now_s)
            refusal = _refusal(standing, requests=requests, tokens=tokens) or self._no_stream(at, limits, wanted=streams)
            if refusal is not None:
                return standing, refusal
            self._add_streams(at, streams)
            return self._charge(at, standing, requests=requests, tokens=tokens), None

    def charge(self, key_id: str, limits: KeyLimits, *, requests: int = 0, tokens: int = 0, streams: int = 0) -> Standing:
        """Takes without asking, or gives back what is negative; how the key stands then."""
        with self._locked():
            now_s = self._clock()
            at = self._record(key_id, now_s=now_s)
            self._add_streams(at, streams)
            return self._charge(at, self._standing(at, limits, now_s=now_s), requests=requests, tokens=tokens)

    def num_streams(self, key_id: str) -> int:
        """Open generations of a key, of every process."""
        with self._locked():
            return sum(self._streams(self._record(key_id, now_s=self._clock())))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLKW, _LOCK)
        try:
            yield
        finally:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _UNLOCK)

    def _claim_process(self) -> int:
        """The first number that no living process has, with nothing open under it."""
        if self._lock(0, number=MAX_PROCESSES):
            # Nobody else is here: what the file says may be of before the machine booted.
            self._map[:] = bytes(_FILE_BYTES)
            self._unlock(1, number=MAX_PROCESSES - 1)
            return 0
        for process in range(MAX_PROCESSES):
            if self._lock(process):
                for at in range(0, _FILE_BYTES, _RECORD_BYTES):
                    _COUNT.pack_into(self._map, _count_at(at, process), 0)
                return process
        raise FailedPreconditionError(f"{MAX_PROCESSES} gateway processes share this state directory, as many as can; run fewer.")

    def _lock(self, process: int, *, number: int = 1) -> bool:
        """Takes the place of a process, or of `number` from there on; false where another one lives there."""
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, process, number, 0))
        except BlockingIOError:
            return False
        return True

    def _unlock(self, process: int, *, number: int = 1) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, process, number, 0))

    def _record(self, key_id: str, *, now_s: float) -> int:
        """Where the record of a key is; it takes the place of an idle one, or of the one that is idle soonest."""
        name = hashlib.blake2b(key_id.encode(), digest_size=_NAME_BYTES).digest()
        first = int.from_bytes(name[:8]) % _NUM_RECORDS
        places = [(first + probe) % _NUM_RECORDS * _RECORD_BYTES for probe in range(_PROBES)]
        for at in places:
            found = self._map[at : at + _NAME_BYTES]
            if found == name:
                return at
            if found == _NO_NAME:
                break
        idle = (at for at in places if not self._idle_in_s(at, now_s=now_s))
        at = next(idle, None)
        if at is None:
            at = min(places, key=lambda at: self._idle_in_s(at, now_s=now_s))
        self._map[at : at + _RECORD_BYTES] = name + bytes(_RECORD_BYTES - _NAME_BYTES)
        return at

    def _idle_in_s(self, at: int, *, now_s: float) -> float:
        if any(self._streams(at)):
            return float("inf")
        return max(0.0, *(full_at_s - now_s for full_at_s in _MOMENTS.unpack_from(self._map, at + _NAME_BYTES)))

    def _standing(self, at: int, limits: KeyLimits, *, now_s: float) -> Standing:
        requests_s, tokens_s = _MOMENTS.unpack_from(self._map, at + _NAME_BYTES)
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        return Standing(
            requests=None if requests is None else Bucket(requests, requests_s, now_s),
            tokens=None if tokens is None else Bucket(tokens, tokens_s, now_s),
        )

    def _charge(self, at: int, standing: Standing, *, requests: int, tokens: int) -> Standing:
        after = Standing(
            requests=standing.requests and standing.requests.after(requests), tokens=standing.tokens and standing.tokens.after(tokens)
        )
        moments = (0.0 if bucket is None else bucket.full_at_s for bucket in (after.requests, after.tokens))
        _MOMENTS.pack_into(self._map, at + _NAME_BYTES, *moments)
        return after

    def _no_stream(self, at: int, limits: KeyLimits, *, wanted: int) -> Refusal | None:
        most = limits.concurrent_streams
        if not wanted or most is None or sum(self._streams(at)) + wanted <= most:
            return None
        self._drop_the_dead(at)
        return None if sum(self._streams(at)) + wanted <= most else Refusal("streams", None)

    def _drop_the_dead(self, at: int) -> None:
        for process, count in enumerate(self._streams(at)):
            if count and process != self._process and self._lock(process):
                _COUNT.pack_into(self._map, _count_at(at, process), 0)
                self._unlock(process)

    def _streams(self, at: int) -> tuple[int, ...]:
        return _STREAMS.unpack_from(self._map, at + _NAME_BYTES + _MOMENTS.size)

    def _add_streams(self, at: int, number: int) -> None:
        if number:
            place = _count_at(at, self._process)
            _COUNT.pack_into(self._map, place, max(0, _COUNT.unpack_from(self._map, place)[0] + number))


def _count_at(at: int, process: int) -> int:
    return at + _NAME_BYTES + _MOMENTS.size + process * _COUNT.size


def _refusal(standing: Standing, *, requests: int, tokens: int) -> Refusal | None:
    """The limit that has to be waited for longest."""
    waits = [
        Refusal(name, bucket.wait_s(cost))
        for name, bucket, cost in (("requests", standing.requests, requests), ("tokens", standing.tokens, tokens))
        if bucket is not None and cost
    ]
    worst = max(waits, key=lambda refusal: refusal.wait_s or 0.0, default=None)
    return worst if worst is not None and worst.wait_s else None
