"""One attempt at one conversion, under one lease: stage, convert in a worker, upload, publish, push.

Owns the order of these steps, what each failure means for the job, and that only the holder of the lease publishes, once. An attempt
that finds its model published by an earlier one, killed before it could say so, goes on from there. A push that fails is on record and
does not undo a conversion. Leaves taking jobs to `runner`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import structlog
from pydantic import JsonValue

from finery_common.artifacts import ArtifactRef, ArtifactStore, ArtifactWriter, put_chunks
from finery_common.conversion_spec import ConversionSpec
from finery_common.errors import (
    AbortedError,
    AlreadyExistsError,
    FineryError,
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.jobs import EventLevel, Job, JobState, JobStore, Lease, Wanted
from finery_common.rpc.messages import error_fields
from finery_common.rpc.status import unknown_error
from finery_converter import launcher, push_process
from finery_converter.metrics import PUBLISHED_BYTES, PUSHES, SECONDS, WORKER_DEATHS
from finery_converter.model_card import Lineage, license_of, model_card
from finery_converter.settings import ConverterSettings
from finery_converter.sources import Found, Sources
from finery_converter.task import REPORT_FILE, Task

LEASE_S = 15.0
RENEW_S = 3.0
PROGRESS_S = 1.0
MAX_WORKER_DEATHS = 3
# The worker's share of the whole, and where the upload ends; the rest is a push.
_WORKER_SHARE, _UPLOADED_SHARE = 0.9, 0.97
_UPLOAD_BYTES = 8 * 1024 * 1024

_CANCELLED_PUSH = {
    "error": {"code": "hub_push_cancelled", "message": "The conversion was cancelled before its push was done.", "param": None}
}

log = structlog.get_logger(__name__)


def model_prefix(project: str, conversion_id: str) -> str:
    """Where a conversion's model lies in the store."""
    return f"projects/{project}/models/{conversion_id}/"


@dataclass(frozen=True)
class Workplace:
    """What every attempt works with."""

    jobs: JobStore
    artifacts: ArtifactStore
    sources: Sources
    settings: ConverterSettings

    @property
    def scratch_dir(self) -> Path:
        """This process's own."""
        return self.settings.scratch_dir

    @property
    def converter_dir(self) -> Path:
        return self.settings.convert_hf_to_gguf.absolute()


