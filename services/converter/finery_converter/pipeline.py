"""Reading, computing and writing at the same time: two threads with short queues beside the one that computes.

Owns the threads, the buffers they hand around and how an error in one ends all. What is read, computed and written is its caller's.
Buffers are used again: fresh memory costs more than the arithmetic of a merge, since the kernel clears every page of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

T = TypeVar("T")
_POLL_S = 0.2


class Lease:
    """Bytes of a buffer for the while; whoever holds it last calls `release`."""

    def __init__(self, data: torch.Tensor, release: Callable[[], None]) -> None:
        self.data = data
        self.release = release


class Buffers:
    """`count` buffers of `size_bytes` each, made when first needed."""

    def __init__(self, *, count: int, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self, num_bytes: int) -> Lease:
        """Waits until a buffer is free. What is larger than a buffer gets memory of its own."""
        if num_bytes > self._size_bytes:
            return Lease(torch.empty(num_bytes, dtype=torch.uint8), lambda: None)
        buffer = self._free.get()
        if buffer is None:
            buffer = torch.empty(self._size_bytes, dtype=torch.uint8)
        return Lease(buffer[:num_bytes], lambda: self._free.put(buffer))


class ReadAhead(Generic[T]):
    """An iterator over `items` that a thread of its own advances, at most `depth` items ahead. A context manager."""

    def __init__(self, items: Iterable[T], *, depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item,)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  # raised again where the items are used
            self._put(error)

    def _put(self, item: tuple[T] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False


class WriteBehind:
    """Runs what is submitted in order on a thread of its own. A context manager; leaving it waits for all, unless an error is under way."""

    def __init__(self, *, depth: int) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Waits where `depth` jobs wait already. Raises what an earlier job raised."""
        if self._error is not None:
            raise self._error
        self._queue.put(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        """After an error jobs are taken and dropped, so that nobody waits for this thread for ever."""
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                job()
            except BaseException as error:  # noqa: BLE001  # raised again where jobs are submitted
                self._error = error
