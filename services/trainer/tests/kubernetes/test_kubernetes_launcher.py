"""The launcher against an API server: what Jobs it makes, what it learns of them, what it survives. No worker runs."""

from __future__ import annotations

import asyncio
import dataclasses

import certifi
import pytest
from kmock import KubernetesError
from kubernetes.aio.config import incluster_config

from finery_common.errors import AlreadyExistsError, FailedPreconditionError, PermissionDeniedError, UnavailableError
from finery_trainer.launchers.cluster import Cluster

JOBS = "batch/v1/jobs"


@pytest.fixture
def exits_of(wait_until):
    """The exits of a launcher, once there is one; more would be a mistake."""

    async def take(launcher):
        found = []

        async def has_one() -> bool:
            found.extend(launcher.take_exits())
            return bool(found)

        await wait_until(has_one)
        (ended,) = found
        return ended

    return take


@pytest.fixture
def causes_of(wait_until):
    """What the one waiting worker waits for, once it is `reason`."""

    async def wait(launcher, reason):
        async def is_told() -> bool:
            return [item.reason for item in launcher.waiting()] == [reason]

        await wait_until(is_told)
        return launcher.waiting()[0].text

    return wait


@pytest.fixture
async def launcher(api, connect, attempt):
    """Has started `attempt`."""
    launcher = await connect()
    await launcher.start(attempt)
    return launcher


async def begin(controller, launcher, attempt, wait_until):
    """The worker has begun, and the launcher knows."""
    await controller.begin(attempt)

    async def waits_no_more() -> bool:
        return launcher.waiting() == []

    await wait_until(waits_no_more)


