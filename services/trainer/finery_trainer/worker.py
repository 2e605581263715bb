"""One attempt at a job: `python -m finery_trainer.worker`, started by a launcher that sets `WorkerSettings`.

Fetches what the server assigns, trains, reports, publishes. Exits with 0 when the server knows how the attempt ended (or has given
the job to another), with 75 when it was told to stop and has saved its state, with 78 when its settings are wrong, with 1 when
another attempt may do better.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import structlog
from prometheus_client import REGISTRY
from pydantic import ValidationError

from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.catalogue import Catalogue, folder_sha256, materialize
from finery_common.errors import DeadlineExceededError, FailedPreconditionError, FineryError, ResourceExhaustedError, UnavailableError
from finery_common.gpu_metrics import serve_gpu_metrics
from finery_common.jobs import JobState
from finery_common.rpc.messages import error_fields
from finery_common.rpc.status import unknown_error
from finery_common.spec import MethodType, TrainingSpec, invalid_fields
from finery_common.telemetry import announce_metrics, configure_logging, serve_metrics
from finery_common.tracing import configure_tracing, span
from finery_trainer.client import Assignment, Command
from finery_trainer.launchers import CONFIG_EXIT_CODE, STOPPED_EXIT_CODE, work_dir
from finery_trainer.link import AttemptOver, Link, ServerGone
from finery_trainer.machine import check_this_machine, use_cpus
from finery_trainer.publishing import MetricsTable, Publisher
from finery_trainer.records import AWAITING_BASE, CheckpointReport, StepMetrics
from finery_trainer.settings import WorkerSettings
from finery_trainer.worker_metrics import VramCollector

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finery_trainer.engine import loop

_FETCHING_BASE = "fetching the base model"
_BASE_POLL_S = 1.0

log = structlog.get_logger(__name__)


class Stopped(Exception):
    """The launcher told the worker to stop; its state is saved."""


class Cancelled(Exception):
    """The server wants the job cancelled."""


@dataclass(frozen=True)
class Inputs:
    """Local folders of what the attempt works on."""

    base_dir: Path
    base_sha256: str
    training_dir: Path
    validation_dir: Path | None
    checkpoint_dir: Path | None


class Worker:
    """Runs one attempt. `was_stopped` says whether the launcher wants the process to end."""

    def __init__(self, settings: WorkerSettings, *, link: Link, was_stopped: Callable[[], bool]) -> None:
        self._settings = settings
        self._link = link
        self._was_stopped = was_stopped

    def run(self) -> None:
        """Does the work and tells the server how it ended. Raises AttemptOver, ServerGone, Stopped, UnavailableError."""
        assignment = self._link.ask(lambda client: client.assignment())
        structlog.contextvars.bind_contextvars(job_id=assignment.job_id, epoch=assignment.epoch)
        folder = work_dir(self._settings.state_dir, job_id=assignment.job_id, epoch=assignment.epoch)
        vram = VramCollector(assignment.job_id)
        REGISTRY.register(vram)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with span("train job", parent=assignment.traceparent, job_id=assignment.job_id, epoch=assignment.epoch):
                self._work(assignment, folder)
        except Cancelled:
            self._link.ask(lambda client: client.finish(JobState.CANCELLED))
        except (UnavailableError, AttemptOver, ServerGone, Stopped):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the server must learn that the attempt failed
            fields = error_fields(explain(error, assignment))
            log.error("the attempt failed", code=fields["code"], error=fields["message"])
            self._link.ask(lambda client: client.finish(JobState.FAILED, error=fields))
        finally:
            REGISTRY.unregister(vram)
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self, assignment: Assignment, folder: Path) -> None:
        from transformers.utils import logging as transformers_logging

        from finery_trainer import engine

        transformers_logging.disable_progress_bar()
        check_this_machine(assignment.spec)
        log.info("computing on the CPU", num_threads=use_cpus(self._settings.cpu_threads))
        store = ArtifactStore.connect(self._settings.s3())
        with span("fetch"):
            inputs = self._fetch(assignment, store)
        self._enter("loading the base model")
        with span("load"):
            train = _method_of(assignment.spec, inputs)
            model = engine.load(assignment.spec, inputs.base_dir)
        publisher = Publisher(
            store,
            assignment=assignment,
            base_sha256=inputs.base_sha256,
            precision=engine.precision_of(assignment.spec.precision),
            device=model.device.type,
            confirm=self._link.confirm,
        )
        run = _Run(model, assignment, inputs, work_dir=folder, publisher=publisher, link=self._link, was_stopped=self._was_stopped)
        self._enter(f"training by {_path_of(model)}")
        with span("train"):
            outcome = train(model, on_step=run.on_step, on_checkpoint=run.on_checkpoint)
        with span("publish"):
            run.finish(outcome)

    def _fetch(self, assignment: Assignment, store: ArtifactStore) -> Inputs:
        cache_dir = self._settings.artifact_cache_dir
        self._enter("fetching the dataset")
        training_dir = store.fetch(assignment.training_dataset, cache_dir)
        validation_dir = None if assignment.validation_dataset is None else store.fetch(assignment.validation_dataset, cache_dir)
        checkpoint_dir = None if assignment.checkpoint is None else store.fetch(assignment.checkpoint, cache_dir)
        self._enter(_FETCHING_BASE)
        if self._settings.catalogue is None:
            raise FailedPreconditionError("FINERY_CATALOGUE is not set; set it to the YAML file of base models.")
        entry = Catalogue.load(self._settings.catalogue).get(assignment.spec.base_model)
        if entry.path is not None:
            self._await_base(entry.path)
        base_dir = materialize(entry, cache_dir=cache_dir, store=store)
        base_sha256 = folder_sha256(base_dir, memo_dir=cache_dir / "digests")
        return Inputs(base_dir, base_sha256, training_dir, validation_dir, checkpoint_dir)

    def _await_base(self, folder: Path) -> None:
        """Returns when it is there, or may not be awaited. Nothing is to be saved yet, so a pause ends the worker like a stop."""
        if folder.is_dir() or (wait_s := self._settings.worker_base_wait_s) == 0:
            return
        self._enter(AWAITING_BASE)
        deadline_s = time.monotonic() + wait_s
        while not folder.is_dir():
            if time.monotonic() >= deadline_s:
                raise DeadlineExceededError(
                    f"The base model's folder {folder} was not there after {wait_s:.0f} s; look at what fetches base models, "
                    "then create the job again."
                )
            if self._link.check() is Command.PAUSE:
                raise Stopped
            self._obey()
            time.sleep(_BASE_POLL_S)
        self._enter(_FETCHING_BASE)

    def _enter(self, phase: str) -> None:
        """Tells the server the phase, and ends here where it or the launcher wants an end."""
        self._link.phase = phase
        log.info("phase", phase=phase)
        self._link.confirm()
        self._obey()

    def _obey(self) -> None:
        if self._was_stopped():
            raise Stopped
        if self._link.command is Command.CANCEL:
            raise Cancelled


class _Run:
    """The loop's callbacks, and what follows it. What is about to be published is written into `work_dir`."""

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        assignment: Assignment,
        inputs: Inputs,
        *,
        work_dir: Path,
        publisher: Publisher,
        link: Link,
        was_stopped: Callable[[], bool],
    ) -> None:
        self._model = model
        self._assignment = assignment
        self._is_full = assignment.spec.method is MethodType.FULL
        self._base_dir = inputs.base_dir
        self._work_dir = work_dir
        self._publisher = publisher
        self._link = link
        self._was_stopped = was_stopped
        self._table = MetricsTable() if inputs.checkpoint_dir is None else MetricsTable.restored(inputs.checkpoint_dir)
        self._resumed_from = inputs.checkpoint_dir
        self._is_stopping = False
        self._published: tuple[int, ArtifactRef] | None = None

    def on_step(self, report: loop.StepReport) -> loop.Action:
        from finery_trainer.engine.loop import Action

        metrics = _metrics_of(report)
        self._table.add(metrics)
        command = self._link.report(lambda client: client.report_step(metrics))
        self._is_stopping = self._was_stopped()
        if command is Command.CANCEL:
            return Action.CANCEL
        return Action.PAUSE if command is Command.PAUSE or self._is_stopping else Action.CONTINUE

    def on_checkpoint(self, report: loop.StepReport, save: Callable[[Path], None]) -> None:
        adapter = None
        with tempfile.TemporaryDirectory(prefix="state-", dir=self._work_dir) as folder:
            save(Path(folder))
            self._table.write(Path(folder))
            state = self._publisher.state(Path(folder), step=report.step)
        if report.is_epoch_end and not self._is_full:
            adapter = self._publish_adapter(report.step)
        done = CheckpointReport(report.step, state, adapter, _metrics_of(report))
        self._link.ask(lambda client: client.report_checkpoint(done))

    def finish(self, outcome: loop.Outcome) -> None:
        """Tells the server how training ended; where it is done, publishes first."""
        from finery_trainer.engine.loop import Action

        if outcome.action is Action.CANCEL:
            raise Cancelled
        if outcome.action is Action.PAUSE:
            if self._is_stopping:
                raise Stopped
            self._link.ask(lambda client: client.finish(JobState.PAUSED))
            return
        self._link.phase = "publishing"
        step = self._last_step(outcome)
        adapter, model = None, None
        if self._is_full:
            model = self._publish_model(step)
        else:
            # The last step was an epoch's end, so this attempt, or one that died after that step, has published this adapter.
            adapter = self._publish_adapter(step)
        with tempfile.TemporaryDirectory(prefix="metrics-", dir=self._work_dir) as folder:
            self._table.write(Path(folder))
            metrics_file = self._publisher.metrics(Path(folder), step=step)
        self._link.ask(lambda client: client.finish(JobState.SUCCEEDED, adapter=adapter, model=model, metrics_file=metrics_file))

    def _last_step(self, outcome: loop.Outcome) -> int:
        from finery_trainer.engine.checkpoint import read_cursor

        if outcome.last is not None:
            return outcome.last.step
        assert self._resumed_from is not None, "a run of no steps was resumed at its end"
        return read_cursor(self._resumed_from).step

    def _publish_adapter(self, step: int) -> ArtifactRef:
        from finery_trainer.engine import adapter

        if self._published is not None and self._published[0] == step:
            return self._published[1]
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=self._work_dir) as folder:
            adapter.save(cast("PeftModel", self._model), Path(folder), base_model=self._assignment.spec.base_model)
            ref = self._publisher.adapter(Path(folder), step=step)
        self._published = step, ref
        return ref

    def _publish_model(self, step: int) -> ArtifactRef:
        from finery_trainer.engine import full_model

        with tempfile.TemporaryDirectory(prefix="model-", dir=self._work_dir) as folder:
            full_model.save(cast("PreTrainedModel", self._model), Path(folder), base_dir=self._base_dir)
            return self._publisher.model(Path(folder), step=step)


