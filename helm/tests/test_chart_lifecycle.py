"""How pods start, are judged, drain, scale and are trained in: probes, grace, the worker's Job, monitoring."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from chart_rendering import CASES, CHART_DIR, Manifests, values_with


def test_inner_services_are_asked_by_grpc_and_the_gateway_by_http(render):
    manifests: Manifests = render(CASES["default"])
    for component in ("dataprep", "trainer", "converter"):
        (container,) = manifests.one("Deployment", f"demo-finery-{component}")["spec"]["template"]["spec"]["containers"]
        assert container["livenessProbe"]["grpc"] == container["readinessProbe"]["grpc"] == {"port": 9000}
    (gateway,) = manifests.one("Deployment", "demo-finery-gateway")["spec"]["template"]["spec"]["containers"]
    assert gateway["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_a_replica_is_ready_when_its_vllm_is_and_has_its_time_to_load(render):
    values = values_with("default", {"serving.pools": [{"name": "slow", "startupSeconds": 3600}]})
    manifests: Manifests = render(values)
    (container,) = manifests.one("StatefulSet", "demo-finery-serving-slow")["spec"]["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 3600
    assert container["readinessProbe"]["grpc"] == {"port": 9000, "service": "vllm"}
    assert container["livenessProbe"]["grpc"] == {"port": 9000}


@pytest.mark.parametrize("component", ["gateway", "trainer"])
def test_callers_see_every_agent_that_listens_and_ask_it_while_its_vllm_loads(component, render):
    manifests: Manifests = render(CASES["default"])
    service = manifests.one("Service", "demo-finery-serving")["spec"]
    assert (service["publishNotReadyAddresses"], service["clusterIP"]) == (True, "None")
    pod = manifests.one("Deployment", f"demo-finery-{component}")["spec"]["template"]["spec"]
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert env["FINERY_SERVING_ADDRESS"] == "dns:///demo-finery-serving:9000"


@pytest.mark.parametrize("case", CASES)
def test_pods_that_answer_drain_before_they_end(case, render):
    for where, template in render(CASES[case]).pods:
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        if component in {"gateway", "dataprep", "trainer", "converter", "serving"}:
            (container,) = template["spec"]["containers"]
            sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            # What the services' own draining takes at the most.
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            assert template["spec"]["terminationGracePeriodSeconds"] >= sleep_s + 25 + int(env.get("FINERY_DRAIN_S", 0)), where
            assert ("FINERY_DRAIN_S" in env) is (component == "serving")


@pytest.mark.parametrize("case", CASES)
def test_a_node_is_drained_one_ready_replica_at_a_time_and_of_others_at_once(case, render):
    budgets = render(CASES[case]).of("PodDisruptionBudget")
    assert {"demo-finery-gateway", "ours-gateway"} & set(budgets)
    for name, budget in budgets.items():
        assert (budget["spec"]["maxUnavailable"], budget["spec"]["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow"), name


def test_of_all_groups_of_a_pool_one_pod_is_evicted_at_a_time_leader_or_follower(render):
    """One that goes takes its group along: one of each of two groups would end both."""
    manifests: Manifests = render(CASES["a group of nodes"])
    pods = {where: template["metadata"]["labels"] for where, template in manifests.pods}
    for pool in ("big", "huge"):
        name = f"demo-finery-serving-{pool}"
        selector = manifests.one("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"]
        selected = {where for where, labels in pods.items() if selector.items() <= labels.items()}
        assert selected == {f"LeaderWorkerSet/{name}/{role}" for role in ("leaderTemplate", "workerTemplate")}


@pytest.mark.parametrize("case", CASES)
def test_every_pod_of_a_budget_counts_towards_no_other(case, render):
    """An eviction is refused where two budgets have a pod."""
    manifests: Manifests = render(CASES[case])
    selectors = [item["spec"]["selector"]["matchLabels"] for item in manifests.of("PodDisruptionBudget").values()]
    for where, template in manifests.pods:
        assert sum(selector.items() <= template["metadata"]["labels"].items() for selector in selectors) <= 1, where


def test_replicas_have_names_that_stay(render):
    pool = render(CASES["default"]).one("StatefulSet", "demo-finery-serving-default")
    env = {entry["name"]: entry for entry in pool["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["FINERY_SERVING_REPLICA"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert env["FINERY_VLLM_ADVERTISE_ADDRESS"]["value"] == "$(POD_IP):8443"
    names = list(env)
    assert names.index("POD_IP") < names.index("FINERY_VLLM_ADVERTISE_ADDRESS")  # else it is not filled in


def test_none_is_a_number_of_replicas_as_well(render):
    changes = {"gateway.replicas": 0, "dataprep.replicas": 0, "converter.replicas": 0, "serving.pools": [{"name": "idle", "replicas": 0}]}
    manifests: Manifests = render(values_with("default", changes))
    workloads = {**manifests.of("Deployment"), **manifests.of("StatefulSet")}
    running = {name.removeprefix("demo-finery-") for name, item in workloads.items() if item["spec"]["replicas"] > 0}
    assert running == {"trainer", "postgres", "minio"}


def test_there_is_one_trainer_at_a_time(render):
    spec = render(CASES["default"]).one("Deployment", "demo-finery-trainer")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_an_attempt_is_one_pod_that_the_job_never_replaces(render):
    job = render(CASES["default"]).worker_job["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"], job["podReplacementPolicy"]) == (0, "Never", "Failed")
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert rules[1]["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"] == "worker"


def test_base_weights_are_tried_for_long_and_leave_their_logs(render):
    manifests: Manifests = render(CASES["default"])
    (job,) = manifests.of("Job").values()
    assert (job["spec"]["template"]["spec"]["restartPolicy"], job["spec"]["backoffLimit"]) == ("Never", 20)
    # What the README deletes to have it tried again: this Job, and no other pod's owner.
    readme = (CHART_DIR / "README.md").read_text()
    found = re.search(r"kubectl -n finery delete job -l (\S+)", readme)
    assert found is not None
    selector = dict(label.split("=") for label in found[1].replace("instance=finery", "instance=demo").split(","))
    assert selector.items() <= job["metadata"]["labels"].items()
    assert selector.items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert not selector.items() <= manifests.worker_job["metadata"]["labels"].items()


def test_the_workers_token_comes_from_its_annotation(render):
    pod = render(CASES["default"]).worker_job["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "token")
    (item,) = volume["downwardAPI"]["items"]
    assert item == {"path": "token", "fieldRef": {"fieldPath": "metadata.annotations['finery.dev/worker-token']"}}
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "token")
    assert env["FINERY_WORKER_TOKEN_FILE"] == f"{mount['mountPath']}/token"


def test_a_queue_is_a_label_of_the_workers_job(render):
    label = "kueue.x-k8s.io/queue-name"
    assert render(CASES["a queue"]).worker_job["metadata"]["labels"][label] == "training"
    assert label not in render(CASES["default"]).worker_job["metadata"]["labels"]


def test_serving_scales_by_what_waits_in_vllm(render):
    spec = render(CASES["external"]).one("ScaledObject", "demo-finery-serving-h100")["spec"]
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["query"] == 'sum(vllm:num_requests_waiting{namespace="ml",pod=~"demo-finery-serving-h100-[0-9]+"})'
    assert (spec["scaleTargetRef"]["kind"], spec["maxReplicaCount"]) == ("StatefulSet", 4)


@pytest.mark.parametrize(("changes", "window_s"), [({}, 900), ({"cooldownSeconds": 0}, 0), ({"cooldownSeconds": 3600}, 3600)])
def test_a_replica_of_a_pool_is_not_given_up_for_a_lull_and_goes_alone(changes, window_s, render):
    pool = {"name": "one", "autoscaling": {"enabled": True, "maxReplicas": 3} | changes}
    manifests: Manifests = render(values_with("external", {"serving.pools": [pool]}))
    spec = manifests.one("ScaledObject", "demo-finery-serving-one")["spec"]
    assert spec["minReplicaCount"] == 1  # where KEDA's cooldownPeriod says nothing
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"] == {
        "stabilizationWindowSeconds": window_s,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
    }


def test_dataprep_and_converter_scale_by_queued_jobs(render):
    from finery_converter import metrics as converter
    from finery_dataprep import metrics as dataprep

    for component, gauge in (("dataprep", dataprep.JOBS), ("converter", converter.JOBS)):
        (metric,) = render(CASES["scaled by load"]).one("HorizontalPodAutoscaler", f"demo-finery-{component}")["spec"]["metrics"]
        (family,) = gauge.collect()
        assert metric["external"]["metric"] == {"name": family.name, "selector": {"matchLabels": {"state": "QUEUED"}}}


@pytest.mark.parametrize("component", ["dataprep", "converter"])
def test_where_keda_scales_a_pool_it_scales_queues_too_and_nothing_else_wants_external_metrics(component, render):
    autoscaling = {"enabled": True, "minReplicas": 2, "maxReplicas": 5, "queuedPerReplica": 3}
    manifests: Manifests = render(values_with("external", {f"{component}.autoscaling": autoscaling}))
    metrics = [metric["type"] for item in manifests.of("HorizontalPodAutoscaler").values() for metric in item["spec"]["metrics"]]
    assert "External" not in metrics
    spec = manifests.one("ScaledObject", f"demo-finery-{component}")["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"demo-finery-{component}"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 5)
    (trigger,) = spec["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus-operated.monitoring.svc:9090",
        "query": f'max(finery_{component}_jobs{{namespace="ml",pod=~"demo-finery-{component}-.+",state="QUEUED"}})',
        "threshold": "3",
    }


def test_an_address_of_prometheus_alone_asks_for_no_keda(render):
    manifests: Manifests = render(CASES["scaled by load"] | {"monitoring": {"prometheusUrl": "http://prometheus:9090"}})
    assert manifests.of("ScaledObject") == {}
    assert {"demo-finery-dataprep", "demo-finery-converter"} <= set(manifests.of("HorizontalPodAutoscaler"))


def test_no_pod_without_metrics_is_scraped(render):
    for where, template in render(CASES["a group of nodes"]).pods:
        ports = {port["name"] for container in template["spec"]["containers"] for port in container.get("ports", ())}
        assert ("prometheus.io/scrape" in template["metadata"].get("annotations", {})) is ("metrics" in ports), where


@pytest.mark.parametrize(
    ("case", "has_operator", "has_annotations"),
    [("default", False, True), ("the operator", True, False), ("no monitoring", False, False)],
)
def test_prometheus_finds_pods_in_one_way(case, has_operator, has_annotations, render):
    manifests: Manifests = render(CASES[case])
    assert bool(manifests.of("PodMonitor")) is has_operator
    for where, template in manifests.pods:
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        if component in {"gateway", "dataprep", "trainer", "converter", "serving", "worker"}:
            notes: dict[str, Any] = template["metadata"].get("annotations", {})
            assert (notes.get("prometheus.io/port") == "9100") is has_annotations, where


def test_prometheus_without_the_operator_asks_running_pods_of_finery_alone():
    (block,) = re.findall(r"```yaml\n(scrape_configs:.+?)```", (CHART_DIR / "README.md").read_text(), re.DOTALL)
    (config,) = yaml.safe_load(block)["scrape_configs"]
    sources = {"app": "__meta_kubernetes_pod_label_app_kubernetes_io_name", "port": "__meta_kubernetes_pod_container_port_name"}

    def is_kept(**labels: str) -> bool:
        values = {sources.get(name, f"__meta_kubernetes_pod_{name}"): value for name, value in labels.items()}
        for rule in config["relabel_configs"]:
            if rule.get("action") in {"keep", "drop"}:
                (source,) = rule["source_labels"]
                if bool(re.fullmatch(rule["regex"], values[source])) is (rule["action"] == "drop"):
                    return False
        return True

    phases = ("Pending", "Running", "Succeeded", "Failed", "Unknown")
    kept = {phase for phase in phases if is_kept(app="finery", port="metrics", phase=phase)}
    assert kept == {"Running", "Unknown"}
    assert not is_kept(app="other", port="metrics", phase="Running")
    assert not is_kept(app="finery", port="grpc", phase="Running")


def test_a_metrics_port_of_that_name_is_on_every_pod_that_is_scraped(render):
    manifests: Manifests = render(CASES["the operator"])
    (monitor,) = manifests.of("PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for where, template in manifests.pods:
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        if component in {"gateway", "dataprep", "trainer", "converter", "serving", "worker"}:
            ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            assert ports[endpoint["port"]] == 9100, where
