"""Serving pools side by side: what each has of its own, and what reaches all of them."""

from __future__ import annotations

import re
from typing import Any

import yaml
from chart_rendering import CASES, Manifests, values_with

POOLS = {"llama": "Llama-3.1-8B-Instruct", "qwen": "Qwen3-14B"}


def template(manifests: Manifests, pool: str) -> dict[str, Any]:
    return manifests.one("StatefulSet", f"demo-finery-serving-{pool}")["spec"]["template"]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_every_pool_serves_its_own_base_model_and_waits_for_those_weights_alone(render):
    manifests: Manifests = render(CASES["two-models"])
    for pool, base_model in POOLS.items():
        spec = template(manifests, pool)["spec"]
        environment = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
        assert environment["FINERY_SERVING_BASE_MODEL"] == base_model
        assert spec["initContainers"][0]["command"][-1] == f"/models/{base_model}"
    lengths = [
        {entry["name"]: entry.get("value") for entry in template(manifests, pool)["spec"]["containers"][0]["env"]}["FINERY_MAX_MODEL_LEN"]
        for pool in POOLS
    ]
    assert lengths == ["32768", "16384"]
    (catalogue,) = [
        yaml.safe_load(item["data"]["catalogue.yaml"]) for item in manifests.of("ConfigMap").values() if "catalogue.yaml" in item["data"]
    ]
    assert [entry["name"] for entry in catalogue["models"]] == list(POOLS.values())


def test_gateway_and_trainer_reach_the_agents_of_every_pool(render):
    manifests: Manifests = render(CASES["two-models"])
    labels = [template(manifests, pool)["metadata"]["labels"] for pool in POOLS]
    selector = manifests.one("Service", "demo-finery-serving")["spec"]["selector"]
    assert all(selects(selector, item) for item in labels)
    for component in ("gateway", "trainer"):
        (container,) = manifests.one("Deployment", f"demo-finery-{component}")["spec"]["template"]["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["FINERY_SERVING_ADDRESS"] == "dns:///demo-finery-serving:9000"
    policy = manifests.one("NetworkPolicy", "demo-finery-serving")["spec"]
    assert all(selects(policy["podSelector"]["matchLabels"], item) for item in labels)
    opened = [
        peer["podSelector"]["matchLabels"]
        for rule in manifests.one("NetworkPolicy", "demo-finery-gateway")["spec"]["egress"]
        for port in rule["ports"]
        if port["port"] in (8443, 9000)
        for peer in rule.get("to", [])
    ]
    assert all(any(selects(peer, item) for peer in opened) for item in labels)


def test_what_belongs_to_a_pool_selects_no_other_pools_pods(render):
    manifests: Manifests = render(CASES["two-models"])
    for pool in POOLS:
        name = f"demo-finery-serving-{pool}"
        selectors = [
            manifests.one("StatefulSet", name)["spec"]["selector"]["matchLabels"],
            manifests.one("Service", name)["spec"]["selector"],
            manifests.one("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"],
            *(item["labelSelector"]["matchLabels"] for item in template(manifests, pool)["spec"]["topologySpreadConstraints"]),
        ]
        for selector in selectors:
            assert [other for other in POOLS if selects(selector, template(manifests, other)["metadata"]["labels"])] == [pool]


def test_a_pool_is_scaled_by_what_waits_in_its_own_pods(render):
    scaled = {"autoscaling": {"enabled": True, "maxReplicas": 3}}
    pools = [
        {"name": "a", "baseModel": "Qwen3-14B"} | scaled,
        # As if it were the replica of the other one.
        {"name": "a-1", "baseModel": "Llama-3.1-8B-Instruct"} | scaled,
    ]
    manifests: Manifests = render(values_with("two-models", {"serving.pools": pools, "monitoring.prometheusUrl": "http://prometheus:9090"}))
    for pool, pods in (("a", ["a-0", "a-12"]), ("a-1", ["a-1-0", "a-1-12"])):
        (trigger,) = manifests.one("ScaledObject", f"demo-finery-serving-{pool}")["spec"]["triggers"]
        found = re.search(r'pod=~"([^"]+)"', trigger["metadata"]["query"])
        assert found is not None
        candidates = [f"demo-finery-serving-{pod}" for pod in ("a-0", "a-12", "a-1-0", "a-1-12")]
        assert [name for name in candidates if re.fullmatch(found[1], name)] == [f"demo-finery-serving-{pod}" for pod in pods]