class Attempt:
    """`run` it once. `woken` is set by whoever wants its attention before `RENEW_S` has passed."""

    def __init__(self, workplace: Workplace, job: Job, lease: Lease, *, woken: asyncio.Event) -> None:
        self._place = workplace
        self._job = job
        self._lease = lease
        self._woken = woken
        self._spec = ConversionSpec.parse(job.spec)
        self._prefix = model_prefix(job.project, job.id)
        self._scratch_dir = workplace.scratch_dir / f"{job.id}-{lease.epoch}"
        self._publishing = False
        self._ending = False
        self._started_s = time.monotonic()
        self._reported_s = 0.0
        self._reported_step = ""

    async def run(self) -> None:
        """Works while the lease is kept and nobody cancels.

        Raises AbortedError for a lost lease and UnavailableError where store or database stay gone: the job is left for another attempt.
        Cancelled itself, it kills the worker and publishes nothing.
        """
        work = asyncio.create_task(self._outcome())
        work.add_done_callback(lambda _: self._woken.set())
        try:
            while not work.done():
                self._woken.clear()
                if await self._is_cancelled():
                    await _stop(work)
                    # An earlier attempt may have published, or this one before its push: then the conversion itself is done.
                    ref = await self._published()
                    await self._end(
                        JobState.SUCCEEDED if ref else JobState.CANCELLED, ref=ref, hub=_CANCELLED_PUSH if self._spec.hub else None
                    )
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RENEW_S):
                        await self._woken.wait()
            await work
        finally:
            await _stop(work)
            await asyncio.to_thread(shutil.rmtree, self._scratch_dir, ignore_errors=True)

    async def _is_cancelled(self) -> bool:
        """Keeps the lease; answers whether to stop."""
        try:
            job = await self._place.jobs.renew(self._lease, ttl_s=LEASE_S)
        except UnavailableError as error:
            log.warning("cannot renew the lease", reason=error.message)
            return False
        except AbortedError:
            if self._ending:
                return False
            raise
        return job.wanted == Wanted.CANCEL and not self._publishing

    async def _outcome(self) -> None:
        try:
            ref = await self._published() or await self._convert()
        except (AbortedError, UnavailableError):
            raise
        except launcher.WorkerDiedError as error:
            await self._worker_died(error)
        except FineryError as error:
            await self._end(JobState.FAILED, error=error)
        except OSError as error:
            known = ResourceExhaustedError(
                f"The converter could not write to {self._place.scratch_dir}: {error.strerror}.", code="disk_full"
            )
            await self._end(JobState.FAILED, error=known)
        except Exception as error:  # noqa: BLE001  translated: the job must not stay RUNNING for ever
            await self._end(JobState.FAILED, error=unknown_error(error))
        else:
            # What is published stays; what follows can be cancelled again.
            self._publishing = False
            hub = await self._push(ref) if self._spec.hub else None
            await self._end(JobState.SUCCEEDED, ref=ref, hub=hub)

    async def _published(self) -> ArtifactRef | None:
        try:
            return await asyncio.to_thread(self._place.artifacts.ref, self._prefix)
        except NotFoundError:
            return None

    async def _convert(self) -> ArtifactRef:
        if self._job.state == JobState.QUEUED:
            await self._enter(JobState.VALIDATING, "Checking adapter and base model.")
        if self._spec.hub:
            # A secret that is not there is said before hours of work.
            self._place.settings.hub_token(self._job.project, self._spec.hub.token)
        found = await asyncio.to_thread(self._place.sources.find, self._job.project, self._spec)
        task = await asyncio.to_thread(self._task, found)
        if self._job.state != JobState.RUNNING:
            await self._enter(JobState.RUNNING, "Conversion starts.")
        try:
            await launcher.run(task, scratch_dir=self._scratch_dir, on_report=lambda step, share: self._report(step, share * _WORKER_SHARE))
        except FineryError:
            # What was measured of a conversion that is not published is worth reading most; the reason goes before it.
            with contextlib.suppress(UnavailableError):
                await self._note_report()
            raise
        await self._note_report()
        return await self._publish(self._output_dir, found)

    def _task(self, found: Found) -> Task:
        """Everything staged, and where the result goes. Blocks."""
        sources = self._place.sources
        self._output_dir.mkdir(parents=True)
        base_dir = sources.base_folder(found) if found.model is None else sources.folder(found.model)
        return Task(
            spec=self._spec.model_dump(mode="json"),
            base_dir=str(base_dir),
            adapter_dirs=tuple(str(sources.folder(adapter.ref)) for adapter in found.adapters),
            dataset_dir=None if found.dataset is None else str(sources.folder(found.dataset)),
            trained_on=found.trained_on,
            precision=found.precision,
            device=found.device,
            output_dir=str(self._output_dir),
            scratch_dir=str(self._scratch_dir),
            model_name=self._name,
            converter_dir=str(self._place.converter_dir),
        )

    @property
    def _output_dir(self) -> Path:
        return self._scratch_dir / "output"

    @property
    def _name(self) -> str:
        """Of the model, for people."""
        key = self._spec.model or self._spec.sources[0].adapter
        return key.partition("/")[2]

    async def _note_report(self) -> None:
        """Puts what the worker measured where it outlives this attempt."""
        report = await asyncio.to_thread(_read_report, self._scratch_dir / REPORT_FILE)
        if report:
            await self._place.jobs.append_event(
                self._job.id,
                type="report",
                message="Measured before publication.",
                data=report,
                progress={"report": report},
                epoch=self._lease.epoch,
            )

    async def _push(self, ref: ArtifactRef) -> dict[str, object]:
        """What came of pushing the published artifact, as the job's result has it."""
        hub = self._spec.hub
        assert hub is not None
        try:
            token = self._place.settings.hub_token(self._job.project, hub.token)
            folder = await asyncio.to_thread(self._pushed_folder, ref)
            card = await asyncio.to_thread(self._card, ref)
            pushed = await push_process.run(
                push_process.PushTask(
                    folder=str(folder),
                    repository=hub.repository,
                    endpoint=self._place.settings.hub_endpoint,
                    revision=hub.revision,
                    private=hub.private,
                    commit_message=f"{self._name}: {self._spec.format}, {self._spec.element_type} ({ref.manifest_sha256[:12]})",
                    card=card,
                ),
                token=token,
                scratch_dir=self._scratch_dir,
                on_report=lambda step, share: self._report(step, _UPLOADED_SHARE + (1 - _UPLOADED_SHARE) * share),
            )
        except AbortedError:
            raise
        except Exception as error:  # noqa: BLE001  translated: whatever a push fails by, the model is published and the job done
            PUSHES.labels("failed").inc()
            died = InternalError(str(error), code="push_died") if isinstance(error, launcher.WorkerDiedError) else None
            return {"error": error_fields(died or (error if isinstance(error, FineryError) else unknown_error(error)))}
        PUSHES.labels("pushed").inc()
        return {"commit_url": pushed.url}

    def _pushed_folder(self, ref: ArtifactRef) -> Path:
        """The artifact's files: those just uploaded, or, after another attempt has published them, a copy."""
        if self._output_dir.is_dir():
            return self._output_dir
        self._scratch_dir.mkdir(parents=True, exist_ok=True)
        return self._place.sources.folder(ref)

    def _card(self, ref: ArtifactRef) -> str:
        found = self._place.sources.find(self._job.project, self._spec)
        entry = self._place.sources.base_entry(found)
        base_dir = self._place.sources.base_folder(found) if found.model is None else None
        return model_card(
            Lineage(
                title=self._name,
                manifest_sha256=ref.manifest_sha256,
                base_model=found.base_model,
                base_model_hub_id=entry.hub_id or "",
                base_model_sha256=found.base_model_sha256,
                license="" if base_dir is None else license_of(base_dir),
                format=self._spec.format.value,
                type=self._spec.element_type.value,
                adapters=tuple((adapter.key, adapter.ref.manifest_sha256) for adapter in found.adapters),
            )
        )

    async def _enter(self, state: JobState, message: str) -> None:
        await self._place.jobs.transition(self._job.id, state, message=message, epoch=self._lease.epoch)

    async def _publish(self, output_dir: Path, found: Found) -> ArtifactRef:
        size_bytes = sum(path.stat().st_size for path in _files(output_dir))
        writer = self._place.artifacts.writer(self._prefix, kind="model", size_bytes=size_bytes)
        try:
            await self._upload(output_dir, writer)
            # From here on a cancellation comes too late, and only the holder of the lease goes on.
            self._publishing = True
            await self._place.jobs.renew(self._lease, ttl_s=LEASE_S)
            ref = await _uninterrupted(asyncio.to_thread(self._write_manifest, writer, found))
        except AlreadyExistsError:
            ref = await self._published()
            assert ref is not None
        except BaseException:
            await asyncio.shield(asyncio.to_thread(writer.discard))
            raise
        PUBLISHED_BYTES.inc(ref.size_bytes)
        return ref

    async def _upload(self, output_dir: Path, writer: ArtifactWriter) -> None:
        files = _files(output_dir)
        total = max(1, sum(path.stat().st_size for path in files))
        uploaded = 0

        async def chunks(file: BinaryIO) -> AsyncIterator[bytes]:
            nonlocal uploaded
            while chunk := await asyncio.to_thread(file.read, _UPLOAD_BYTES):
                yield chunk
                uploaded += len(chunk)
                await self._report("uploading", _WORKER_SHARE + (_UPLOADED_SHARE - _WORKER_SHARE) * uploaded / total)

        for path in files:
            with path.open("rb") as file:
                await put_chunks(writer, path.relative_to(output_dir).as_posix(), chunks=chunks(file))

    def _write_manifest(self, writer: ArtifactWriter, found: Found) -> ArtifactRef:
        return writer.publish(
            made_from=found.made_from,
            spec=self._spec.model_dump(mode="json"),
            attempt=f"{self._job.id}/{self._lease.epoch}",
            metadata={
                "base_model": found.base_model,
                "base_model_sha256": found.base_model_sha256,
                "report": cast("JsonValue", _read_report(self._scratch_dir / REPORT_FILE)),
            },
        )

    async def _report(self, step: str, progress: float) -> None:
        """An event for each new step, and each second within one."""
        now_s = time.monotonic()
        if step == self._reported_step and now_s - self._reported_s < PROGRESS_S:
            return
        self._reported_step, self._reported_s = step, now_s
        data: dict[str, object] = {"step": step, "progress": round(progress, 4)}
        try:
            await self._place.jobs.append_event(
                self._job.id, type="step", message=f"{step}: {progress:.0%}", data=data, progress=data, epoch=self._lease.epoch
            )
        except UnavailableError as error:
            log.warning("progress is not recorded", reason=error.message)

    async def _worker_died(self, error: launcher.WorkerDiedError) -> None:
        WORKER_DEATHS.inc()
        deaths = int(str(self._job.progress.get("worker_deaths", 0))) + 1
        if deaths >= MAX_WORKER_DEATHS:
            message = f"{error} It was attempt {deaths} that ended so. Is there enough memory? See the converter's log."
            await self._end(JobState.FAILED, error=InternalError(message, code="worker_died"))
            return
        await self._place.jobs.append_event(
            self._job.id,
            type="message",
            level=EventLevel.WARN,
            message=f"{error} The conversion starts again.",
            progress={"worker_deaths": deaths, "progress": 0.0},
            epoch=self._lease.epoch,
        )

    async def _end(
        self,
        state: JobState,
        *,
        ref: ArtifactRef | None = None,
        error: FineryError | None = None,
        hub: Mapping[str, object] | None = None,
    ) -> None:
        self._ending = True
        await self._place.jobs.transition(
            self._job.id,
            state,
            message=error.message if error else "",
            error=error_fields(error) if error else None,
            result={"artifact": ref.model_dump(mode="json"), **({"hub": dict(hub)} if hub else {})} if ref else None,
            progress={"progress": 1.0} if ref else None,
            epoch=self._lease.epoch,
        )
        SECONDS.labels(self._spec.format, state).observe(time.monotonic() - self._started_s)


async def _uninterrupted(work: Coroutine[None, None, ArtifactRef]) -> ArtifactRef:
    """Awaits `work`; cancelled, waits for its end first, so that nothing is cleaned up beneath it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _read_report(file: Path) -> dict[str, object]:
    """What the worker has measured; nothing where it did not get so far, or could not write it down."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
