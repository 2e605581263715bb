"""Works on datasets: takes queued jobs under a lease, prepares them, publishes, and takes up what a killed process left.

Owns a job's way from QUEUED to its end. Encoding is `preparation`'s; the wire is `server`'s. An attempt that lost its lease writes
nothing more; one that was killed after publishing is finished from the manifest it left, so that nothing is published twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from finery_common.artifacts import ArtifactRef, ArtifactStore, ArtifactWriter, Manifest
from finery_common.errors import AbortedError, AlreadyExistsError, FineryError, NotFoundError, UnavailableError
from finery_common.jobs import EventLevel, Job, JobState, JobStore, Lease, Wanted
from finery_common.rpc.messages import error_fields
from finery_common.rpc.status import unknown_error
from finery_common.spec import DatasetSpec
from finery_dataprep.base_tokenizer import BaseTokenizer, read_base_tokenizer
from finery_dataprep.metrics import JOBS, QUEUE_SECONDS, SECONDS
from finery_dataprep.preparation import prepare
from finery_dataprep.shards import ShardWriter, Statistics

LEASE_S = 15.0
RENEW_S = 0.5
POLL_S = 1.0
PROGRESS_S = 1.0
MAX_AT_ONCE = 2
# For what is gone for the moment: the store, or a worker that found no memory.
MAX_TRIES = 5
_FIRST_PAUSE_S = 1.0

BaseFolder = Callable[[str], Path]
"""The local folder of a base model's files, by its name in the catalogue; blocks, raises NotFoundError."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


def dataset_prefix(project: str, dataset_id: str) -> str:
    """Where a dataset lies in the store."""
    return f"projects/{project}/datasets/{dataset_id}/"