async def test_the_launcher_fills_in_what_is_the_attempts(api, launcher, attempt):
    (job,) = api.live(JOBS)
    assert job["metadata"]["name"] == f"{attempt.job_id}-3"
    ours = {"finery.dev/job-id": attempt.job_id, "finery.dev/attempt": "3", "app.kubernetes.io/component": "worker"}
    pod = job["spec"]["template"]
    for labels in (job["metadata"]["labels"], pod["metadata"]["labels"]):
        assert labels == ours | {"app.kubernetes.io/name": "finery", "app.kubernetes.io/instance": "one"}
    assert pod["metadata"]["annotations"] == {"finery.dev/worker-token": "a.signed.token"}
    (container,) = pod["spec"]["containers"]
    assert container["resources"] == {"limits": {"memory": "8Gi", "cpu": 2, "nvidia.com/gpu": "2"}, "requests": {"cpu": 1}}
    assert {item["name"]: item["value"] for item in container["env"]} == {
        "FINERY_STATE_DIR": "/var/lib/finery",
        "FINERY_TRAINER_ADDRESS": "finery-trainer:9000",
        "FINERY_WORKER_TOKEN_FILE": "/run/finery/token",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    assert "suspend" not in job["spec"]
    (request,) = [request for request in api._requests if request.method == "POST"]
    assert request.params["fieldValidation"] == "Strict"


async def test_a_queue_label_makes_suspended_jobs(api, connect, attempt, template, causes_of):
    template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    launcher = await connect(kubernetes_gpu_resource="")
    await launcher.start(attempt)
    (job,) = api.live(JOBS)
    assert job["spec"]["suspend"] is True
    assert "nvidia.com/gpu" not in job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "in the queue gpus" in await causes_of(launcher, "queue")


async def test_a_create_whose_answer_is_lost_makes_one_job(api, connect, attempt):
    api.lost_answers = 1
    launcher = await connect()
    await launcher.start(attempt)
    await launcher.start(attempt)
    assert len(api.live(JOBS)) == 1


async def test_a_job_of_that_name_that_is_not_ours_is_an_error(api, connect, attempt):
    launcher = await connect()
    name = f"{attempt.job_id}-{attempt.epoch}"
    await api.store(JOBS, {"kind": "Job", "metadata": {"name": name, "labels": {"finery.dev/job-id": "another"}}, "spec": {}})
    with pytest.raises(AlreadyExistsError, match=name):
        await launcher.start(attempt)


@pytest.mark.parametrize(
    ("code", "fields", "was_stopped", "is_final", "text"),
    [
        (0, {}, False, False, "ended with exit status 0"),
        (1, {}, False, False, "ended with exit status 1"),
        (75, {}, True, False, "ended with exit status 75"),
        (78, {}, False, True, "ended with exit status 78"),
        (127, {"reason": "ContainerCannotRun"}, False, True, "ended with exit status 127"),
        (139, {}, False, False, "was ended by SIGSEGV"),
        (137, {"reason": "OOMKilled"}, False, False, "its memory ran out (OOMKilled)"),
        (143, {"disrupted_by": "PreemptionByScheduler"}, True, False, "was disrupted (PreemptionByScheduler)"),
        (75, {"disrupted_by": "EvictionByEvictionAPI"}, True, False, "was disrupted (EvictionByEvictionAPI)"),
        (
            137,
            {"disrupted_by": "TerminationByKubelet", "why": "Evicted"},
            False,
            False,
            "was ended by Kubernetes (Evicted: low on memory)",
        ),
    ],
)
async def test_how_a_worker_ended_is_read_off_its_pod(controller, launcher, attempt, exits_of, code, fields, was_stopped, is_final, text):
    await controller.begin(attempt)
    await controller.end(attempt, code, **fields)
    ended = await exits_of(launcher)
    assert (ended.job_id, ended.epoch) == (attempt.job_id, attempt.epoch)
    assert text in ended.reason
    assert (ended.was_stopped, ended.is_final, ended.never_began) == (was_stopped, is_final, False)
    assert launcher.waiting() == []


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            {"containerStatuses": [{"name": "worker", "state": {"terminated": {"exitCode": 128, "reason": "StartError"}}}]},
            "could not be started by its node's container runtime (StartError)",
        ),
        ({"reason": "UnexpectedAdmissionError", "message": "no device"}, "was ended by Kubernetes (UnexpectedAdmissionError: no device)"),
        (
            {"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "PodInitializing"}}}]},
            "never ran: what prepares its pod failed",
        ),
    ],
)
async def test_a_worker_that_never_ran_says_nothing_of_its_job(controller, launcher, attempt, exits_of, status, text):
    await controller.wait_for(attempt, **({"phase": "Failed"} | status))
    ended = await exits_of(launcher)
    assert ended.never_began
    assert (ended.was_stopped, ended.is_final) == (False, False)
    assert text in ended.reason


@pytest.mark.parametrize(
    ("message", "was_stopped", "is_final"),
    [
        ("Pod finery/x has condition DisruptionTarget matching FailJob rule at index 0", True, False),
        ("Container worker for pod finery/x failed with exit code 78 matching FailJob rule at index 1", False, True),
        ("Job has reached the specified backoff limit", False, False),
    ],
)
async def test_a_pod_that_is_gone_is_judged_by_what_its_job_remembers(api, launcher, attempt, exits_of, message, was_stopped, is_final):
    (job,) = api.live(JOBS)
    condition = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": message}
    await api.store(JOBS, job | {"status": {"conditions": [condition]}})
    ended = await exits_of(launcher)
    assert (ended.was_stopped, ended.is_final) == (was_stopped, is_final)
    assert message in ended.reason


