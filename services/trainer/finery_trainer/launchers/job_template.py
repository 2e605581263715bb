"""The Job that workers are made from: a file with a whole batch/v1 Job, which the launcher fills in for each attempt.

Owns what a template must say and must not, checked once at the start, and which fields are the launcher's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from finery_common.errors import FailedPreconditionError
from finery_trainer.launchers import Attempt
from finery_trainer.launchers.evidence import ATTEMPT_LABEL, COMPONENT_LABEL, CONTAINER, JOB_ID_LABEL, QUEUE_LABEL

TOKEN_ANNOTATION = "finery.dev/worker-token"
TOKEN_FILE = "/run/finery/token"
_INSTANCE_LABEL = "app.kubernetes.io/instance"
_KEPT_S = 24 * 3600
"""How long an ended Job, and so its log, stays where the template does not say."""

_WANTED = (
    ("apiVersion", "batch/v1", ""),
    ("kind", "Job", ""),
    ("spec.template.spec.restartPolicy", "Never", ""),
    ("spec.backoffLimit", 0, "; a worker that died is started again by the trainer, from its last checkpoint and as a new attempt"),
)

Json = dict[str, Any]


@dataclass(frozen=True)
class JobTemplate:
    """`gpu_resource` is what a GPU is called in limits; empty where the template itself says what devices a worker gets."""

    body: Json
    gpu_resource: str
    trainer_address: str

    @classmethod
    def load(cls, file: Path, *, gpu_resource: str, trainer_address: str) -> JobTemplate:
        """Raises FailedPreconditionError that names file and fields, with what was got and wanted."""
        try:
            body = yaml.safe_load(file.read_text())
        except OSError as error:
            raise FailedPreconditionError(
                f"FINERY_KUBERNETES_JOB_TEMPLATE: cannot read {file}: {error.strerror}; set it to the YAML of workers' Job."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FailedPreconditionError(f"{file}: got no YAML, wanted a Job of batch/v1: {error}") from error
        if problems := list(_problems(body, gpu_resource=gpu_resource)):
            raise FailedPreconditionError(f"{file}: {'; '.join(problems)}")
        return cls(body, gpu_resource, trainer_address)

    @property
    def selector(self) -> str:
        """Chooses the Jobs and pods of this installation's workers."""
        instance = _at(self.body, "spec.template.metadata.labels").get(_INSTANCE_LABEL)
        return f"{COMPONENT_LABEL}=worker,{JOB_ID_LABEL}" + (f",{_INSTANCE_LABEL}={instance}" if instance else "")

    def job(self, attempt: Attempt) -> Json:
        """The attempt's Job. Its name is made from job and attempt, so that there is never a second one."""
        job = copy.deepcopy(self.body)
        labels = {JOB_ID_LABEL: attempt.job_id, ATTEMPT_LABEL: str(attempt.epoch), COMPONENT_LABEL: "worker"}
        pod = job["spec"]["template"]
        instance = {key: value for key, value in _at(pod, "metadata.labels").items() if key == _INSTANCE_LABEL}
        job["metadata"] = _without(job.get("metadata") or {}, "generateName", "namespace")
        job["metadata"] |= {"name": job_name(attempt), "labels": {**_at(job, "metadata.labels"), **instance, **labels}}
        pod["metadata"] = {**(pod.get("metadata") or {}), "labels": {**_at(pod, "metadata.labels"), **labels}}
        pod["metadata"]["annotations"] = {**_at(pod, "metadata.annotations"), TOKEN_ANNOTATION: attempt.token}
        job["spec"].setdefault("ttlSecondsAfterFinished", _KEPT_S)
        if QUEUE_LABEL in job["metadata"]["labels"]:
            job["spec"]["suspend"] = True
        self._fill(_worker(job), attempt)
        return job

    def _fill(self, container: Json, attempt: Attempt) -> None:
        env = cast("list[Json]", container.get("env") or [])
        known = {item["name"] for item in env}
        # Threads that spin at barriers make a step five times slower as soon as anything else runs on the same cores.
        ours = {"FINERY_TRAINER_ADDRESS": self.trainer_address, "FINERY_WORKER_TOKEN_FILE": TOKEN_FILE, "OMP_WAIT_POLICY": "PASSIVE"}
        container["env"] = [*env, *({"name": name, "value": value} for name, value in ours.items() if name not in known)]
        if self.gpu_resource:
            resources = container["resources"] = container.get("resources") or {}
            resources["limits"] = {**(resources.get("limits") or {}), self.gpu_resource: str(attempt.gpus)}
            # Kubernetes wants both to be equal, and takes the limit where there is no request.
            resources["requests"] = _without(resources.get("requests") or {}, self.gpu_resource)


