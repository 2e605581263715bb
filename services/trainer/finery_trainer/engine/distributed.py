"""Data parallel training of adapters on several GPUs of one machine: every step's rows are shared out, their gradients summed.

    outcome = distributed.train(model, data, spec, on_step, base_dir=base_dir, training_dir=training_dir)

Replica 0 is the calling process; the others are its children (`replica`), each with a device, a model and an optimizer of its own. All go
through `loop.train` and take the same steps, since all see the same gradients; replica 0 alone reports, validates and saves, and says
before each step whether there is one. Owns the processes, the process group, and which replica takes which rows.
"""

from __future__ import annotations

import contextlib
import heapq
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection as mp_connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import structlog
import torch
import torch.distributed as dist

from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_common.leash import leashed
from finery_common.spec import TrainingSpec
from finery_trainer.engine import loop
from finery_trainer.engine.data import Samples, TokenDataset
from finery_trainer.engine.packing import Row, count_labels
from finery_trainer.engine.passes import PackedPasses, host_bytes, packed_passes
from finery_trainer.engine.stack import unsupported

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finery_trainer.engine.optim import Stepper

log = structlog.get_logger(__name__)

READY, DONE = "ready", "done"
"""What a replica says when its model is loaded, and when it has left the loop; an exception says that it failed."""
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Between replicas within a step. While replica 0 reports or saves, the others wait for its word, not in a collective."""
_END_S = 30.0
"""For the others to end after the last step."""
_NOTICE_S = 10.0
"""For the end of a process to be noticed after its connections have ended."""


class ReplicaLostError(UnavailableError):
    """The process of another replica is gone, or cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a replica must know to train along."""

    index: int
    devices: tuple[torch.device, ...]
    """Of all replicas, in order."""
    spec: TrainingSpec
    base_dir: Path
    training_dir: Path
    resume_from: Path | None
    rendezvous: Path
    """A file that does not exist yet, in a folder of this run alone."""
    num_threads: int
    """Of computations on a CPU."""

    @property
    def device(self) -> torch.device:
        return self.devices[self.index]


def train(
    model: PeftModel | PreTrainedModel,
    data: TokenDataset,
    spec: TrainingSpec,
    on_step: loop.OnStep,
    *,
    base_dir: Path,
    training_dir: Path,
    validation: TokenDataset | None = None,
    on_checkpoint: loop.OnCheckpoint | None = None,
    resume_from: Path | None = None,
    devices: Sequence[torch.device] | None = None,
) -> loop.Outcome:
    """As `loop.train`, on `devices` (default: the first `spec.gpus` GPUs), of which the first has `model`.

    The other replicas load `base_dir` and read `training_dir`, where `data` are from. What one of them raises, this raises. To be called
    from the main thread: the others end with the thread that started them.
    Raises FailedPreconditionError for a model outside the engine's families, ReplicaLostError where another replica's process dies.
    """
    devices = [torch.device("cuda", index) for index in range(spec.gpus)] if devices is None else devices
    if (reason := unsupported(model)) is not None:
        raise FailedPreconditionError(
            f"gpus: got {spec.gpus}, wanted 1 for this model, which the engine's own layers do not take ({reason}); set gpus to 1.",
            param="spec.gpus",
        )
    spec = _of_one(spec, num_replicas=len(devices))
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
        first = Task(
            index=0,
            devices=tuple(devices),
            spec=spec,
            base_dir=base_dir,
            training_dir=training_dir,
            resume_from=resume_from,
            rendezvous=Path(folder) / "rendezvous",
            num_threads=torch.get_num_threads(),
        )
        rest = [replace(first, index=index) for index in range(1, len(devices))]
        with _Others.started(rest) as others, _joined(first), others.explaining():
            outcome = loop.train(
                model,
                data,
                spec,
                others.reporting(on_step),
                validation=validation,
                on_checkpoint=on_checkpoint,
                resume_from=resume_from,
                passes=SharedPasses(packed_passes(model, spec, data, num_replicas=len(devices)), before_step=others.tell),
            )
            others.tell()
            return outcome


def follow(task: Task, connection: Connection) -> None:
    """Trains along as one of the replicas besides the first, whose words come through `connection`."""
    from finery_trainer.engine.model import load

    torch.set_num_threads(task.num_threads)
    if task.device.type == "cuda":
        torch.cuda.set_device(task.device)
    data = TokenDataset(task.training_dir)
    model = load(task.spec, task.base_dir, device=task.device)
    connection.send(READY)
    _join(task)
    passes = SharedPasses(packed_passes(model, task.spec, data, num_replicas=len(task.devices)))
    loop.train(model, data, task.spec, lambda _: cast("loop.Action", connection.recv()), resume_from=task.resume_from, passes=passes)
    # After an error the first replica must hear of it before others see the connections end.
    dist.destroy_process_group()


def shares(lengths: Sequence[int], *, num_replicas: int) -> list[list[int]]:
    """Indices into `lengths`, in order, for each replica: longest rows first, each to whoever has the fewest tokens (Graham 1969)."""
    given: list[list[int]] = [[] for _ in range(num_replicas)]
    loads = [(0, replica) for replica in range(num_replicas)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, replica = heapq.heappop(loads)
        given[replica].append(index)
        heapq.heappush(loads, (load + lengths[index], replica))
    return [sorted(indices) for indices in given]


class SharedPasses:
    """This replica's part of each step, and the sums over all of them. `before_step` is called before each step's passes.

    To be made and called by all replicas of the process group alike, but for `mean_loss`, which concerns no other.
    """

    def __init__(self, passes: PackedPasses, *, before_step: Callable[[], None] = lambda: None) -> None:
        self._passes = passes
        self._before_step = before_step

    def stepper(self, num_steps: int) -> Stepper:
        """See Passes. Trained values become replica 0's.

        Every collective of a step is done once before memory is planned: NCCL takes its buffers at the first of each kind.
        """
        stack = self._passes.stack
        for group in stack.groups:
            group.grads_N.zero_()
        try:
            for group in stack.groups:
                dist.broadcast(group.values_N, src=0)
        except RuntimeError as error:
            raise ReplicaLostError(f"Values cannot be given to the replicas: {error}") from error
        self._sum(torch.zeros((), device=stack.device))
        self._passes.refresh()
        return self._passes.stepper(num_steps)

    def prepare(self, rows: Sequence[Row]) -> None:
        """See Passes."""
        if mine := _mine(rows):
            self._passes.prepare(mine)

    def gradients(self, rows: Sequence[Row]) -> torch.Tensor:
        """See Passes: of all `rows`, the same bits on every replica."""
        self._before_step()
        mine = _mine(rows)
        num_labels = count_labels(rows)
        stack = self._passes.stack
        loss = self._passes.gradients(mine, num_labels=num_labels) if mine else torch.zeros((), device=stack.device)
        self._sum(loss)
        return loss

    def _sum(self, loss: torch.Tensor) -> None:
        """Gradients and `loss` become their sums over all replicas."""
        try:
            for tensor in (*(group.grads_N for group in self._passes.stack.groups), loss):
                dist.all_reduce(tensor)
        except RuntimeError as error:
            raise ReplicaLostError(f"Gradients cannot be summed over the replicas: {error}") from error

    def mean_loss(self, data: Samples[Row]) -> float:
        """See Passes."""
        return self._passes.mean_loss(data)

    def refresh(self) -> None:
        """See Passes."""
        self._passes.refresh()


def _join(task: Task) -> None:
    """Makes the process group of all replicas, the default one: NCCL between GPUs of their own, Gloo otherwise."""
    is_nccl = task.device.type == "cuda" and len(set(task.devices)) == len(task.devices)
    dist.init_process_group(
        "nccl" if is_nccl else "gloo",
        store=dist.FileStore(str(task.rendezvous), len(task.devices)),  # pyright: ignore[reportPrivateImportUsage]
        rank=task.index,
        world_size=len(task.devices),
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=task.device if is_nccl else None,
    )


@contextlib.contextmanager
def _joined(task: Task) -> Iterator[None]:
    _join(task)
    try:
        yield
    except BaseException:
        # An orderly end would wait for the others, who may not come.
        _abort()
        raise
    finally:
        dist.destroy_process_group()


def _abort() -> None:
    """Ends collectives that wait on a GPU; Gloo's end by themselves when a process is gone."""
    group = dist.group.WORLD
    if group is not None and dist.get_backend(group) == "nccl":
        group.abort()