class DatasetRunner:
    """Runs until cancelled. `holder` names this process in leases; `scratch_dir` is this process's own and emptied at its start."""

    def __init__(
        self, jobs: JobStore, *, artifacts: ArtifactStore, base_folder: BaseFolder, scratch_dir: Path, holder: str, max_workers: int
    ) -> None:
        self._jobs = jobs
        self._artifacts = artifacts
        self._base_folder = base_folder
        self._scratch_dir = scratch_dir
        self._holder = holder
        self._max_workers = max_workers
        self._woken = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """Something new is to be done; without it, it is noticed within `POLL_S`."""
        self._woken.set()

    async def run(self) -> None:
        """Takes jobs as they come, `MAX_AT_ONCE` at a time. Cancelled, it hands back what it holds."""
        # Files of an earlier process that was killed.
        await asyncio.to_thread(shutil.rmtree, self._scratch_dir, ignore_errors=True)
        try:
            while True:
                self._woken.clear()
                try:
                    await _whole(self._take_jobs())
                except FineryError as error:
                    log.warning("cannot look for jobs", error=error.message)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._woken.wait()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _take_jobs(self) -> None:
        for job in (*await self._jobs.expired_leases(), *await self._jobs.runnable()):
            if len(self._tasks) >= MAX_AT_ONCE:
                break
            if job.id not in self._tasks:
                task = asyncio.create_task(self._attempt(job))
                self._tasks[job.id] = task
                task.add_done_callback(lambda _, job_id=job.id: self._finished(job_id))
        for state, count in (await self._jobs.states_count()).items():
            JOBS.labels(state).set(count)

    def _finished(self, job_id: str) -> None:
        del self._tasks[job_id]
        self.wake()

    async def _attempt(self, job: Job) -> None:
        try:
            lease = await _whole(self._jobs.acquire(job.id, holder=self._holder, ttl_s=LEASE_S))
        except FineryError as error:
            log.info("dataset not taken", job_id=job.id, reason=error.message)
            return
        try:
            await self._work_under_lease(job, lease)
        except AbortedError as error:
            log.warning("attempt stopped", job_id=job.id, epoch=lease.epoch, reason=error.message)
        except FineryError as error:
            log.error("dataset left for another attempt", job_id=job.id, epoch=lease.epoch, error=error.message)
        finally:
            with contextlib.suppress(FineryError):
                await _whole(self._jobs.release(lease))

    async def _work_under_lease(self, job: Job, lease: Lease) -> None:
        started_s = time.monotonic()
        if job.wanted == Wanted.CANCEL:
            await self._end(lease, JobState.CANCELLED, started_s)
            return
        if job.state == JobState.QUEUED:
            await _whole(self._jobs.transition(job.id, JobState.RUNNING, message="Preparation starts.", epoch=lease.epoch))
            QUEUE_SECONDS.observe((datetime.now(UTC) - job.created_at).total_seconds())
        work = asyncio.create_task(self._outcome(job, lease, started_s))
        try:
            while not work.done():
                if await self._is_cancel_wanted(lease, work):
                    await _stop(work)
                    # It may have published at the last moment.
                    await asyncio.to_thread(self._artifacts.delete, dataset_prefix(job.project, job.id))
                    await self._end(lease, JobState.CANCELLED, started_s)
                    return
                await asyncio.wait([work], timeout=RENEW_S)
            await work
        finally:
            await _stop(work)

    async def _is_cancel_wanted(self, lease: Lease, work: asyncio.Task[None]) -> bool:
        """Renews the lease. Raises AbortedError where it is lost to another attempt."""
        try:
            renewed = await _whole(self._jobs.renew(lease, ttl_s=LEASE_S))
        except AbortedError:
            # The work gives the lease up itself when it ends the job.
            await asyncio.wait([work], timeout=RENEW_S)
            if work.done():
                return False
            raise
        return renewed.wanted == Wanted.CANCEL

    async def _outcome(self, job: Job, lease: Lease, started_s: float) -> None:
        """Prepares and publishes; every failure but a lost lease becomes the job's error, an UnavailableError after `MAX_TRIES`."""
        try:
            statistics, ref = await self._published(job) or await self._prepare(job, lease)
        except AbortedError:
            raise
        except UnavailableError as error:
            await self._unavailable(job, lease, started_s, error)
        except FineryError as error:
            await self._end(lease, JobState.FAILED, started_s, error=error)
        except Exception as error:  # noqa: BLE001  translated: the job must not stay RUNNING for ever
            await self._end(lease, JobState.FAILED, started_s, error=unknown_error(error))
        else:
            result: dict[str, object] = {"statistics": asdict(statistics), "artifact": ref.model_dump(mode="json")}
            await self._end(lease, JobState.SUCCEEDED, started_s, result=result)

    async def _unavailable(self, job: Job, lease: Lease, started_s: float, error: UnavailableError) -> None:
        """Leaves the job to another attempt after a pause by raising `error`; the last try's error is the job's."""
        tries = int(str(job.progress.get("tries", 0))) + 1
        if tries >= MAX_TRIES:
            await self._end(lease, JobState.FAILED, started_s, error=error)
            return
        await _whole(
            self._jobs.append_event(
                job.id,
                type="message",
                level=EventLevel.WARN,
                message=f"{error.message} The preparation starts again.",
                progress={"tries": tries},
                epoch=lease.epoch,
            )
        )
        await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (tries - 1))
        raise error

    async def _end(
        self, lease: Lease, state: JobState, started_s: float, *, error: FineryError | None = None, result: dict[str, object] | None = None
    ) -> None:
        fields = error_fields(error) if error else None
        text = error.message if error else ""
        await _whole(self._jobs.transition(lease.job_id, state, message=text, error=fields, result=result, epoch=lease.epoch))
        SECONDS.labels(state).observe(time.monotonic() - started_s)

    async def _published(self, job: Job) -> tuple[Statistics, ArtifactRef] | None:
        """What an earlier attempt has published, if it did."""
        prefix = dataset_prefix(job.project, job.id)
        try:
            manifest = await asyncio.to_thread(self._artifacts.manifest, prefix)
            file = await asyncio.to_thread(self._artifacts.open, prefix, "statistics.json")
        except NotFoundError:
            return None
        with file:
            statistics = Statistics(**json.loads(await asyncio.to_thread(file.read)))
        return statistics, manifest.ref(prefix)

    async def _prepare(self, job: Job, lease: Lease) -> tuple[Statistics, ArtifactRef]:
        spec = DatasetSpec.parse(job.spec)
        async with self._file(job.project, spec.file, self._scratch_dir / f"{job.id}-{lease.epoch}") as (file, path):
            return await self._prepare_file(path, file, spec, job, lease)

    async def _prepare_file(self, path: Path, file: Manifest, spec: DatasetSpec, job: Job, lease: Lease) -> tuple[Statistics, ArtifactRef]:
        base = await asyncio.to_thread(self._read_base, spec.base_model)
        writer = self._artifacts.writer(dataset_prefix(job.project, job.id), kind="dataset")
        try:
            statistics = await prepare(
                path,
                base=base,
                dataset_type=spec.type,
                max_sequence_length=spec.max_sequence_length,
                now=job.created_at,
                max_workers=self._max_workers,
                shards=ShardWriter(writer, dataset_type=spec.type),
                on_progress=_Progress(self._jobs, lease),
            )
            # Only the holder of the lease may publish.
            await _whole(self._jobs.renew(lease, ttl_s=LEASE_S))
            attempt = f"{job.id}/{lease.epoch}"
            ref = await _whole(asyncio.to_thread(_publish, writer, spec, base, file, statistics, attempt))
        except AlreadyExistsError:
            published = await self._published(job)
            assert published is not None
            return published
        except BaseException:
            await asyncio.shield(asyncio.to_thread(writer.discard))
            raise
        return statistics, ref

    @contextlib.asynccontextmanager
    async def _file(self, project: str, file_id: str, folder: Path) -> AsyncIterator[tuple[Manifest, Path]]:
        """The uploaded file, copied into `folder` for the block: people's data stays nowhere after they delete it."""
        fetching = asyncio.create_task(asyncio.to_thread(self._fetch_file, project, file_id, folder))
        try:
            yield await asyncio.shield(fetching)
        finally:
            # A cancellation does not wait for a copying thread; what that writes goes when it ends.
            fetching.add_done_callback(lambda done: _remove(folder, done))

    def _fetch_file(self, project: str, file_id: str, cache_dir: Path) -> tuple[Manifest, Path]:
        prefix = f"projects/{project}/files/{file_id}/"
        try:
            manifest = self._artifacts.manifest(prefix)
            folder = self._artifacts.fetch(manifest.ref(prefix), cache_dir)
        except NotFoundError as error:
            raise NotFoundError(
                f"There is no file {file_id} in project {project}: the id is wrong or the file was deleted. "
                "Upload it, or list files to see what there is.",
                code="file_not_found",
                param="file",
            ) from error
        return manifest, folder / "content"

    def _read_base(self, name: str) -> BaseTokenizer:
        return read_base_tokenizer(self._base_folder(name), model=name)


