"""An API server to talk to over HTTP, and what of a cluster moves by itself: the Job controller, and a kubelet that runs real workers.

kmock keeps the objects; what the launcher leans on beyond that is added here: metadata, label selectors, watches from a version, 410.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from aiohttp import web
from kmock import KubernetesEmulator, KubernetesError, Server, action

from finery_trainer.launchers import Attempt
from finery_trainer.launchers.kubernetes import KubernetesLauncher
from finery_trainer.settings import TrainerSettings

NAMESPACE = "finery"
JOBS, PODS = "batch/v1/jobs", "v1/pods"


class _Recorder:
    """Takes the place of kmock's bus for one resource: numbers every change and keeps it for watches."""

    def __init__(self, api: ApiServer, plural: str) -> None:
        self._api = api
        self._plural = plural

    async def put(self, *items: Any) -> None:
        for event in items:
            await self._api.record(self._plural, event["type"], event["object"])


class ApiServer(KubernetesEmulator):
    """`forbidden` holds pairs of verb and plural, `refusals` answers by verb and plural; while `is_down`, every answer is 503.
    Of `lost_answers` creates the caller does not learn that they were done. `changes` is what watches are served from;
    while `is_silent`, nothing is added to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resources[JOBS] = {"kind": "Job", "namespaced": True}
        self.resources[PODS] = {"kind": "Pod", "namespaced": True}
        self.forbidden: set[tuple[str, str]] = set()
        self.is_down = False
        self.is_silent = False
        self.refusals: dict[tuple[str, str], KubernetesError] = {}
        self.lost_answers = 0
        self.num_lists = 0
        self.version = 100
        self.changes: list[tuple[int, str, str, dict[str, Any]]] = []
        self.news = asyncio.Condition()
        self._oldest = 0
        self._watch_generation = 0
        self._buses = cast("Any", {resource: _Recorder(self, str(resource.plural)) for resource in self.resources})

    async def record(self, plural: str, change: str, item: Any) -> None:
        async with self.news:
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            if not self.is_silent:
                self.changes.append((self.version, plural, change, copy.deepcopy(dict(item))))
            self.news.notify_all()

    async def drop_watches(self, *, forget: bool = False) -> None:
        """Ends every watch; with `forget`, what the watchers know last is too old by then."""
        async with self.news:
            self._watch_generation += 1
            if forget:
                self.version += 10
                self._oldest = self.version
            self.news.notify_all()

    def live(self, resource: str) -> list[dict[str, Any]]:
        return [value.raw for key, value in self.objects.items() if key[0] == resource and not value.deleted]

    async def store(self, resource: str, item: dict[str, Any]) -> None:
        """What a controller or kubelet writes."""
        key = (resource, NAMESPACE, item["metadata"]["name"])
        is_new = key[2] not in [known["metadata"]["name"] for known in self.live(resource)]
        if is_new:
            self._complete(item)
        await self.record(resource.rpartition("/")[2], "ADDED" if is_new else "MODIFIED", item)
        self.objects[key] = item

    async def remove(self, resource: str, name: str) -> None:
        item = self.objects[resource, NAMESPACE, name]
        raw = item.raw
        item.delete()
        await self.record(resource.rpartition("/")[2], "DELETED", raw)

    async def _handle(self, request: Any) -> Any:
        verb = "get" if request.action is action.FETCH else (request.action or action.LIST).value.lower()
        plural = request.resource.plural if request.resource else ""
        if self.is_down:
            raise KubernetesError(status=503, reason="ServiceUnavailable", message="etcd is away")
        if (verb, plural) in self.forbidden:
            raise KubernetesError(
                status=403,
                reason="Forbidden",
                message=f'{plural} is forbidden: User "system:serviceaccount:finery:trainer" cannot {verb} resource "{plural}"',
            )
        if refusal := self.refusals.get((verb, plural)):
            raise refusal
        if request.action is action.LIST:
            self.num_lists += 1
        if request.action is action.CREATE:
            if request.params.get("dryRun"):
                return web.json_response(request.data, status=201)
            self._complete(request.data)
        answer = await super()._handle(request)
        if request.action is action.CREATE and self.lost_answers:
            self.lost_answers -= 1
            raise KubernetesError(status=504, reason="Timeout", message="the answer was lost on its way")
        return answer

    def _complete(self, item: dict[str, Any]) -> None:
        self.version += 1
        item["metadata"] |= {
            "namespace": NAMESPACE,
            "uid": secrets.token_hex(16),
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "resourceVersion": str(self.version),
        }

    async def _serve_list(self, request: Any) -> Any:
        resource = f"{request.resource.group}/v1/{request.resource.plural}".removeprefix("/")
        items = [item for item in self.live(resource) if _is_selected(item, request)]
        return {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def _serve_watch(self, request: Any) -> AsyncIterator[Any]:
        yield b""
        since, generation = int(request.params["resourceVersion"]), self._watch_generation
        deadline_s = time.monotonic() + int(request.params["timeoutSeconds"])
        if since < self._oldest:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {since}"}
            yield {"type": "ERROR", "object": status}
            return
        yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(since)}}}
        while generation == self._watch_generation and time.monotonic() < deadline_s:
            for version, plural, change, item in [entry for entry in self.changes if entry[0] > since]:
                since = version
                if plural == request.resource.plural and _is_selected(item, request):
                    yield {"type": change, "object": item}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2), self.news:
                    await self.news.wait()


def _is_selected(item: dict[str, Any], request: Any) -> bool:
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, request.params.get("labelSelector", "").split(",")):
        name, is_pair, value = term.partition("=")
        if name not in labels or (is_pair and labels[name] != value):
            return False
    return True


class Controller:
    """The Job controller: a pod for every Job that is not suspended, a condition for every pod that ended, no pod without its Job."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api

    async def run(self) -> None:
        seen = 0
        while True:
            async with self.api.news:
                await self.api.news.wait_for(lambda: self.api.version > seen)  # noqa: B023
                seen = self.api.version
            await self._reconcile()

    async def _reconcile(self) -> None:
        jobs = {job["metadata"]["name"]: job for job in self.api.live(JOBS)}
        pods = {pod["metadata"]["labels"]["job-name"]: pod for pod in self.api.live(PODS)}
        for name, pod in pods.items():
            job = jobs.get(name)
            if job is None or job["spec"].get("suspend"):
                await self.end_pod(pod)
            elif pod["status"]["phase"] in ("Failed", "Succeeded") and not job.get("status", {}).get("conditions"):
                await self._finish(job, pod)
        for name in jobs.keys() - pods.keys():
            if not jobs[name]["spec"].get("suspend") and not jobs[name].get("status", {}).get("conditions"):
                await self.api.store(PODS, _pod_of(jobs[name]))

    async def end_pod(self, pod: dict[str, Any]) -> None:
        await self.api.remove(PODS, pod["metadata"]["name"])

    async def pod(self, attempt: Attempt) -> dict[str, Any]:
        """The attempt's pod, once there is one."""
        while True:
            for pod in self.api.live(PODS):
                if pod["metadata"]["labels"]["job-name"] == f"{attempt.job_id}-{attempt.epoch}":
                    return copy.deepcopy(pod)
            await asyncio.sleep(0.02)

    async def begin(self, attempt: Attempt) -> None:
        await self.api.store(PODS, await self.pod(attempt) | {"status": _running_status()})

    async def end(self, attempt: Attempt, code: int, *, reason: str = "Error", disrupted_by: str = "", why: str = "") -> None:
        """The worker's container has ended, for `reason`; `why` is what Kubernetes says of the pod."""
        status: dict[str, Any] = {"reason": why, "message": "low on memory"} if why else {}
        if disrupted_by:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": disrupted_by, "message": "an operator's"}]
        await self.api.store(PODS, await self.pod(attempt) | {"status": _ended_status(code, reason=reason) | status})

    async def wait_for(self, attempt: Attempt, **status: Any) -> None:
        """The pod cannot begin yet."""
        await self.api.store(PODS, await self.pod(attempt) | {"status": {"phase": "Pending"} | status})

    async def suspend(self, attempt: Attempt, *, suspended: bool) -> None:
        job = copy.deepcopy(next(job for job in self.api.live(JOBS) if job["metadata"]["name"] == f"{attempt.job_id}-{attempt.epoch}"))
        job["spec"]["suspend"] = suspended
        await self.api.store(JOBS, job)

    async def _finish(self, job: dict[str, Any], pod: dict[str, Any]) -> None:
        job = copy.deepcopy(job)
        if pod["status"]["phase"] == "Succeeded":
            condition = {"type": "Complete", "status": "True"}
        else:
            condition = {
                "type": "Failed",
                "status": "True",
                "reason": "BackoffLimitExceeded",
                "message": "Job has reached the specified backoff limit",
            }
        await self.api.store(JOBS, job | {"status": {"conditions": [condition]}})