def _method_of(spec: TrainingSpec, inputs: Inputs) -> Callable[..., loop.Outcome]:
    """The engine's loop for the spec's method and GPUs, its data read; it wants the model and the two callbacks."""
    from finery_trainer import engine

    is_preference = spec.method is MethodType.DPO
    read = engine.preference.PreferenceDataset if is_preference else engine.data.TokenDataset
    train = engine.preference.train if is_preference else engine.loop.train
    if spec.gpus > 1:
        train = partial(engine.distributed.train, base_dir=inputs.base_dir, training_dir=inputs.training_dir)
    return partial(
        train,
        data=read(inputs.training_dir),
        spec=spec,
        validation=None if inputs.validation_dir is None else read(inputs.validation_dir),
        resume_from=inputs.checkpoint_dir,
    )


def _path_of(model: PeftModel | PreTrainedModel) -> str:
    """Whose arithmetic trains the model, for people."""
    from finery_trainer import engine

    reason = engine.stack.unsupported(model)
    return "the engine's own layers" if reason is None else f"transformers' own modules ({reason})"


def _metrics_of(report: loop.StepReport) -> StepMetrics:
    return StepMetrics(
        step=report.step,
        num_steps=report.num_steps,
        epoch=report.epoch,
        loss=report.loss,
        learning_rate=report.learning_rate,
        grad_norm=report.grad_norm,
        tokens_per_second=report.tokens_per_second,
        num_trained_tokens=report.num_trained_tokens,
        memory_bytes=report.memory_bytes,
        validation_loss=report.validation_loss,
        data_wait_seconds=report.data_wait_seconds,
        mfu=report.mfu,
        memory_allocated_bytes=report.memory_allocated_bytes,
        memory_reserved_bytes=report.memory_reserved_bytes,
    )


