"""What pods may do and who may reach whom, as the API server and a network plugin would judge it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import yaml
from chart_rendering import CASES, CHART_DIR, Manifests

FINERYS = ("gateway", "dataprep", "trainer", "converter", "serving", "worker", "base-weights", "test")
INNER = ("dataprep", "trainer", "converter", "serving")
OUTSIDE: dict[str, str] = {}
"""The labels of nobody's pod."""


@pytest.mark.parametrize("case", CASES)
def test_pods_run_without_rights(case, render):
    for where, template in render(CASES[case]).pods:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where


@pytest.mark.parametrize("case", CASES)
def test_only_the_trainer_has_a_token_of_the_cluster(case, render):
    manifests: Manifests = render(CASES[case])
    for where, template in manifests.pods:
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        assert template["spec"]["automountServiceAccountToken"] is (component == "trainer"), where
    (role,) = manifests.of("Role").values()
    assert [(rule["resources"], set(rule["verbs"]) - {"get", "list", "watch"}) for rule in role["rules"]] == [
        (["jobs"], {"create", "delete"}),
        (["pods"], set()),
    ]
    assert manifests.of("ClusterRole") == manifests.of("ClusterRoleBinding") == {}


def test_only_the_job_writes_base_weights(render):
    for where, template in render(CASES["default"]).pods:
        for container in (*template["spec"]["containers"], *template["spec"].get("initContainers", ())):
            for mount in container["volumeMounts"]:
                if mount["name"] == "models":
                    assert mount.get("readOnly", False) is not where.startswith("Job/demo-finery-base-weights"), where


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    named, expressions = selector.get("matchLabels", {}), selector.get("matchExpressions", ())
    assert all(item["operator"] == "In" for item in expressions)
    return named.items() <= labels.items() and all(labels.get(item["key"]) in item["values"] for item in expressions)