@pytest.mark.parametrize(
    ("reason", "status", "text"),
    [
        (
            "Unschedulable",
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "4 Insufficient nvidia.com/gpu"}
                ]
            },
            "no node takes it (4 Insufficient nvidia.com/gpu)",
        ),
        (
            "image",
            {
                "containerStatuses": [
                    {"name": "worker", "image": "finery:9", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
                ]
            },
            "the image finery:9 cannot be pulled (ImagePullBackOff: not found)",
        ),
        (
            "CrashLoopBackOff",
            {"initContainerStatuses": [{"name": "fetch", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "again"}}}]},
            "CrashLoopBackOff: again",
        ),
        ("", {"containerStatuses": [{"name": "worker", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, ""),
    ],
)
async def test_what_a_worker_waits_for_is_told(controller, launcher, attempt, causes_of, reason, status, text):
    await controller.wait_for(attempt, **status)
    assert await causes_of(launcher, reason) == text
    await controller.begin(attempt)


async def test_a_job_that_gets_no_pod_is_told_of(launcher, causes_of, monkeypatch):
    monkeypatch.setattr("finery_trainer.launchers.kubernetes._NO_POD_S", 0.0)
    assert "has made no pod for it;" in await causes_of(launcher, "no_pod")


async def test_a_job_that_is_deleted_before_it_was_seen_is_a_lost_attempt(api, connect, attempt, exits_of, monkeypatch):
    for name in ("_UNSEEN_S", "_LOOK_AGAIN_S"):
        monkeypatch.setattr(f"finery_trainer.launchers.kubernetes.{name}", 0.1)
    launcher = await connect()
    api.is_silent = True
    await launcher.start(attempt)
    await api.remove(JOBS, f"{attempt.job_id}-{attempt.epoch}")
    assert "somebody deleted its Job" in (await exits_of(launcher)).reason


async def test_a_worker_that_has_begun_waits_no_more(controller, launcher, attempt, wait_until):
    assert [(item.job_id, item.epoch) for item in launcher.waiting()] == [(attempt.job_id, attempt.epoch)]
    await begin(controller, launcher, attempt, wait_until)
    assert launcher.take_exits() == []


async def test_a_container_that_can_never_start_ends_the_attempt_for_good(api, controller, launcher, attempt, exits_of):
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}
    await controller.wait_for(attempt, containerStatuses=[{"name": "worker", "state": {"waiting": waiting}}])
    ended = await exits_of(launcher)
    assert ended.is_final
    assert 'secret "s3" not found' in ended.reason
    assert api.live(JOBS) == []


async def test_kill_removes_the_jobs_of_one_job_only(api, controller, launcher, attempt):
    other = dataclasses.replace(attempt, job_id="ftjob-" + "0" * 24)
    await launcher.start(other)
    await launcher.kill(attempt.job_id)
    assert [job["metadata"]["labels"]["finery.dev/job-id"] for job in api.live(JOBS)] == [other.job_id]
    (request,) = [request for request in api._requests if request.method == "DELETE"]
    assert (request.params["propagationPolicy"], request.params["gracePeriodSeconds"]) == ("Background", "0")
    await launcher.kill(attempt.job_id)


async def test_a_new_attempt_removes_what_is_left_of_those_before(api, launcher, attempt, wait_until):
    async def is_known() -> bool:
        await launcher.start(dataclasses.replace(attempt, epoch=4))
        return len(api.live(JOBS)) == 1

    await wait_until(is_known)
    assert api.live(JOBS)[0]["metadata"]["labels"]["finery.dev/attempt"] == "4"


async def test_a_job_that_somebody_deletes_is_a_lost_attempt(api, controller, launcher, attempt, exits_of, wait_until):
    await begin(controller, launcher, attempt, wait_until)
    await api.remove(JOBS, f"{attempt.job_id}-{attempt.epoch}")
    ended = await exits_of(launcher)
    assert "somebody deleted its Job" in ended.reason
    assert not ended.was_stopped


async def test_a_queue_that_takes_a_begun_workers_place_back_ends_the_attempt(controller, launcher, attempt, exits_of, wait_until):
    await begin(controller, launcher, attempt, wait_until)
    await controller.suspend(attempt, suspended=True)
    ended = await exits_of(launcher)
    assert ended.was_stopped
    assert "queue" in ended.reason