def explain(error: Exception, assignment: Assignment) -> FineryError:
    """`error` for people: the tree's own errors as they are, a full disk or memory with what to do, anything else as our bug."""
    if isinstance(error, FineryError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhaustedError(
            f"The worker's disk is full ({error.filename or 'temporary files'}); free space there and create the job again.",
            code="disk_full",
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        batch = assignment.spec.batch
        return ResourceExhaustedError(
            f"Memory ran out with micro_batch_size {batch.micro_batch_size} and max_sequence_length {assignment.spec.max_sequence_length}. "
            "On a GPU, where the engine's own layers train the model, lower spec.memory.budget, such as to 0.8; or lower "
            "spec.batch.micro_batch_size (raise gradient_accumulation_steps by as much: the result is the same); or shorten the rows.",
            code="out_of_memory",
            param="spec.batch.micro_batch_size",
        )
    return unknown_error(error)


def _offer_metrics(settings: WorkerSettings) -> None:
    port = serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
    serve_gpu_metrics()
    log.info("serving metrics", port=port)
    if settings.metrics_target_file is not None:
        try:
            announce_metrics(settings.metrics_target_file, address=f"{settings.metrics_host}:{port}", service="trainer-worker")
        except OSError as error:
            log.warning("Prometheus cannot be told of this worker", error=str(error))


def main() -> int:
    """The process; answers its exit status."""
    stop_signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop_signals.append(number))
    try:
        settings = WorkerSettings()  # pyright: ignore[reportCallIssue]  # the environment has what is required
        token = settings.worker_token_file.read_text().strip()
    except ValidationError as error:
        sys.stderr.write(f"finery_trainer.worker: settings (FINERY_…): {invalid_fields(error).message}\n")
        return CONFIG_EXIT_CODE
    except OSError as error:
        sys.stderr.write(f"finery_trainer.worker: FINERY_WORKER_TOKEN_FILE: cannot read {error.filename}: {error.strerror}\n")
        return CONFIG_EXIT_CODE
    configure_logging("trainer-worker", level=settings.log_level)
    configure_tracing("trainer-worker", endpoint=settings.otlp_endpoint)
    _offer_metrics(settings)
    os.environ.pop("FINERY_WORKER_TOKEN_FILE", None)
    link = Link(settings.trainer_address, token=token, heartbeat_s=settings.worker_heartbeat_s, tolerance_s=settings.worker_tolerance_s)
    try:
        with link:
            Worker(settings, link=link, was_stopped=lambda: bool(stop_signals)).run()
    except AttemptOver as error:
        log.warning("this attempt is over; nothing more is published", reason=str(error))
    except Stopped:
        log.info("stopped; the state is saved")
        return STOPPED_EXIT_CODE
    except (ServerGone, FineryError) as error:
        log.error("this attempt cannot go on", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