def is_peer(peer: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether the pod with `labels` is meant; no labels: an address that is no pod's. Another namespace has none of these pods."""
    if "podSelector" in peer:
        return bool(labels) and selects(peer["podSelector"], labels)
    return "ipBlock" in peer and not labels


def is_let(rules: list[dict[str, Any]], *, direction: str, labels: Mapping[str, str], port: int) -> bool:
    """Whether one of a policy's rules lets through what comes from, or goes to, the pod with `labels`; no labels: somewhere outside."""
    for rule in rules:
        peers = rule.get(direction)
        ports = [item["port"] for item in rule.get("ports", [])]
        fits = peers is None or any(is_peer(peer, labels) for peer in peers)
        if fits and (not ports or port in ports):
            return True
    return False


def reaches(manifests: Manifests, caller: Mapping[str, str], called: Mapping[str, str], port: int) -> bool:
    """By all NetworkPolicies together: the caller's way out, and the called one's way in."""
    policies = [item["spec"] for item in manifests.of("NetworkPolicy").values()]
    leaving = [item for item in policies if caller and selects(item["podSelector"], caller)]
    entering = [item for item in policies if called and selects(item["podSelector"], called)]
    out = not leaving or any(is_let(item.get("egress", []), direction="to", labels=called, port=port) for item in leaving)
    # A list without a rule is written as nothing.
    into = not entering or any(is_let(item.get("ingress") or [], direction="from", labels=caller, port=port) for item in entering)
    return out and into


def pod_of(component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "finery", "app.kubernetes.io/instance": "demo", "app.kubernetes.io/component": component}


@pytest.mark.parametrize(
    ("case", "pool", "group"),
    [
        ("default", "default", set()),
        ("external", "h100", set()),
        ("cpu", "cpu", set()),
        # The pods of a pool of groups are parts of one vLLM or of its like, whose processes talk on any port.
        ("a group of nodes", "big", {"serving big", "serving-follower big"}),
        ("a group of nodes", "huge", {"serving huge", "serving-follower huge"}),
        ("a group of nodes", "one", set()),
    ],
)
def test_only_the_gateway_and_its_own_group_reach_a_vllm(case, pool, group, render):
    manifests: Manifests = render(CASES[case])
    callers = {component: pod_of(component) for component in FINERYS}
    for where, template in manifests.pods:
        if where.startswith(("StatefulSet/demo-finery-serving", "LeaderWorkerSet/")):
            labels = template["metadata"]["labels"]
            callers[f"{labels['app.kubernetes.io/component']} {labels['finery.dev/pool']}"] = labels
    vllm = callers[f"serving {pool}"]
    assert {name for name, labels in callers.items() if reaches(manifests, labels, vllm, 8443)} == {"gateway", *group}
    assert {name for name, labels in callers.items() if reaches(manifests, labels, vllm, 29500)} == group
    assert not reaches(manifests, OUTSIDE, vllm, 8443)
    foreign = {"app.kubernetes.io/instance": "other"}
    assert not any(reaches(manifests, labels | foreign, vllm, 8443) for labels in callers.values())


def test_nobody_reaches_a_worker_but_prometheus(render):
    manifests: Manifests = render(CASES["external"])
    for caller, port in product((OUTSIDE, *map(pod_of, FINERYS)), (9000, 8080, 22, 9100)):
        assert not reaches(manifests, caller, pod_of("worker"), port)
    policy = manifests.one("NetworkPolicy", "demo-finery-worker")["spec"]
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert policy["ingress"] == [{"ports": [{"port": 9100}], "from": [monitoring]}]
    for case in ("default", "the operator", "no monitoring"):  # which name nobody
        unnamed: Manifests = render(CASES[case])
        assert not unnamed.one("NetworkPolicy", "demo-finery-worker")["spec"]["ingress"], case
        assert not any(reaches(unnamed, caller, pod_of("worker"), 9100) for caller in (OUTSIDE, *map(pod_of, FINERYS))), case
    # The others, which are asked by many, are open to every Prometheus.
    assert all(reaches(render(CASES["default"]), OUTSIDE, pod_of(component), 9100) for component in ("gateway", *INNER))


def test_services_reach_what_they_call_and_nothing_else(render):
    manifests: Manifests = render(CASES["default"])
    calls = {(caller, called) for caller, called in product(FINERYS, INNER) if reaches(manifests, pod_of(caller), pod_of(called), 9000)}
    assert calls == {
        *(("gateway", called) for called in INNER),
        *(("test", called) for called in INNER),
        ("trainer", "dataprep"),
        ("trainer", "serving"),
        ("worker", "trainer"),
    }


def test_database_and_store_are_reached_by_those_who_use_them(render):
    manifests: Manifests = render(CASES["default"])
    users = {caller for caller in FINERYS if reaches(manifests, pod_of(caller), pod_of("postgres"), 5432)}
    assert users == {"gateway", *INNER}
    users = {caller for caller in FINERYS if reaches(manifests, pod_of(caller), pod_of("minio"), 9000)}
    assert users == {"gateway", *INNER, "worker", "base-weights"}
    for stored in ("postgres", "minio"):
        assert not any(reaches(manifests, pod_of(stored), called, 443) for called in (OUTSIDE, pod_of("gateway")))


def test_the_way_out_is_open_for_the_hub_and_the_cluster_only(render):
    manifests: Manifests = render(CASES["default"])
    assert {caller for caller in FINERYS if reaches(manifests, pod_of(caller), OUTSIDE, 443)} == {"trainer", "base-weights"}
    closed: Manifests = render(CASES["air-gapped"])
    assert {caller for caller in FINERYS if reaches(closed, pod_of(caller), OUTSIDE, 443)} == {"trainer"}
    assert reaches(render(CASES["external"]), pod_of("worker"), OUTSIDE, 443)  # to S3
    assert all(reaches(manifests, pod_of(caller), OUTSIDE, 53) for caller in FINERYS)


def test_further_ways_out_are_added_as_they_are_to_the_component_that_is_named(render):
    before, after = render(CASES["default"]).of("NetworkPolicy"), render(CASES["other ways out"]).of("NetworkPolicy")
    extra = CASES["other ways out"]["networkPolicy"]["extraEgress"]
    assert before.keys() == after.keys()
    for name, policy in after.items():
        plain = before[name]["spec"]
        rules = extra.get(name.removeprefix("demo-finery-"), [])
        assert policy["spec"] == plain | ({"egress": [*plain["egress"], *rules]} if rules else {}), name
    manifests: Manifests = render(CASES["other ways out"])
    for port, callers in ((9900, {"worker"}), (16443, {"trainer"}), (5353, {"trainer"})):
        assert {caller for caller in FINERYS if reaches(manifests, pod_of(caller), OUTSIDE, port)} == callers


def test_every_component_with_a_policy_can_be_given_further_ways_out(render):
    policies = render(CASES["a group of nodes"]).of("NetworkPolicy")
    components = {name.removeprefix("demo-finery-") for name in policies} - {
        "default-deny",
        "postgres",
        "minio",
        "serving-big-group",
        "serving-huge-group",
    }
    schema = json.loads((CHART_DIR / "values.schema.json").read_text())
    assert set(schema["properties"]["networkPolicy"]["properties"]["extraEgress"]["properties"]) == components


def test_the_readmes_ways_out_reach_all_users_of_the_store_and_the_trainer_the_api_server(render):
    blocks = re.findall(r"```yaml\n(.+?)```", (CHART_DIR / "README.md").read_text(), re.DOTALL)
    (values,) = (yaml.safe_load(block) for block in blocks if block.startswith("networkPolicy:"))
    (cilium,) = (yaml.safe_load(block) for block in blocks if "CiliumNetworkPolicy" in block)
    policies = render(values).of("NetworkPolicy")
    (store,) = values["networkPolicy"]["extraEgress"]["worker"]
    users = {name.removeprefix("demo-finery-") for name, policy in policies.items() if store in policy["spec"].get("egress", [])}
    assert users == {"gateway", *INNER, "worker", "base-weights"}
    labels = pod_of("trainer") | {"app.kubernetes.io/instance": "finery"}
    assert (cilium["spec"]["endpointSelector"], cilium["spec"]["egress"]) == ({"matchLabels": labels}, [{"toEntities": ["kube-apiserver"]}])


def test_the_gateway_is_open_or_to_those_who_are_named(render):
    assert reaches(render(CASES["default"]), OUTSIDE, pod_of("gateway"), 8080)
    assert not reaches(render(CASES["external"]), OUTSIDE, pod_of("gateway"), 8080)
    assert reaches(render(CASES["external"]), pod_of("test"), pod_of("gateway"), 8080)