def _mine(rows: Sequence[Row]) -> list[Row]:
    share = shares([len(ids) for ids, _ in rows], num_replicas=dist.get_world_size())[dist.get_rank()]
    return [rows[index] for index in share]


def _of_one(spec: TrainingSpec, *, num_replicas: int) -> TrainingSpec:
    """The spec of one of several replicas, which share the host's memory."""
    memory = spec.memory.model_copy(update={"host_budget_bytes": host_bytes(spec) // num_replicas})
    return spec.model_copy(update={"memory": memory})


@dataclass(frozen=True)
class _Replica:
    """A child process and the line to it."""

    task: Task
    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls, task: Task) -> Self:
        ours, theirs = cast("tuple[Connection, Connection]", multiprocessing.Pipe())
        with theirs:
            descriptor = theirs.fileno()
            command = leashed([sys.executable, "-m", "finery_trainer.engine.replica", str(descriptor)])
            # Of a process group of its own: who tells the worker to stop means the worker, which then tells the others.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(descriptor,), process_group=0)
        replica = cls(task, process, ours)
        replica.send(task)
        return replica

    def send(self, message: object) -> None:
        """Where nobody is left to read it, `receive` says why."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> object:
        """The replica's next word. Raises what it raised, ReplicaLostError where its process is gone."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(message, Exception):
            raise message
        return message

    def end(self, *, grace_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace_s)
        self.process.kill()
        self.process.wait()

    def _gone(self) -> ReplicaLostError:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return ReplicaLostError(f"The training process on {self.task.device} (replica {self.task.index}) {how}.")


class _Others:
    """All replicas but this process, the first, which leads them."""

    def __init__(self) -> None:
        self._replicas: list[_Replica] = []
        self._watcher = threading.Thread(target=self._watch, name="replicas", daemon=True)
        self._untold: loop.Action | None = None
        self._failure: Exception | None = None

    @classmethod
    @contextlib.contextmanager
    def started(cls, tasks: Sequence[Task]) -> Iterator[Self]:
        """Processes that have loaded their models; they are gone afterwards."""
        others = cls()
        try:
            others._start(tasks)
            yield others
            for replica in others._replicas:
                replica.end(grace_s=_END_S)
        finally:
            others._end()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Raises another replica's failure in place of what it led to here."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ReplicaLostError):
                self._watcher.join(timeout=_NOTICE_S)
            if self._failure is None or self._failure is error:
                raise
            raise self._failure from error

    def reporting(self, on_step: loop.OnStep) -> loop.OnStep:
        """`on_step`, whose answer the others get by `tell`; not called for a step that failed elsewhere."""

        def report(step: loop.StepReport) -> loop.Action:
            if self._failure is not None:
                raise self._failure
            self._untold = on_step(step)
            return self._untold

        return report

    def tell(self) -> None:
        """Tells the others what the last report was answered with."""
        action, self._untold = self._untold, None
        if action is not None:
            for replica in self._replicas:
                replica.send(action)

    def _start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._replicas.append(_Replica.start(task))
        for replica in self._replicas:
            replica.receive()
        self._watcher.start()
        log.info("replicas are ready", num_replicas=len(tasks) + 1)

    def _end(self) -> None:
        for replica in self._replicas:
            replica.end(grace_s=0)
        if self._watcher.is_alive():
            self._watcher.join()
        for replica in self._replicas:
            replica.connection.close()

    def _watch(self) -> None:
        """Until one has failed, or all are done."""
        waiting = {replica.connection: replica for replica in self._replicas}
        while waiting:
            for ready in mp_connection.wait(list(waiting)):
                try:
                    waiting.pop(cast("Connection", ready)).receive()
                except Exception as error:  # noqa: BLE001 - raised in the main thread
                    self._failure = error
                    _abort()
                    return