def _pod_of(job: dict[str, Any]) -> dict[str, Any]:
    template = copy.deepcopy(job["spec"]["template"])
    name = job["metadata"]["name"]
    metadata = template["metadata"] | {"name": f"{name}-{secrets.token_hex(3)[:5]}"}
    metadata["labels"] = metadata["labels"] | {"job-name": name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}}


class Kubelet(Controller):
    """Runs each pod's worker as a process with the container's environment and nothing else of Finery's; the token as a mounted file."""

    def __init__(self, api: ApiServer, folder: Path) -> None:
        super().__init__(api)
        self._folder = folder
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._waiters: set[asyncio.Task[None]] = set()

    async def _reconcile(self) -> None:
        await super()._reconcile()
        for pod in self.api.live(PODS):
            if pod["metadata"]["name"] not in self.processes and pod["status"]["phase"] == "Pending":
                await self._start(pod)

    async def end_pod(self, pod: dict[str, Any]) -> None:
        process = self.processes.get(pod["metadata"]["name"])
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
        else:
            await super().end_pod(pod)

    async def stop(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*self._waiters)

    async def _start(self, pod: dict[str, Any]) -> None:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        token = self._folder / f"token-{name}"
        token.write_text(pod["metadata"]["annotations"]["finery.dev/worker-token"])
        env = {key: value for key, value in os.environ.items() if not key.startswith("FINERY_")}
        env |= {item["name"]: item["value"].replace("/run/finery/token", str(token)) for item in container["env"]}
        with (self._folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *container["command"][1:], env=env, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
            )
        self.processes[name] = process
        await self.api.store(PODS, copy.deepcopy(pod) | {"status": _running_status()})
        self._waiters.add(asyncio.create_task(self._wait(name, process)))

    async def _wait(self, name: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if pod := next((pod for pod in self.api.live(PODS) if pod["metadata"]["name"] == name), None):
            await self.api.store(PODS, copy.deepcopy(pod) | {"status": _ended_status(code if code >= 0 else 128 - code)})


def _running_status() -> dict[str, Any]:
    return {"phase": "Running", "containerStatuses": [{"name": "worker", "state": {"running": {}}}]}


def _ended_status(code: int, *, reason: str = "Error") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else reason}}
    return {"phase": "Succeeded" if code == 0 else "Failed", "containerStatuses": [{"name": "worker", "state": state}]}


