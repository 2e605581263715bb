"""What the schema must refuse, with words that help; and that it is closed, and documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml
from chart_rendering import CHART_DIR, DRA_GPU, example, manifests_of, values_with

SCHEMA: dict[str, Any] = json.loads((CHART_DIR / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART_DIR / "values.yaml").read_text())
POOL = {"name": "one"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gatway.replicas": 2}, "additional properties 'gatway' not allowed"),
        ({"gateway.replica": 2}, "at '/gateway': additional properties 'replica' not allowed"),
        ({"gateway.replicas": "two"}, "at '/gateway/replicas': got string, want integer"),
        ({"log.level": "verbose"}, "at '/log/level': value must be one of 'DEBUG', 'INFO', 'WARNING', 'ERROR'"),
        ({"gateway.image.digest": "sha256:abc"}, "at '/gateway/image/digest': 'sha256:abc' does not match pattern"),
        ({"dataprep.resources": {"limit": {"memory": "1Gi"}}}, "at '/dataprep/resources': additional properties 'limit' not allowed"),
        ({"converter.resources": {"limits": {"memory": "lots"}}}, "at '/converter/resources/limits/memory': 'lots' does not match"),
        (
            {"trainer.worker.gpu": DRA_GPU | {"resourceName": "nvidia.com/gpu"}},
            "at '/trainer/worker/gpu/resourceName': value must be 'left out, since resourceClaims brings the GPUs'",
        ),
        (
            {"serving.pools": [POOL | {"gpu": DRA_GPU | {"resourceName": "nvidia.com/gpu"}}]},
            "at '/serving/pools/0/gpu/resourceName': value must be 'left out, since resourceClaims brings the GPUs'",
        ),
        ({"converter.gpu": DRA_GPU | {"resourceName": "a.b/c"}}, "at '/converter/gpu/resourceName'"),
        (
            {"trainer.worker.gpu": DRA_GPU | {"count": 1}},
            "at '/trainer/worker/gpu/count': value must be 'left out, since resourceClaims brings the GPUs'",
        ),
        ({"converter.gpu": DRA_GPU | {"count": 0}}, "at '/converter/gpu/count': value must be 'left out, since resourceClaims"),
        ({"trainer.worker.gpu.resourceName": "gpu"}, "at '/trainer/worker/gpu/resourceName': 'gpu' does not match pattern"),
        ({"trainer.worker.gpu": {"resourceClaims": [{"name": "gpu"}]}}, "at '/trainer/worker/gpu/resourceClaims/0'"),
        (
            {"serving.pools": [POOL | {"gpu": {"count": 2}}]},
            "at '/serving/pools/0/gpu/count': value must be 'left out, since tensorParallelSize sets it'",
        ),
        (
            {"serving.pools": [POOL | {"tensorParallelSize": 2, "gpu": {"resourceName": "nvidia.com/mig-1g.10gb"}}]},
            "at '/serving/pools/0/tensorParallelSize': value must be 1",
        ),
        (
            {"serving.pools": [POOL | {"tensorParallelSize": 2, "gpu": {"resourceName": "nvidia.com/gpu.shared"}}]},
            "at '/serving/pools/0/tensorParallelSize': value must be 1",
        ),
        ({"serving.pools": [POOL | {"device": "cpu", "tensorParallelSize": 2}]}, "at '/serving/pools/0/tensorParallelSize'"),
        (
            {"serving.pools": [POOL | {"device": "cpu", "gpu": {"resourceName": "nvidia.com/gpu"}}]},
            "at '/serving/pools/0/gpu/resourceName': value must be 'left out on device: cpu'",
        ),
        ({"converter.hub.tokens": [{"name": "hf"}]}, "at '/converter/hub/tokens/0': missing property 'existingSecret'"),
        ({"converter.hub.endpoint": "hub.example.org"}, "at '/converter/hub/endpoint': 'hub.example.org' does not match pattern"),
        ({"objectStore.publicEndpoint": "https://s3.example.org/finery"}, "at '/objectStore/publicEndpoint'"),
        ({"serving.pools": [POOL | {"nodes": 2}]}, "at '/serving/pools/0': missing property 'adapterCacheClaim'"),
        ({"serving.pools": [POOL | {"maxLoraRank": 24}]}, "at '/serving/pools/0/maxLoraRank': value must be one of 0, 1, 8, 16"),
        ({"serving.pools": [POOL | {"gpuMemoryUtilization": 40}]}, "at '/serving/pools/0/gpuMemoryUtilization'"),
        ({"serving.pools": [{"baseModel": "x"}]}, "at '/serving/pools/0': missing property 'name'"),
        ({"serving.pools": [POOL | {"autoscaling": {"enabled": True}}]}, "missing property 'maxReplicas'"),
        (
            {"serving.pools": [POOL | {"autoscaling": {"enabled": True, "maxReplicas": 2, "cooldownSeconds": 3601}}]},
            "at '/serving/pools/0/autoscaling/cooldownSeconds': maximum: got 3,601, want 3,600",
        ),
        ({"baseModels.models": []}, "at '/baseModels/models': minItems: got 0, want 1"),
        (
            {"baseModels.models": [{"name": "m", "maxSequenceLength": 64, "hubId": "a/b", "s3Prefix": "p/"}]},
            "at '/baseModels/models/0/s3Prefix': value must be 'left out, since hubId is set'",
        ),
        ({"baseModels.models": [{"name": "a:b", "maxSequenceLength": 64}]}, "at '/baseModels/models/0/name'"),
        ({"baseModels.cache.kind": "hostPath"}, "at '/baseModels/cache/hostPath': minLength: got 0, want 2"),
        (
            {"baseModels.cache.accessModes": ["ReadWriteOncePod"]},
            "at '/baseModels/cache/accessModes/0': value must be one of 'ReadWriteOnce', 'ReadWriteMany'",
        ),
        ({"baseModels.cache.hostPath": "/srv"}, "at '/baseModels/cache/hostPath': maxLength"),
        ({"objectStore.kind": "external"}, "at '/objectStore/external/endpoint': minLength: got 0, want 1"),
        ({"postgres.kind": "external"}, "at '/postgres/external/existingSecret': minLength: got 0, want 1"),
        ({"gateway.ingress.enabled": True}, "at '/gateway/ingress/hosts': minItems: got 0, want 1"),
        ({"gateway.httpRoute.enabled": True}, "at '/gateway/httpRoute/parentRefs': minItems: got 0, want 1"),
        ({"gateway.extraEnv": [{"name": "A"}]}, "at '/gateway/extraEnv/0'"),
        ({"gateway.tolerations": [{"key": "a", "effect": "Never"}]}, "at '/gateway/tolerations/0/effect'"),
        ({"networkPolicy.hubCidrs": ["everywhere"]}, "at '/networkPolicy/hubCidrs/0'"),
        ({"networkPolicy.extraEgress": {"trainor": []}}, "at '/networkPolicy/extraEgress': additional properties 'trainor' not allowed"),
        ({"networkPolicy.extraEgress": {"trainer": [{}]}}, "at '/networkPolicy/extraEgress/trainer/0': minProperties: got 0, want 1"),
        (
            {"networkPolicy.extraEgress": {"trainer": [{"from": [{"podSelector": {}}]}]}},
            "at '/networkPolicy/extraEgress/trainer/0': additional properties 'from' not allowed",
        ),
        ({"monitoring.mode": "prometheus"}, "at '/monitoring/mode': value must be one of 'auto', 'operator', 'annotations', 'off'"),
        # What no schema can say.
        ({"serving.pools": [POOL | {"baseModel": "Lama"}]}, 'serving.pools[one].baseModel: got "Lama", wanted one of baseModels.models'),
        ({"serving.pools": [POOL, POOL]}, "serving.pools: got a name twice"),
        (
            {"serving.pools": [POOL | {"nodes": 2, "tensorParallelSize": 8, "adapterCacheClaim": "adapters"}, {"name": "one-0"}]},
            "serving.pools[one-0].name: a pool of several nodes, one, makes StatefulSets of that name",
        ),
        (
            {"fullnameOverride": "n" * 40, "serving.pools": [{"name": "four"}]},
            f"serving.pools[four].name: got {'n' * 40}-serving-four, 53 characters, wanted 52 at the most; shorten the pool's name",
        ),
        (
            {
                "fullnameOverride": "n" * 36,
                "serving.pools": [{"name": "four", "nodes": 2, "tensorParallelSize": 8, "adapterCacheClaim": "adapters"}],
            },
            f"serving.pools[four].name: got {'n' * 36}-serving-four, 49 characters, wanted 48 at the most",
        ),
        (
            {"serving.pools": [POOL | {"autoscaling": {"enabled": True, "maxReplicas": 2}}]},
            "serving.pools[one].autoscaling: KEDA asks Prometheus; set monitoring.prometheusUrl",
        ),
        (
            {"objectStore": {"kind": "external", "external": {"endpoint": "https://s3.example.org", "existingSecret": "s"}}},
            'objectStore.external.endpoint: got "https://s3.example.org", wanted host:port without a scheme',
        ),
        (
            {"objectStore.external.endpoint": "s3.example.org"},
            'objectStore.external: got values with kind "minio", which would go unused while data went to the bundled store',
        ),
        (
            {"postgres.external.existingSecret": "rds"},
            'postgres.external: got values with kind "bundled", which would go unused while data went to the bundled database',
        ),
        (
            {"trainer.worker.gpu.resourceName": "nvidia.com/mig-2g.20gb"},
            "trainer.worker.maxGpusPerJob: got 8 over nvidia.com/mig-2g.20gb, wanted 1",
        ),
        ({"trainer.worker.gpu.count": 4, "trainer.worker.maxGpusPerJob": 1}, "trainer.worker.gpu.count: got 4, wanted 1 at the most"),
        ({"serving.pools": [POOL | {"maxLoras": 16}]}, "serving.pools[one].maxLoras: got 16, wanted 8 at the most, which is maxCpuLoras"),
        ({"serving.pools": [POOL | {"maxModelLen": 10**6}]}, "serving.pools[one].maxModelLen: got 1000000, wanted "),
        (
            {
                "monitoring.prometheusUrl": "http://prometheus:9090",
                "serving.pools": [POOL | {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}}],
            },
            "serving.pools[one].autoscaling: got minReplicas 3 above maxReplicas 2",
        ),
        ({"image.registry": "https://harbor.example.org"}, 'image.registry: got "https://harbor.example.org", wanted a registry without'),
        (
            {"gateway.ingress.enabled": True, "gateway.ingress.hosts": ["https://f.example.org"]},
            'gateway: got the host "https://f.example.org", wanted a name without scheme and path',
        ),
        ({"fullnameOverride": "Finery_Prod"}, "at '/fullnameOverride': 'Finery_Prod' does not match pattern"),
    ],
)
def test_wrong_values_are_refused_by_name(changes, message, chart):
    with pytest.raises(helm_python.HelmError, match=re.escape(message)):
        manifests_of(chart, values_with("default", changes))


def objects(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield where, schema
        for key, value in schema.items():
            yield from objects(value, f"{where}/{key}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from objects(value, f"{where}/{number}")


def test_the_schema_is_closed():
    found = dict(objects(SCHEMA))
    assert len(found) > 40
    assert [where for where, schema in found.items() if schema.get("additionalProperties") is not False] == []


def paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")


def test_every_default_is_one_that_a_schema_names():
    """So that no value is there which nothing reads, or which nobody may set."""

    def resolved(schema: dict[str, Any]) -> dict[str, Any]:
        return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def check(values: dict[str, Any], schema: dict[str, Any], where: str) -> None:
        known = resolved(schema).get("properties")
        if known is None:
            return
        for key, value in values.items():
            assert key in known, f"{where}.{key}"
            if isinstance(value, dict):
                check(value, known[key], f"{where}.{key}")

    check(DEFAULTS, SCHEMA, "values")


def test_every_value_is_read_by_a_template():
    texts = " ".join(path.read_text() for path in (CHART_DIR / "templates").rglob("*") if path.is_file())
    last = {path.rpartition(".")[2] for path in paths(DEFAULTS)}
    # Handed on whole, with their parents.
    whole = {"cpu", "memory", "requests", "limits", "grafana_dashboard"}
    assert {name for name in last - whole if not re.search(rf"[.\"(]{name}\b", texts)} == set()


def test_the_readme_has_every_value():
    readme = (CHART_DIR / "README.md").read_text()
    rows = set(re.findall(r"`([A-Za-z0-9_.\[\]]+)`", readme))
    tops = {path for path in paths(DEFAULTS) if path.count(".") <= 1}
    missing = {path for path in tops if not any(row == path or row.startswith((f"{path}.", f"{path}[")) for row in rows)}
    assert missing == set()
    pool = SCHEMA["$defs"]["pool"]["properties"]
    assert {name for name in pool if name not in rows and f"serving.pools[].{name}" not in rows} == set()


@pytest.mark.parametrize("name", ["one-gpu", "eight-gpus", "two-models", "mig", "time-slicing", "cpu", "air-gapped", "external"])
def test_there_is_an_example_for_it(name):
    assert example(name)
