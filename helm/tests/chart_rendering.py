"""The chart as Helm loads it, and its manifests as objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART_DIR = Path(__file__).parents[1] / "finery"
VALUES_FILES = {path.stem.removeprefix("values-"): path for path in sorted(CHART_DIR.glob("values-*.yaml"))}
"""Example values by their short name."""


@dataclass(frozen=True)
class Manifests:
    """What a release is made of, the worker's Job out of its ConfigMap included."""

    documents: tuple[dict[str, Any], ...]
    notes: str

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """All of `kind` by name."""
        return {item["metadata"]["name"]: item for item in self.documents if item["kind"] == kind}

    def one(self, kind: str, name: str) -> dict[str, Any]:
        return self.of(kind)[name]

    @property
    def worker_job(self) -> dict[str, Any]:
        maps = (item for name, item in self.of("ConfigMap").items() if name.endswith("-worker-job"))
        return yaml.safe_load(next(maps)["data"]["worker-job.yaml"])

    @property
    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every pod template as (kind/name, template), a worker's and those of both roles of a group included."""
        for item in (*self.documents, self.worker_job):
            where = f"{item['kind']}/{item['metadata']['name']}"
            if item["kind"] == "Pod":
                yield where, item
            elif item["kind"] == "LeaderWorkerSet":
                for role in ("leaderTemplate", "workerTemplate"):
                    yield f"{where}/{role}", item["spec"]["leaderWorkerTemplate"][role]
            elif item["kind"] in {"Deployment", "StatefulSet", "Job"}:
                yield where, item["spec"]["template"]


def manifests_of(chart: helm_python.Chart, values: Mapping[str, Any] | None = None) -> Manifests:
    """Raises HelmError where the values are refused."""
    files = chart.render(values=dict(values or {}), name="demo", namespace="ml")
    notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
    texts = [text for path, text in sorted(files.items()) if not path.endswith("NOTES.txt")]
    return Manifests(tuple(item for text in texts for item in yaml.safe_load_all(text) if item), notes)


def example(name: str) -> dict[str, Any]:
    """One of the example values files; {} for the chart's defaults."""
    return yaml.safe_load(VALUES_FILES[name].read_text()) if name != "default" else {}


EXAMPLES = ("default", *VALUES_FILES)


def values_with(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """An example with `changes`, whose keys are paths such as `trainer.worker.queueName`."""
    values = example(name)
    for path, value in changes.items():
        inner = values
        *parents, last = path.split(".")
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return values


GROUP_POOL = {"name": "big", "tensorParallelSize": 8, "nodes": 2, "adapterCacheClaim": "adapters", "replicas": 1}
DRA_GPU = {"resourceClaims": [{"name": "gpu", "request": "one", "resourceClaimTemplateName": "single-gpu"}]}
_GPU_NODES = [{"matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["40000"]}]}]
PLACED_GPU = {
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": _GPU_NODES}}},
    "runtimeClassName": "nvidia",
}
OWN = {"podLabels": {"example.org/team": "ml"}, "podAnnotations": {"example.org/cost-centre": "42"}}
"""What people put on pods of theirs."""
ROUTE = {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}], "hostnames": ["finery.example.org"]}
SWITCHES: dict[str, dict[str, Any]] = {
    "no pools": {"serving.pools": []},
    "a group of nodes": {"serving.pools": [GROUP_POOL, GROUP_POOL | {"name": "huge"}, {"name": "one"}]},
    "a scaled group": {
        "serving.pools": [GROUP_POOL | {"autoscaling": {"enabled": True, "maxReplicas": 3}}],
        "monitoring.prometheusUrl": "http://prometheus:9090",
    },
    "claims": {"trainer.worker.gpu": DRA_GPU, "converter.gpu": DRA_GPU, "serving.pools": [{"name": "dra", "gpu": DRA_GPU}]},
    "GPUs of a place and a runtime": {
        "trainer.worker.gpu": PLACED_GPU,
        "converter.gpu": PLACED_GPU | {"count": 1},
        "serving.pools": [{"name": "placed", "gpu": PLACED_GPU}],
    },
    "labels and annotations": {
        **{f"{part}.{field}": OWN[field] for part in ("gateway", "dataprep", "trainer", "trainer.worker", "converter") for field in OWN},
        "serving.pools": [OWN | {"name": "one"}, GROUP_POOL | OWN],
    },
    "a queue": {"trainer.worker.queueName": "training"},
    "host path": {"baseModels.cache": {"kind": "hostPath", "hostPath": "/srv/models"}},
    "volumes for scratch": {"trainer.worker.scratch": {"size": "1Ti", "storageClassName": "fast"}},
    "a Gateway API route": {"gateway.httpRoute": ROUTE},
    "scaled by load": {
        "gateway.autoscaling.enabled": True,
        "dataprep.autoscaling.enabled": True,
        "converter.autoscaling.enabled": True,
    },
    "no policies": {"networkPolicy.enabled": False},
    "other ways out": {
        "networkPolicy.extraEgress": {
            "worker": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9900}]}],
            "trainer": [
                {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [{"port": 16443, "protocol": "TCP"}]},
                {"ports": [{"port": 5353}]},
            ],
        }
    },
    "the operator": {"monitoring.mode": "operator"},
    "no monitoring": {"monitoring.mode": "off"},
    "traces": {"monitoring.otlpEndpoint": "http://collector.tracing.svc:4317"},
    "authorities of one's own": {"trustedCa.existingSecret": "company-ca"},
    "another CA": {"serving.tls.existingSecret": "own-tls"},
    "secrets of one's own": {
        "tokenSecret.existingSecret": "own-token",
        "objectStore.minio.existingSecret": "own-minio",
        "postgres.bundled.existingSecret": "own-postgres",
    },
    "a Hub and a public store": {
        "converter.hub.endpoint": "https://hub.example.org:8443",
        "converter.hub.tokens": [
            {"existingSecret": "own-hub"},
            {"project": "research", "name": "write", "existingSecret": "own-hub", "key": "w"},
        ],
        "objectStore.publicEndpoint": "https://s3.example.org",
    },
    "digests": {"gateway.image.digest": f"sha256:{'a' * 64}", "image.registry": "registry.example.org/finery"},
    "weights by their digest": {"baseModels.models": [{"name": "m", "maxSequenceLength": 64, "hubId": "o/m", "sha256": "12345678" * 8}]},
    "a name": {"fullnameOverride": "ours"},
}
"""Switches that no example turns, by what they are."""
CASES: dict[str, dict[str, Any]] = {name: example(name) for name in EXAMPLES} | {
    name: values_with("default", changes) for name, changes in SWITCHES.items()
}
