"""What Jobs and pods of the cluster say about a worker: that it waits, and for what; that it began; how it ended.

Owns reading Kubernetes' words, conditions and exit codes. Acting on them is the launcher's, what follows an end is the scheduler's.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from finery_trainer.launchers import CONFIG_EXIT_CODE, STOPPED_EXIT_CODE, Exit
from finery_trainer.launchers.cluster import Json

JOB_ID_LABEL, ATTEMPT_LABEL, COMPONENT_LABEL = "finery.dev/job-id", "finery.dev/attempt", "app.kubernetes.io/component"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
CONTAINER = "worker"

Key = tuple[str, int]
"""Job id and epoch of an attempt."""

_CANNOT_RUN = (126, 127)
"""Exit codes of a container whose program is not there or cannot be executed."""
_NOT_STARTED = 128
"""Exit code of a container that its node's runtime could not start: another node may."""
_HOPELESS = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
"""What a container waits for in vain: only another Job can mend it."""
_USUAL = ("", "ContainerCreating", "PodInitializing")
_IMAGE = ("ErrImagePull", "ImagePullBackOff")


@dataclass(frozen=True)
class WorkerJob:
    """An attempt's Job. `failure` is the reason and message of its Failed condition, empty where it has not failed."""

    name: str
    key: Key
    is_suspended: bool
    queue: str
    is_complete: bool
    failure: str

    @property
    def is_finished(self) -> bool:
        return self.is_complete or bool(self.failure)


@dataclass(frozen=True)
class WorkerPod:
    """An attempt's pod. `disruption` is why Kubernetes ends it, empty where it does not; `waits_for` is a reason and a text.

    `exit_code` and `exit_reason` are the worker container's; `never_began` where it never ran in a pod that is over.
    """

    name: str
    key: Key
    created: str
    phase: str
    status: str
    message: str
    disruption: str
    waits_for: tuple[str, str]
    exit_code: int | None
    exit_reason: str
    never_began: bool

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def has_begun(self) -> bool:
        return self.phase in ("Running", "Succeeded", "Failed")


def key_of(item: Json) -> Key:
    """The attempt that the labels name. An epoch that is no number is 0, which no attempt has."""
    labels = item["metadata"].get("labels") or {}
    epoch = str(labels.get(ATTEMPT_LABEL, ""))
    return str(labels.get(JOB_ID_LABEL, "")), int(epoch) if epoch.isdigit() else 0


def read_job(item: Json) -> WorkerJob:
    """Of the API's JSON."""
    conditions = _conditions(item)
    # FailureTarget comes first, once it is decided; Failed when the pods have ended, too.
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    return WorkerJob(
        name=item["metadata"]["name"],
        key=key_of(item),
        is_suspended=bool(item.get("spec", {}).get("suspend")),
        queue=(item["metadata"].get("labels") or {}).get(QUEUE_LABEL, ""),
        is_complete="Complete" in conditions,
        failure="" if failed is None else f"{failed.get('reason', '')}: {failed.get('message', '')}",
    )


def read_pod(item: Json) -> WorkerPod:
    """Of the API's JSON."""
    status: Json = item.get("status") or {}
    conditions = _conditions(item)
    containers = cast("list[Json]", [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())])
    worker = next((container for container in containers if container.get("name") == CONTAINER), {})
    state: Json = worker.get("state") or {}
    ended: Json = state.get("terminated") or {}
    disruption = conditions.get("DisruptionTarget")
    return WorkerPod(
        name=item["metadata"]["name"],
        key=key_of(item),
        created=item["metadata"].get("creationTimestamp", ""),
        phase=status.get("phase", "Pending"),
        status=status.get("reason", ""),
        message=status.get("message", ""),
        disruption="" if disruption is None else disruption.get("reason") or "DisruptionTarget",
        waits_for=_waits_for(item, containers),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        # A node that does not admit a pod reports no container at all; one whose preparation failed still waits for that.
        never_began=status.get("phase") == "Failed" and (not state or "waiting" in state or ended.get("exitCode") == _NOT_STARTED),
    )