def job_name(attempt: Attempt) -> str:
    """At most 63 characters, as labels have it: ids are of 30."""
    return f"{attempt.job_id}-{attempt.epoch}"


def _problems(body: object, *, gpu_resource: str) -> Iterator[str]:
    if not isinstance(body, dict):
        yield f"got {type(body).__name__}, wanted a Job of batch/v1"
        return
    job = cast("Json", body)
    for field, wanted, why in _WANTED:
        got = _at(job, field, None)
        if got != wanted or isinstance(got, bool):
            yield f"{field}: got {got!r}, wanted {wanted!r}{why}"
    for field in ("spec.completions", "spec.parallelism"):
        if (got := _at(job, field, 1)) != 1:
            yield f"{field}: got {got!r}, wanted 1; a job trains on the GPUs of one node"
    for number, rule in enumerate(_list(job, "spec.podFailurePolicy.rules")):
        if rule.get("action") != "FailJob":
            yield (
                f"spec.podFailurePolicy.rules[{number}].action: got {rule.get('action')!r}, wanted 'FailJob'; the trainer starts "
                "another attempt, from the last checkpoint, where a pod that Kubernetes adds would be a second worker of the same one"
            )
    yield from _pod_problems(job, gpu_resource=gpu_resource)


def _pod_problems(job: Json, *, gpu_resource: str) -> Iterator[str]:
    containers = _list(job, "spec.template.spec.containers")
    names = [container.get("name") for container in containers]
    if names.count(CONTAINER) != 1:
        yield f"spec.template.spec.containers: got {names}, wanted one that is named {CONTAINER}"
    elif gpu_resource and _at(_worker(job), "resources.claims"):
        yield (
            f"spec.template.spec.containers[{names.index(CONTAINER)}].resources.claims: got claims beside "
            f"FINERY_KUBERNETES_GPU_RESOURCE={gpu_resource}, wanted one of both; leave the claims out, or set that variable to nothing"
        )
    if not any(_gives_token(volume) for volume in _list(job, "spec.template.spec.volumes")):
        yield (
            f"spec.template.spec.volumes: got none that holds metadata.annotations['{TOKEN_ANNOTATION}'], wanted a downwardAPI volume "
            f"that does, mounted so that the worker finds it at {TOKEN_FILE}"
        )


def _gives_token(volume: Mapping[str, Any]) -> bool:
    sources = [volume, *(volume.get("projected") or {}).get("sources", [])]
    items = [item for source in sources for item in (source.get("downwardAPI") or {}).get("items", [])]
    return any(f"'{TOKEN_ANNOTATION}'" in (item.get("fieldRef") or {}).get("fieldPath", "") for item in items)


def _worker(job: Json) -> Json:
    return next(container for container in _list(job, "spec.template.spec.containers") if container.get("name") == CONTAINER)


def _at(item: Json, path: str, default: Any = ()) -> Any:
    """What lies at a path of keys; without one, an empty dictionary for no `default`."""
    value: Any = item
    for key in path.split("."):
        value = cast("Json", value).get(key) if isinstance(value, dict) else None
    if value is None:
        return {} if default == () else default
    return value


def _list(item: Json, path: str) -> list[Json]:
    found = _at(item, path, None)
    return [cast("Json", each) for each in cast("list[object]", found) if isinstance(each, dict)] if isinstance(found, list) else []


def _without(item: Json, *keys: str) -> Json:
    return {key: value for key, value in item.items() if key not in keys}