TEMPLATE: dict[str, Any] = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "set-by-the-launcher", "labels": {"app.kubernetes.io/name": "finery"}},
    "spec": {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "finery", "app.kubernetes.io/instance": "one"}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "containers": [
                    {
                        "name": "worker",
                        "image": "finery-trainer:0.1.0",
                        "command": ["python", "-m", "finery_trainer.worker"],
                        "env": [{"name": "FINERY_STATE_DIR", "value": "/var/lib/finery"}],
                        "resources": {"limits": {"memory": "8Gi", "cpu": 2}, "requests": {"cpu": 1}},
                        "volumeMounts": [{"name": "token", "mountPath": "/run/finery", "readOnly": True}],
                    }
                ],
                "volumes": [
                    {
                        "name": "token",
                        "downwardAPI": {
                            "items": [{"path": "token", "fieldRef": {"fieldPath": "metadata.annotations['finery.dev/worker-token']"}}]
                        },
                    }
                ],
            },
        },
    },
}


@pytest.fixture
def template() -> dict[str, Any]:
    """What a chart renders, to be changed."""
    return copy.deepcopy(TEMPLATE)


@pytest.fixture
def write_kubeconfig(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Makes KUBECONFIG name the API server of an address."""

    def write(server: str) -> None:
        named = {
            "clusters": {"cluster": {"server": server}},
            "users": {"user": {"token": "t"}},
            "contexts": {"context": {"cluster": "c", "user": "c"}},
        }
        entries = {key: [{"name": "c", **value}] for key, value in named.items()}
        file = tmp_path / "kubeconfig.yaml"
        file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "c", **entries}))
        monkeypatch.setenv("KUBECONFIG", str(file))

    return write


@pytest.fixture
async def api(write_kubeconfig) -> AsyncIterator[ApiServer]:
    """Runs, and is what KUBECONFIG names."""
    async with ApiServer() as api, Server(api):
        write_kubeconfig(str(api.url))
        yield api
        # A server that ends waits for its streams.
        await api.drop_watches()


@pytest.fixture
async def controller(api) -> AsyncIterator[Controller]:
    """The Job controller runs; pods stay as the test makes them."""
    async with _reconciling(Controller(api)) as controller:
        yield controller


@pytest.fixture
async def kubelet(api, tmp_path) -> AsyncIterator[Kubelet]:
    """The Job controller runs, and pods are processes."""
    (tmp_path / "kubelet").mkdir()
    kubelet = Kubelet(api, tmp_path / "kubelet")
    async with _reconciling(kubelet):
        yield kubelet
        await kubelet.stop()


@contextlib.asynccontextmanager
async def _reconciling(controller: Controller) -> AsyncIterator[Controller]:
    task = asyncio.create_task(controller.run())
    yield controller
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


MakeSettings = Callable[..., dict[str, Any]]


@pytest.fixture
def launcher_fields(tmp_path, template) -> MakeSettings:
    """Settings for Kubernetes, the template of the test written out."""

    def make(**fields: Any) -> dict[str, Any]:
        file = tmp_path / "worker-job.yaml"
        file.write_text(yaml.safe_dump(template))
        return {
            "launcher": "kubernetes",
            "kubernetes_namespace": NAMESPACE,
            "kubernetes_job_template": file,
            "trainer_address": "finery-trainer:9000",
        } | fields

    return make


@pytest.fixture
async def connect(launcher_fields):
    """Makes launchers that know the cluster, and ends them."""
    launchers: list[KubernetesLauncher] = []

    async def make(**fields: Any) -> KubernetesLauncher:
        launchers.append(await KubernetesLauncher.connect(TrainerSettings(**launcher_fields(**fields))))
        return launchers[-1]

    yield make
    for launcher in launchers:
        await launcher.stop_all(grace_s=5)


@pytest.fixture
def attempt() -> Attempt:
    return Attempt("ftjob-" + secrets.token_hex(12), 3, "a.signed.token", gpus=2)