def exit_of(key: Key, job: WorkerJob | None, pods: Sequence[WorkerPod], *, has_begun: bool) -> Exit | None:
    """How the attempt ended; None while it goes on, or may still begin. `job` is None where it was deleted."""
    alive = [pod for pod in pods if not pod.is_over]
    if alive:
        return next((_hopeless(pod) for pod in alive if pod.waits_for[0] in _HOPELESS), None)
    if pods:
        return _of_pod(max(pods, key=lambda pod: pod.created))
    if job is None:
        return Exit(*key, was_stopped=False, reason="was lost: somebody deleted its Job")
    if job.is_finished:
        return _of_job(job)
    if job.is_suspended and has_begun:
        return Exit(*key, was_stopped=True, reason=f"had to give its place back to the queue {job.queue}".rstrip())
    return None


def _of_pod(pod: WorkerPod) -> Exit:
    """A saved state counts most; then what Kubernetes did to the pod, then what the container itself came to."""
    code = pod.exit_code
    # Pressure on a node may be the worker's own doing, so an eviction counts as a lost attempt.
    if code == STOPPED_EXIT_CODE or (pod.disruption and pod.status != "Evicted"):
        return Exit(*pod.key, was_stopped=True, reason=f"was disrupted ({pod.disruption})" if pod.disruption else _text(code))
    if pod.exit_reason == "OOMKilled":
        reason = "was killed because its memory ran out (OOMKilled); give worker pods more memory, or the job smaller batches"
    elif pod.status:
        reason = f"was ended by Kubernetes ({pod.status}: {pod.message})"
    elif code is None:
        reason = "never ran: what prepares its pod failed" if pod.never_began else "ended without an exit status"
    else:
        reason = _text(code, pod.exit_reason)
    is_final = code == CONFIG_EXIT_CODE or code in _CANNOT_RUN
    return Exit(*pod.key, was_stopped=False, reason=reason, is_final=is_final, never_began=pod.never_began)


def _of_job(job: WorkerJob) -> Exit:
    """Where the pod is gone already: what the Job remembers of it."""
    if job.is_complete:
        return Exit(*job.key, was_stopped=False, reason=_text(0))
    found = re.search(r"exit code (\d+)", job.failure)
    code = int(found[1]) if found else None
    return Exit(
        *job.key,
        was_stopped=code == STOPPED_EXIT_CODE or "DisruptionTarget" in job.failure,
        reason=f"ended, and its pod is gone; its Job says {job.failure}",
        is_final=code == CONFIG_EXIT_CODE,
        never_began=code == _NOT_STARTED,
    )


def _hopeless(pod: WorkerPod) -> Exit:
    return Exit(*pod.key, was_stopped=False, reason=f"cannot start: {pod.waits_for[1]}", is_final=True)


def _text(code: int | None, said: str = "") -> str:
    if code == _NOT_STARTED:
        return f"could not be started by its node's container runtime ({said or code})"
    if code is not None and code - 128 in set(signal.Signals):
        return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with exit status {code}"


def _waits_for(item: Json, containers: Iterable[Json]) -> tuple[str, str]:
    """A word and a text for what keeps a pod from beginning; empty while it is as usual."""
    for container in containers:
        waiting: Json = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason in _IMAGE:
            return "image", f"the image {container.get('image', '')} cannot be pulled ({reason}: {waiting.get('message', '')})"
        if reason not in _USUAL:
            return reason, f"{reason}: {waiting.get('message', '')}"
    for condition in (item.get("status") or {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", "Unschedulable"), f"no node takes it ({condition.get('message', '')})"
    return "", ""


def _conditions(item: Json) -> dict[str, dict[str, Any]]:
    """Those that hold, by type."""
    found = cast("list[dict[str, Any]]", (item.get("status") or {}).get("conditions") or [])
    return {condition["type"]: condition for condition in found if condition.get("status") == "True"}
