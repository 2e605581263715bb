"""Which pod gets which GPU: counts, kinds, claims, nodes, and what vLLM and the launcher are told of it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from chart_rendering import CASES, EXAMPLES, PLACED_GPU, VALUES_FILES, Manifests, values_with


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}


def pool_pod(manifests: Manifests, name: str) -> dict[str, Any]:
    return manifests.one("StatefulSet", f"demo-finery-serving-{name}")["spec"]["template"]["spec"]


def limits(pod: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pod["containers"][0]["resources"].get("limits", {}).items() if "/" in key}


def test_tensor_parallelism_is_the_number_of_gpus(render):
    pod = pool_pod(render(CASES["eight-gpus"]), "h100")
    assert limits(pod) == {"nvidia.com/gpu": 2}
    assert environment(pod)["FINERY_TENSOR_PARALLEL_SIZE"] == "2"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_slices_and_shares_are_asked_for_by_their_own_names(render):
    mig: Manifests = render(CASES["mig"])
    assert limits(pool_pod(mig, "mig")) == {"nvidia.com/mig-3g.40gb": 1}
    assert limits(mig.worker_job["spec"]["template"]["spec"]) == {"nvidia.com/mig-2g.20gb": 1}
    trainer = mig.one("Deployment", "demo-finery-trainer")["spec"]["template"]["spec"]
    assert environment(trainer)["FINERY_KUBERNETES_GPU_RESOURCE"] == "nvidia.com/mig-2g.20gb"
    shared = pool_pod(render(CASES["time-slicing"]), "shared")
    assert limits(shared) == {"nvidia.com/gpu.shared": 1}
    assert environment(shared)["FINERY_GPU_MEMORY_UTILIZATION"] == "0.4"


def test_a_trial_on_cpus_asks_for_no_gpu(render):
    manifests: Manifests = render(CASES["cpu"])
    assert all(limits(template["spec"]) == {} for _, template in manifests.pods)
    pool = environment(pool_pod(manifests, "cpu"))
    assert (pool["FINERY_SERVING_DEVICE"], pool["FINERY_VLLM_KV_CACHE_GIB"]) == ("cpu", "2")
    trainer = manifests.one("Deployment", "demo-finery-trainer")["spec"]["template"]["spec"]
    assert environment(trainer)["FINERY_KUBERNETES_GPU_RESOURCE"] == ""


@pytest.mark.parametrize(("case", "count"), [("one-gpu", "1"), ("mig", "1"), ("time-slicing", "1"), ("cpu", "1"), ("eight-gpus", "4")])
def test_a_job_that_no_node_can_hold_is_refused_by_the_trainer(case, count, render):
    trainer = render(CASES[case]).one("Deployment", "demo-finery-trainer")["spec"]["template"]["spec"]
    assert environment(trainer)["FINERY_KUBERNETES_MAX_GPUS"] == count


@pytest.mark.parametrize(("case", "gpus"), [("eight-gpus", 8), ("two-models", 4)])
def test_a_job_may_have_what_the_vllms_of_an_example_with_one_node_leave(case, gpus, render):
    manifests: Manifests = render(CASES[case])
    pools = [item["spec"] for item in manifests.of("StatefulSet").values()]
    served = sum(pool["replicas"] * limits(pool["template"]["spec"]).get("nvidia.com/gpu", 0) for pool in pools)
    trainer = environment(manifests.one("Deployment", "demo-finery-trainer")["spec"]["template"]["spec"])
    assert int(trainer["FINERY_KUBERNETES_MAX_GPUS"]) == gpus - served
    # As many jobs of one GPU as there are left.
    assert int(trainer["FINERY_MAX_WORKERS"]) == gpus - served


ONE_NODE = [name for name in EXAMPLES if CASES[name].get("baseModels", {}).get("cache", {}).get("accessModes") == ["ReadWriteOnce"]]


@pytest.mark.parametrize("case", ONE_NODE)
def test_all_pods_that_mount_a_claim_of_one_node_go_to_the_same_nodes(case, render):
    places, components = [], set()
    for _, template in render(CASES[case]).pods:
        spec = template["spec"]
        if any(volume["name"] == "models" for volume in spec["volumes"]):
            places.append((spec.get("nodeSelector", {}), spec.get("tolerations", [])))
            components.add(template["metadata"]["labels"]["app.kubernetes.io/component"])
    assert components == {"base-weights", "dataprep", "trainer", "worker", "converter", "serving"}
    assert all(place == places[0] for place in places)


def requested(template: dict[str, Any]) -> tuple[float, float]:
    """CPUs and GiB of memory of a pod."""
    units = {"m": 1e-3, "Mi": 2**-10, "Gi": 1.0}

    def number(quantity: Any) -> float:
        found = re.fullmatch(r"([0-9.]+)(m|Mi|Gi)?", str(quantity))
        assert found is not None, quantity
        return float(found[1]) * units.get(found[2], 1.0)

    requests = [container["resources"]["requests"] for container in template["spec"]["containers"]]
    return sum(number(item["cpu"]) for item in requests), sum(number(item["memory"]) for item in requests)


@pytest.mark.parametrize(("case", "machines"), [("one-gpu", ["all", "in turn"]), ("time-slicing", ["all"]), ("cpu", ["at most"])])
def test_an_example_for_a_small_node_says_what_its_pods_ask_for(case, machines, render):
    pods = [
        (template["metadata"]["labels"]["app.kubernetes.io/component"], *requested(template)) for _, template in render(CASES[case]).pods
    ]
    head = VALUES_FILES[case].read_text().partition("baseModels:")[0]
    said = [(int(cpus), int(gib)) for cpus, gib in re.findall(r"(\d+) CPUs and (\d+) GiB", head)]
    assert len(said) == len(machines)
    for numbers, machine in zip(said, machines, strict=True):
        # vLLM and a worker ask for the same.
        counted = [item for item in pods if machine != "in turn" or item[0] != "worker"]
        wanted = tuple(math.ceil(sum(item[place] for item in counted)) for place in (1, 2))
        assert wanted[0] <= numbers[0], machine
        assert wanted[1] <= numbers[1], machine
        assert machine == "at most" or numbers == wanted
    if "in turn" in machines:
        by_component = {component: asked for component, *asked in pods}
        assert by_component["worker"] == by_component["serving"]


def test_pods_that_ask_for_no_gpu_see_none(render):
    """Their images would take all of them, where NVIDIA's runtime is the node's own."""

    def visible(case: str) -> tuple[str | None, str | None]:
        manifests: Manifests = render(CASES[case])
        trainer = manifests.one("Deployment", "demo-finery-trainer")["spec"]["template"]["spec"]
        worker = manifests.worker_job["spec"]["template"]["spec"]
        return environment(trainer).get("NVIDIA_VISIBLE_DEVICES"), environment(worker).get("NVIDIA_VISIBLE_DEVICES")

    assert visible("cpu") == ("void", "void")
    assert visible("default") == visible("claims") == ("void", None)


def test_claims_take_the_place_of_counts(render):
    manifests: Manifests = render(CASES["claims"])
    converter = manifests.one("Deployment", "demo-finery-converter")["spec"]["template"]["spec"]
    for pod in (pool_pod(manifests, "dra"), manifests.worker_job["spec"]["template"]["spec"], converter):
        assert limits(pod) == {}
        assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "single-gpu"}]
        assert pod["containers"][0]["resources"]["claims"] == [{"name": "gpu", "request": "one"}]


def test_claims_that_are_none_leave_the_count(render):
    values = values_with("default", {"trainer.worker.gpu": {"resourceClaims": [], "count": 2, "resourceName": "amd.com/gpu"}})
    assert limits(render(values).worker_job["spec"]["template"]["spec"]) == {"amd.com/gpu": 2}


def test_a_gpus_affinity_and_runtime_are_those_of_every_pod_that_gets_one(render):
    manifests: Manifests = render(CASES["GPUs of a place and a runtime"])
    converter = manifests.one("Deployment", "demo-finery-converter")["spec"]["template"]["spec"]
    placed = [pool_pod(manifests, "placed"), manifests.worker_job["spec"]["template"]["spec"], converter]
    for pod in placed:
        assert limits(pod) == {"nvidia.com/gpu": 1}
        assert {name: pod[name] for name in PLACED_GPU} == PLACED_GPU
    others = [template["spec"] for _, template in manifests.pods if template["spec"] not in placed]
    assert others
    assert not any(set(PLACED_GPU) & set(pod) for pod in others)


def test_the_converter_gets_a_gpu_where_it_is_given_one(render):
    values = values_with("default", {"converter.gpu": {"count": 1, "runtimeClassName": "nvidia"}})
    pod = render(values).one("Deployment", "demo-finery-converter")["spec"]["template"]["spec"]
    assert (limits(pod), pod["runtimeClassName"]) == ({"nvidia.com/gpu": 1}, "nvidia")


def test_a_pool_over_several_nodes_is_a_group_with_one_agent(render):
    manifests: Manifests = render(CASES["a group of nodes"])
    spec = manifests.one("LeaderWorkerSet", "demo-finery-serving-big")["spec"]
    group = spec["leaderWorkerTemplate"]
    assert (spec["replicas"], group["size"], group["restartPolicy"]) == (1, 2, "RecreateGroupOnPodRestart")
    leader, follower = (group[role]["spec"] for role in ("leaderTemplate", "workerTemplate"))
    # A container that starts again in its pod is what the group is made anew for.
    assert all(role.get("restartPolicy", "Always") == "Always" for role in (leader, follower))
    assert limits(leader) == limits(follower) == {"nvidia.com/gpu": 8}
    names = ("MAX_LORAS", "MAX_LORA_RANK", "MAX_MODEL_LEN", "TENSOR_PARALLEL_SIZE", "VLLM_NODES", "VLLM_MASTER_ADDRESS", "CACHE_DIR")
    alike = {f"FINERY_{name}": environment(leader)[f"FINERY_{name}"] for name in names}
    assert alike.items() <= environment(follower).items()
    assert list(alike.values())[-3:] == ["2", "$(LWS_LEADER_ADDRESS)", "/cache"]
    assert "command" not in leader["containers"][0]
    assert follower["containers"][0]["command"] == ["python", "-m", "finery_serving.follower"]
    assert environment(follower)["FINERY_VLLM_NODE_RANK"] == "$(LWS_WORKER_INDEX)"
    # Requests go to agents: a follower has none.
    service = manifests.one("Service", "demo-finery-serving")["spec"]
    assert service["selector"]["app.kubernetes.io/component"] == "serving"
    assert group["workerTemplate"]["metadata"]["labels"]["app.kubernetes.io/component"] == "serving-follower"


def test_shared_memory_is_there_for_processes_that_work_together(render):
    manifests: Manifests = render(CASES["eight-gpus"])
    for pod in (pool_pod(manifests, "h100"), manifests.worker_job["spec"]["template"]["spec"]):
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
        assert next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["medium"] == "Memory"
