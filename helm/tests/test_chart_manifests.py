"""Every manifest of every example and switch: Helm lints it, Kubernetes knows its fields, and what it names is there."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from chart_rendering import CASES, CHART_DIR, OWN, Manifests

KUBERNETES = "1.37.0"
# Kinds that a cluster gets by other charts, with what each needs in its spec and may have there.
CUSTOM_KINDS: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ({"parentRefs", "rules"}, {"hostnames"}),
    ("keda.sh/v1alpha1", "ScaledObject"): (
        {"scaleTargetRef", "triggers", "maxReplicaCount"},
        {"minReplicaCount", "pollingInterval", "advanced"},
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): ({"leaderWorkerTemplate"}, {"replicas", "rolloutStrategy"}),
    ("monitoring.coreos.com/v1", "PodMonitor"): ({"selector", "podMetricsEndpoints"}, set()),
    ("monitoring.coreos.com/v1", "PrometheusRule"): ({"groups"}, set()),
    ("cert-manager.io/v1", "Certificate"): ({"secretName", "issuerRef", "dnsNames"}, {"commonName", "usages"}),
}
# Made by whoever installs the chart with these values.
MADE_BEFOREHAND = {
    "finery-s3", "finery-postgres", "finery-token", "hugging-face", "own-token", "own-minio", "own-postgres", "own-tls", "company-ca",
    "finery-models", "adapters", "registry-internal", "own-hub",
}  # fmt: skip


def check_custom(document: dict[str, Any]) -> None:
    needed, allowed = CUSTOM_KINDS[document["apiVersion"], document["kind"]]
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert needed <= set(document["spec"]) <= needed | allowed
    if document["kind"] == "LeaderWorkerSet":
        template = document["spec"]["leaderWorkerTemplate"]
        assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    if document["kind"] == "ScaledObject":
        # KEDA hands this to the HorizontalPodAutoscaler that it makes.
        behavior = document["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        scaler = {"scaleTargetRef": document["spec"]["scaleTargetRef"], "maxReplicas": 1, "behavior": behavior}
        document = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "kedas"}, "spec": scaler}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_helm_lints_it_without_a_warning(case):
    report = helm_python.lint(CHART_DIR, CASES[case], strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


@pytest.fixture(scope="module")
def check():
    """Each manifest once, however many cases have it: reading the schemas takes most of the time."""
    checked: set[str] = set()

    def once(document: dict[str, Any]) -> None:
        text = json.dumps(document, sort_keys=True)
        if text not in checked:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            checked.add(text)

    return once


@pytest.mark.parametrize("case", CASES)
def test_kubernetes_knows_every_field(case, render, check):
    manifests: Manifests = render(CASES[case])
    for document in (*manifests.documents, manifests.worker_job):
        if (document["apiVersion"], document["kind"]) in CUSTOM_KINDS:
            check_custom(document)
        else:
            check(document)
    for where, template in manifests.pods:
        # Of the others, the schema of what makes them has checked the pods as well.
        if where.startswith("LeaderWorkerSet/"):
            check({"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"] | {"name": "pod"}, "spec": template["spec"]})


def test_a_wrong_type_and_an_unknown_field_would_be_found(render):
    for spoil in ({"replicas": "two"}, {"replica": 2}):
        deployment = copy.deepcopy(render(CASES["default"]).one("Deployment", "demo-finery-gateway"))
        deployment["spec"] |= spoil
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_twice_and_all_of_it_is_labelled(case, render):
    documents = render(CASES[case]).documents
    names = [(item["kind"], item["metadata"]["name"]) for item in documents]
    assert len(names) == len(set(names))
    for document in documents:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "demo"
        assert labels["app.kubernetes.io/component"]
        assert len(document["metadata"]["name"]) <= 63


def references(pod: dict[str, Any]) -> set[tuple[str, str]]:
    """Every ConfigMap, Secret, claim and account that a pod's spec names."""
    found = {("ServiceAccount", pod["serviceAccountName"])}
    found |= {("Secret", item["name"]) for item in pod.get("imagePullSecrets", ())}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "secret" in volume:
            found.add(("Secret", volume["secret"]["secretName"]))
        for source in volume.get("projected", {}).get("sources", ()):
            found |= {(kind, source[key]["name"]) for key, kind in (("configMap", "ConfigMap"), ("secret", "Secret")) if key in source}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        for item in container.get("env", ()):
            if "secretKeyRef" in item.get("valueFrom", {}):
                found.add(("Secret", item["valueFrom"]["secretKeyRef"]["name"]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_a_pod_names_is_there(case, render):
    manifests: Manifests = render(CASES[case])
    made = {(item["kind"], item["metadata"]["name"]) for item in manifests.documents}
    made |= {("Secret", item["spec"]["secretName"]) for item in manifests.of("Certificate").values()}
    for where, template in manifests.pods:
        missing = references(template["spec"]) - made
        assert {name for _, name in missing} <= MADE_BEFOREHAND, where
        volumes = {volume["name"] for volume in template["spec"]["volumes"]} | {"data"}  # `data` comes from a claim's template
        for container in (*template["spec"]["containers"], *template["spec"].get("initContainers", ())):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, where


def keys_read(pod: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    """(kind, name, keys) of every Secret and ConfigMap that a pod's spec mounts."""
    for volume in pod["volumes"]:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], {item["key"] for item in volume["secret"]["items"]}
        for source in volume.get("projected", {}).get("sources", ()):
            for kind, wanted in source.items():
                yield kind[0].upper() + kind[1:], wanted["name"], {item["key"] for item in wanted["items"]}


@pytest.mark.parametrize("case", CASES)
def test_what_is_mounted_has_the_keys_that_are_read(case, render):
    manifests: Manifests = render(CASES[case])
    for where, template in manifests.pods:
        for kind, name, keys in keys_read(template["spec"]):
            if name in manifests.of(kind):
                assert keys <= set(manifests.one(kind, name)["data"]), where


@pytest.mark.parametrize("case", CASES)
def test_every_selector_finds_pods_and_every_port_has_a_name_there(case, render):
    manifests: Manifests = render(CASES[case])
    pods = [template for _, template in manifests.pods]

    def selected(selector: dict[str, str]) -> list[dict[str, Any]]:
        return [pod for pod in pods if selector.items() <= pod["metadata"]["labels"].items()]

    for name, service in manifests.of("Service").items():
        found = selected(service["spec"]["selector"])
        assert found, name
        for pod in found:
            names = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for kind in ("Deployment", "StatefulSet"):
        for name, item in manifests.of(kind).items():
            assert item["spec"]["selector"]["matchLabels"].items() <= item["spec"]["template"]["metadata"]["labels"].items(), name
    for name, budget in manifests.of("PodDisruptionBudget").items():
        assert selected(budget["spec"]["selector"]["matchLabels"]), name
    scaled = [*manifests.of("HorizontalPodAutoscaler").values(), *manifests.of("ScaledObject").values()]
    for scaler in scaled:
        target = scaler["spec"]["scaleTargetRef"]
        # A number here would undo what the scaler has set, at every upgrade.
        assert "replicas" not in manifests.one(target["kind"], target["name"])["spec"]


@pytest.mark.parametrize("case", CASES)
def test_images_are_pinned(case, render):
    for where, template in render(CASES[case]).pods:
        for container in (*template["spec"]["containers"], *template["spec"].get("initContainers", ())):
            name, _, digest = container["image"].partition("@")
            assert digest.startswith("sha256:") or ":" in name.rpartition("/")[2], where
            assert not container["image"].endswith(":latest"), where
            assert container["resources"]["requests"], where


def test_labels_and_annotations_of_ones_own_are_on_every_pod_of_finerys(render):
    components = set()
    for where, template in render(CASES["labels and annotations"]).pods:
        component, metadata = template["metadata"]["labels"]["app.kubernetes.io/component"], template["metadata"]
        if component not in {"base-weights", "postgres", "minio", "test"}:
            components.add(component)
            assert OWN["podLabels"].items() <= metadata["labels"].items(), where
            assert OWN["podAnnotations"].items() <= metadata["annotations"].items(), where
            # Beside what the chart puts there.
            assert ("prometheus.io/scrape" in metadata["annotations"]) is (component != "serving-follower"), where
    assert components == {"gateway", "dataprep", "trainer", "worker", "converter", "serving", "serving-follower"}


def test_a_digest_wins_over_a_tag_and_the_registry_goes_before(render):
    images = {where: template["spec"]["containers"][0]["image"] for where, template in render(CASES["digests"]).pods}
    assert images["Deployment/demo-finery-gateway"] == f"registry.example.org/finery/finery-gateway@sha256:{'a' * 64}"
    assert images["Deployment/demo-finery-trainer"] == "registry.example.org/finery/finery-trainer:0.1.0"
    assert images["StatefulSet/demo-finery-minio"] == "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"


def test_an_air_gapped_cluster_asks_one_registry_and_no_hub(render):
    manifests: Manifests = render(CASES["air-gapped"])
    for where, template in manifests.pods:
        for container in (*template["spec"]["containers"], *template["spec"].get("initContainers", ())):
            assert container["image"].startswith("registry.internal.example/"), where
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry-internal"}]
    assert "hub_id" not in manifests.one("ConfigMap", "demo-finery-catalogue")["data"]["sources.yaml"]


def test_another_list_of_models_is_another_job_and_starts_readers_anew(render):
    def job_and_checksum(values: dict[str, Any]) -> tuple[str, str]:
        manifests: Manifests = render(values)
        pod = manifests.one("Deployment", "demo-finery-trainer")["spec"]["template"]
        return next(name for name in manifests.of("Job")), pod["metadata"]["annotations"]["checksum/config"]

    one, other = job_and_checksum(CASES["default"]), job_and_checksum(CASES["mig"])
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert job_and_checksum(CASES["no monitoring"])[0] == one[0]


def test_a_folder_of_base_weights_is_one_that_the_node_has(render):
    """One that the kubelet made would be root's, and nobody could fill it."""
    for where, template in render(CASES["host path"]).pods:
        for volume in template["spec"]["volumes"]:
            if volume["name"] == "models":
                assert volume["hostPath"] == {"path": "/srv/models", "type": "Directory"}, where


def test_a_node_keeps_room_for_scratch_where_the_readme_says_how(render):
    (block,) = re.findall(r"```yaml\n(((?!```).)*ephemeral-storage.+?)```", (CHART_DIR / "README.md").read_text(), re.DOTALL)
    requests = render(yaml.safe_load(block[0])).worker_job["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert requests == {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "100Gi"}


def test_the_notes_tell_the_next_commands(render):
    notes = render(CASES["default"]).notes
    assert "kubectl -n ml exec deploy/demo-finery-gateway -- python -m finery_gateway.keys create --project default" in notes
    assert "finery jobs create rows.jsonl --model SmolLM2-135M-Instruct" in notes
    assert "single instances for trials" in notes
    assert "https://finery.example.org" in render(CASES["external"]).notes
    assert "single instances" not in render(CASES["external"]).notes
    assert "none is served" in render(CASES["no pools"]).notes


def test_the_notes_tell_that_prometheus_misses_workers_where_nobody_is_named(render):
    told = {case for case in CASES if "networkPolicy.monitoringFrom is empty" in render(CASES[case]).notes}
    assert told == set(CASES) - {"external", "no policies", "no monitoring"}