class _Progress:
    """Reports lines done at most every `PROGRESS_S`."""

    def __init__(self, jobs: JobStore, lease: Lease) -> None:
        self._jobs = jobs
        self._lease = lease
        self._reported_s = time.monotonic()

    async def __call__(self, rows_done: int, rows_total: int) -> None:
        if time.monotonic() - self._reported_s < PROGRESS_S and rows_done < rows_total:
            return
        self._reported_s = time.monotonic()
        data: dict[str, object] = {"rows_done": rows_done, "rows_total": rows_total}
        change = self._jobs.append_event(
            self._lease.job_id,
            type="message",
            message=f"{rows_done} of {rows_total} rows.",
            data=data,
            progress=data,
            epoch=self._lease.epoch,
        )
        await _whole(change)


def _publish(
    writer: ArtifactWriter, spec: DatasetSpec, base: BaseTokenizer, file: Manifest, statistics: Statistics, attempt: str
) -> ArtifactRef:
    metadata = {
        "num_rows": statistics.num_rows,
        "num_tokens": statistics.num_tokens,
        "num_label_tokens": statistics.num_label_tokens,
        "tokenizer_sha256": base.tokenizer_sha256,
        "template_sha256": base.template_sha256,
        "base_model": base.model,
    }
    return writer.publish(made_from={"file": file.sha256}, spec=spec.model_dump(mode="json"), attempt=attempt, metadata=metadata)


def _remove(folder: Path, copied: asyncio.Task[tuple[Manifest, Path]]) -> None:
    if not copied.cancelled():
        copied.exception()  # seen; whoever was cancelled wants no word of it
    shutil.rmtree(folder, ignore_errors=True)


async def _whole(call: Coroutine[Any, Any, T]) -> T:
    """Lets a call into the database or the store come to its end before a cancellation takes effect: cut in two, it may have happened."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