async def test_a_watch_that_is_lost_goes_on_where_it_was(api, controller, launcher, attempt, exits_of, wait_until):
    await begin(controller, launcher, attempt, wait_until)
    num_lists = api.num_lists
    for _ in range(3):
        await api.drop_watches()
        await asyncio.sleep(0.05)
    await controller.end(attempt, 1)
    assert (await exits_of(launcher)).reason == "ended with exit status 1"
    assert api.num_lists == num_lists


async def test_a_version_that_is_forgotten_is_listed_anew(api, controller, launcher, attempt, exits_of, wait_until):
    await begin(controller, launcher, attempt, wait_until)
    num_lists = api.num_lists
    await api.drop_watches(forget=True)
    await controller.end(attempt, 1)
    assert (await exits_of(launcher)).reason == "ended with exit status 1"
    assert api.num_lists > num_lists


async def test_what_happened_while_the_api_server_was_away_is_learnt_afterwards(api, controller, launcher, attempt, exits_of):
    await controller.begin(attempt)
    api.is_down = True
    await api.drop_watches()
    await controller.end(attempt, 75)
    with pytest.raises(UnavailableError, match="etcd is away"):
        await launcher.start(dataclasses.replace(attempt, epoch=4))
    api.is_down = False
    assert (await exits_of(launcher)).was_stopped


async def test_a_service_that_starts_anew_finds_its_workers(controller, connect, launcher, attempt, exits_of, wait_until):
    await launcher.stop_all(grace_s=5)
    again = await connect()

    async def waits_again() -> bool:
        return [item.epoch for item in again.waiting()] == [attempt.epoch]

    await wait_until(waits_again)
    await controller.begin(attempt)
    await controller.end(attempt, 1)
    assert (await exits_of(again)).epoch == attempt.epoch
    third = await connect()
    assert (await exits_of(third)).reason == "ended with exit status 1", "an end that nobody saw is learnt as well"


@pytest.mark.parametrize(("verb", "plural"), [("create", "jobs"), ("list", "jobs"), ("list", "pods"), ("watch", "pods")])
async def test_what_the_role_lacks_is_named(api, connect, attempt, verb, plural):
    api.forbidden.add((verb, plural))
    launcher = await connect()
    await asyncio.sleep(0.5)
    with pytest.raises(PermissionDeniedError, match=f"may not {verb} {plural} in namespace finery: .* grant the verb {verb} on {plural}"):
        await launcher.start(attempt)
    assert api.live(JOBS) == []


@pytest.mark.parametrize("plural", ["jobs", "pods"])
@pytest.mark.parametrize("status", [400, 404])
async def test_a_cluster_that_cannot_be_watched_makes_starts_wait(api, connect, attempt, status, plural):
    api.refusals["list", plural] = KubernetesError(status=status, reason="Odd", message="a proxy is in the way")
    launcher = await connect()
    with pytest.raises(UnavailableError, match=f"cannot list {plural} for now .*a proxy is in the way"):
        await launcher.start(attempt)
    assert api.live(JOBS) == []


async def test_the_role_needs_no_more_than_the_documented_verbs(api, controller, launcher, attempt):
    await controller.begin(attempt)
    await launcher.start(attempt)
    await launcher.kill(attempt.job_id)
    used = {(request.action.name, request.resource.plural) for request in api._requests}
    assert used == {(verb, "jobs") for verb in ("LIST", "WATCH", "CREATE", "FETCH", "DELETE")} | {("LIST", "pods"), ("WATCH", "pods")}


async def test_an_api_server_that_is_not_there_makes_starts_wait(write_kubeconfig, connect, attempt):
    write_kubeconfig("http://127.0.0.1:9")
    launcher = await connect()
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await launcher.start(attempt)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await launcher.kill(attempt.job_id)
    assert launcher.waiting() == []


async def test_settings_that_name_no_cluster_or_no_address_are_refused(api, connect, monkeypatch):
    with pytest.raises(FailedPreconditionError, match="FINERY_TRAINER_ADDRESS is not set"):
        await connect(trainer_address="")
    with pytest.raises(FailedPreconditionError, match="FINERY_KUBERNETES_NAMESPACE is not set"):
        await connect(kubernetes_namespace="")
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(FailedPreconditionError, match="no API server is known"):
        await connect()


