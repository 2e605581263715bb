"""Workers as Kubernetes Jobs, one for each attempt, named from job and epoch and made from a template.

Owns when Jobs are made and removed, and what becomes known of them. All it remembers can be read off the cluster by labels, so a service
that starts anew finds its workers again; they do without it meanwhile. An attempt has one pod: whatever ends it ends the attempt, and
the scheduler starts another from the last checkpoint. A paused job's worker saves its state and ends, which frees its place in a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from finery_common.errors import AlreadyExistsError, FailedPreconditionError, FineryError, PermissionDeniedError, UnavailableError
from finery_trainer.launchers import Attempt, Exit, Waiting
from finery_trainer.launchers.cluster import Cluster
from finery_trainer.launchers.evidence import JOB_ID_LABEL, Key, WorkerJob, WorkerPod, exit_of, key_of, read_job, read_pod
from finery_trainer.launchers.job_template import JobTemplate, job_name
from finery_trainer.launchers.mirror import Mirror
from finery_trainer.settings import TrainerSettings

_JUDGE_AGAIN_S = 2.0
_NO_POD_S = 15.0
"""A Job that has no pod after so long is held up by something, such as a quota."""
_UNSEEN_S = 60.0
"""A Job that was made and has not been seen after so long, though the cluster is watched, was deleted before it could be."""
_LOOK_AGAIN_S = 10.0

log = structlog.get_logger(__name__)


class KubernetesLauncher:
    """Follows the cluster from `connect` to `stop_all`."""

    def __init__(self, cluster: Cluster, *, template: JobTemplate) -> None:
        self._cluster = cluster
        self._template = template
        self._changed = asyncio.Event()
        selector, on_change = template.selector, self._changed.set
        self._jobs: Mirror[WorkerJob] = Mirror(cluster, "jobs", selector=selector, parse=read_job, on_change=on_change)
        self._pods: Mirror[WorkerPod] = Mirror(cluster, "pods", selector=selector, parse=read_pod, on_change=on_change)
        self._asked_s: dict[Key, float] = {}
        """When an attempt that is not known to have begun was asked for, or first seen."""
        self._begun: set[Key] = set()
        self._seen: set[Key] = set()
        self._over: set[Key] = set()
        self._exits: list[Exit] = []
        self._removed: set[str] = set()
        """Names of the Jobs that were removed here; their logs went with them."""
        self._was_refused = False
        """Whether the last Job could not be made, for no fault of its own."""
        self._following = asyncio.create_task(self._follow())

    @classmethod
    async def connect(cls, settings: TrainerSettings) -> KubernetesLauncher:
        """Reads the template and finds the API server, which need not answer yet. Raises FailedPreconditionError for wrong settings."""
        if not settings.trainer_address:
            raise FailedPreconditionError("FINERY_TRAINER_ADDRESS is not set; set it to the host:port at which pods reach this service.")
        template = await asyncio.to_thread(
            JobTemplate.load,
            settings.kubernetes_job_template,
            gpu_resource=settings.kubernetes_gpu_resource,
            trainer_address=settings.trainer_address,
        )
        return cls(await Cluster.connect(settings.kubernetes_namespace), template=template)

    async def check(self, attempt: Attempt) -> None:
        """After a Job that could not be made, has the API server say whether this one could. Other faults are `start`'s to tell."""
        await self._require_sight()
        if self._was_refused:
            with contextlib.suppress(AlreadyExistsError, FailedPreconditionError):
                await self._cluster.create_job(self._template.job(attempt), dry_run=True)

    async def start(self, attempt: Attempt) -> None:
        """Makes the attempt's Job, where there is not one already. Raises as `Cluster` does."""
        await self._require_sight()
        key = attempt.job_id, attempt.epoch
        await self._remove_older(attempt)
        try:
            await self._cluster.create_job(self._template.job(attempt))
        except AlreadyExistsError:
            found = await self._cluster.get_job(job_name(attempt))
            if found is None or key_of(found) != key:
                raise
        except (UnavailableError, PermissionDeniedError):
            self._was_refused = True
            raise
        self._was_refused = False
        log.info("a worker's Job is made", job_id=attempt.job_id, epoch=attempt.epoch, name=job_name(attempt))
        self._asked_s[key] = time.monotonic()

    def waiting(self) -> list[Waiting]:
        """Those whose pods have not begun, also while the API server is away."""
        if not (self._jobs.is_synced and self._pods.is_synced):
            return []
        return [Waiting(*key, *self._cause(key)) for key in sorted(self._asked_s.keys() - self._begun - self._over)]

    def take_exits(self) -> list[Exit]:
        """The workers that ended since the last call, and once after a start those that the cluster still knows."""
        if self._following.done() and not self._following.cancelled():
            self._following.result()
        exits, self._exits = self._exits, []
        return exits

    def log_place(self, job_id: str, *, epoch: int) -> str:
        """The command that shows it, or that it is gone."""
        name = job_name(Attempt(job_id, epoch, ""))
        if name in self._removed:
            return f"gone with the Job {name}, which was removed; what collects the cluster's logs may have it"
        return f"kubectl logs --namespace {self._cluster.namespace} job/{name}"

    async def kill(self, job_id: str) -> None:
        """Removes the job's Jobs that have not ended. Their pods get SIGTERM and end within their grace period; what they report
        meanwhile is refused by the epoch.
        """
        await self._require_sight()
        found, _ = await self._cluster.list("jobs", selector=f"{self._template.selector},{JOB_ID_LABEL}={job_id}")
        for job in map(read_job, found):
            if not job.is_finished:
                await self._remove(job)

    async def stop_all(self, *, grace_s: float) -> None:
        """Lets the workers run: they need nothing of this machine, and wait for the next service as long as they tolerate."""
        self._following.cancel()
        await asyncio.wait([self._following], timeout=grace_s)
        await self._cluster.close()

    async def _remove(self, job: WorkerJob) -> None:
        await self._cluster.delete_job(job.name)
        self._removed.add(job.name)

    async def _require_sight(self) -> None:
        """Without it, what runs already would be taken for what is not there, and nobody would learn how a worker ends."""
        for mirror in (self._jobs, self._pods):
            await mirror.was_tried.wait()
            if mirror.error is not None:
                raise mirror.error

    async def _remove_older(self, attempt: Attempt) -> None:
        """Of attempts that were given up: one whose create was not answered, one that its queue suspended."""
        for job in list(self._jobs.items.values()):
            if job.key[0] == attempt.job_id and job.key[1] < attempt.epoch and not job.is_finished:
                await self._remove(job)

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (self._jobs.run(), self._pods.run(), self._judge_changes()):
                group.create_task(work)

    async def _judge_changes(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._changed.wait()
            self._changed.clear()
            if not self._jobs.is_synced:
                continue
            self._note()
            for key in sorted(self._seen - self._over):
                try:
                    await self._judge(key)
                except FineryError as error:
                    log.warning("cannot tell how a worker ended; trying again", job_id=key[0], epoch=key[1], error=error.message)
                    asyncio.get_running_loop().call_later(_JUDGE_AGAIN_S, self._changed.set)

    def _note(self) -> None:
        """Which attempts there are, and which have begun. Those whose Jobs and pods are gone, and judged, are forgotten."""
        self._begun |= {pod.key for pod in self._pods.items.values() if pod.has_begun}
        jobs = {job.key for job in self._jobs.items.values()}
        now_s = time.monotonic()
        self._seen |= jobs
        if self._jobs.error is None:
            self._seen |= {key for key, since_s in self._asked_s.items() if now_s - since_s > _UNSEEN_S}
        for key in jobs - self._over - self._asked_s.keys():
            self._asked_s[key] = now_s
        gone = self._over - jobs - {pod.key for pod in self._pods.items.values()}
        for keys in (self._seen, self._begun, self._over):
            keys -= gone
        self._asked_s = {key: since_s for key, since_s in self._asked_s.items() if key not in self._over and key not in gone}

    async def _judge(self, key: Key) -> None:
        job, pods = self._job_of(key), [pod for pod in self._pods.items.values() if pod.key == key]
        if not pods and (job is None or job.is_finished):
            # Jobs and pods are watched apart: one may be known to have ended before the other.
            found, _ = await self._cluster.list("pods", selector=f"{self._template.selector},{JOB_ID_LABEL}={key[0]}")
            pods = [pod for pod in map(read_pod, found) if pod.key == key]
        ended = exit_of(key, job, pods, has_begun=key in self._begun)
        if ended is None:
            return
        if ended.is_final and job is not None and not job.is_finished:
            await self._remove(job)
        log.info("worker ended", job_id=ended.job_id, epoch=ended.epoch, reason=ended.reason)
        self._over.add(key)
        self._exits.append(ended)

    def _job_of(self, key: Key) -> WorkerJob | None:
        return next((job for job in self._jobs.items.values() if job.key == key), None)

    def _cause(self, key: Key) -> tuple[str, str]:
        job = self._job_of(key)
        if job is not None and job.is_suspended:
            return "queue", f"its Job is suspended{f', in the queue {job.queue}' if job.queue else ''}"
        pod = next((pod for pod in self._pods.items.values() if pod.key == key), None)
        if pod is not None:
            return pod.waits_for
        if job is not None and time.monotonic() - self._asked_s[key] > _NO_POD_S:
            return "no_pod", f"Kubernetes has made no pod for it; `kubectl describe job {job.name}` says why"
        return "", ""