async def test_logs_are_where_kubectl_finds_them(launcher, attempt):
    assert launcher.log_place(attempt.job_id, epoch=3) == f"kubectl logs --namespace finery job/{attempt.job_id}-3"
    await launcher.kill(attempt.job_id)
    assert launcher.log_place(attempt.job_id, epoch=3).startswith(f"gone with the Job {attempt.job_id}-3, which was removed")


def _without(template, *path):
    *parents, last = path
    for key in parents:
        template = template[key]
    del template[last]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.update(kind="CronJob"), "kind: got 'CronJob', wanted 'Job'"),
        (lambda t: t.update(apiVersion="v1"), "apiVersion: got 'v1', wanted 'batch/v1'"),
        (lambda t: t["spec"].update(backoffLimit=6), "spec.backoffLimit: got 6, wanted 0"),
        (lambda t: _without(t, "spec", "backoffLimit"), "spec.backoffLimit: got None, wanted 0"),
        (lambda t: t["spec"].update(parallelism=2), "spec.parallelism: got 2, wanted 1; a job trains on the GPUs of one node"),
        (
            lambda t: t["spec"]["podFailurePolicy"]["rules"][0].update(action="Ignore"),
            r"spec.podFailurePolicy.rules\[0\].action: got 'Ignore', wanted 'FailJob'",
        ),
        (
            lambda t: t["spec"]["template"]["spec"].update(restartPolicy="OnFailure"),
            "spec.template.spec.restartPolicy: got 'OnFailure', wanted 'Never'",
        ),
        (
            lambda t: t["spec"]["template"]["spec"]["containers"][0].update(name="main"),
            r"spec.template.spec.containers: got \['main'\], wanted one that is named worker",
        ),
        (
            lambda t: t["spec"]["template"]["spec"]["containers"][0]["resources"].update(claims=[{"name": "gpu"}]),
            r"containers\[0\].resources.claims: got claims beside FINERY_KUBERNETES_GPU_RESOURCE=nvidia.com/gpu",
        ),
        (lambda t: _without(t, "spec", "template", "spec", "volumes"), "spec.template.spec.volumes: got none that holds"),
        (lambda t: t.pop("spec"), "spec.backoffLimit: got None.*containers: got .*volumes"),
    ],
)
async def test_a_template_that_cannot_work_is_refused_with_file_and_field(api, connect, template, change, text):
    change(template)
    with pytest.raises(FailedPreconditionError, match=f"worker-job.yaml: .*{text}"):
        await connect()


@pytest.mark.parametrize(("text", "wanted"), [("- a", "got list, wanted a Job"), ("{", "got no YAML"), (None, "cannot read")])
async def test_a_template_that_is_no_job_is_refused(api, connect, tmp_path, text, wanted):
    file = tmp_path / "other.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(FailedPreconditionError, match=f"other.yaml: {wanted}|cannot read .*other.yaml"):
        await connect(kubernetes_job_template=file)


async def test_a_job_that_the_api_server_refuses_is_no_matter_of_trying_again(api, connect, attempt):
    message = "spec.template.spec.containers[0].image: Required value"
    api.refusals["create", "jobs"] = KubernetesError(status=422, reason="Invalid", message=message)
    launcher = await connect()
    with pytest.raises(FailedPreconditionError, match="refuses to create jobs in namespace finery: .*image: Required value"):
        await launcher.start(attempt)


async def test_in_a_pod_the_service_accounts_files_name_cluster_and_namespace(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("team-a\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", certifi.where())
    monkeypatch.setattr("finery_trainer.launchers.cluster._NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "9")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    cluster = await Cluster.connect("")
    assert cluster.namespace == "team-a"
    with pytest.raises(UnavailableError, match=r"127.0.0.1:9"):
        await cluster.list("jobs", selector="")
    await cluster.close()
