"""Adapters that are damaged, or were made to do damage: each is refused with its reason, and what served goes on serving.

The rules one by one, without processes: `test_serving_preflight`, `test_artifacts`.
"""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Iterator

import grpc
import pytest
from chaos.adapters import CONFIG, Adapters
from chaos.load import say
from chaos.serving import Deployments, copies, vllm_state
from e2e.system import System
from openai import OpenAI

from finery.serving.v1 import serving_pb2
from finery_common.artifacts import ArtifactRef
from finery_serving.preflight import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.timeout(300)

_CONFIG = json.dumps(CONFIG).encode()
_PICKLE = pickle.dumps({"lora_A": [1.0]})
_LARGE = 32 << 20


def flipped(adapters: Adapters) -> ArtifactRef:
    weights = bytearray(adapters.weights(1, 4))
    weights[-100] ^= 1
    return adapters.replace(adapters.publish(1), WEIGHTS_NAME, bytes(weights))


def packed(adapters: Adapters) -> ArtifactRef:
    """The store says that it is compressed, as it then does in its answers."""
    config = gzip.compress(b" " * _LARGE)
    return adapters.replace(adapters.publish(1, config=config), CONFIG_NAME, config, encoding="gzip")


DAMAGED: dict[str, tuple[Callable[[Adapters], ArtifactRef], str, str]] = {
    "flipped-byte": (flipped, "data_loss", "is damaged"),
    "truncated-in-the-store": (
        lambda adapters: adapters.replace(adapters.publish(1), WEIGHTS_NAME, adapters.weights(1, 4)[:-100]),
        "data_loss",
        "is damaged",
    ),
    "truncated-before": (lambda adapters: adapters.publish(weights=adapters.weights(1, 4)[:-100]), "adapter_not_servable", "truncated"),
    "rank-too-high": (lambda adapters: adapters.publish(1, rank=32), "adapter_not_servable", "at most 16 is served"),
    "wrong-base": (
        lambda adapters: adapters.publish_files({CONFIG_NAME: _CONFIG, WEIGHTS_NAME: adapters.weights(1, 4)}, base_sha256="0" * 64),
        "wrong_base_model",
        "other weights",
    ),
    "wrong-shapes": (
        lambda adapters: adapters.publish(config=_CONFIG.replace(b'"r": 4', b'"r": 8'), weights=adapters.weights(1, 4)),
        "adapter_not_servable",
        "got shape",
    ),
    "dora": (
        lambda adapters: adapters.publish(1, config=json.dumps({**CONFIG, "use_dora": True}).encode()),
        "adapter_not_servable",
        "DoRA",
    ),
    "pickle-as-safetensors": (lambda adapters: adapters.publish(weights=_PICKLE), "adapter_not_servable", "no safetensors"),
    "pickle": (
        lambda adapters: adapters.publish_files({CONFIG_NAME: _CONFIG, "adapter_model.bin": _PICKLE}),
        "adapter_not_servable",
        "lacks adapter_model.safetensors",
    ),
    "pickle-beside": (
        lambda adapters: adapters.publish_files({CONFIG_NAME: _CONFIG, WEIGHTS_NAME: adapters.weights(1, 4), "extra.pt": _PICKLE}),
        "adapter_not_servable",
        "extra.pt",
    ),
    "config-too-large": (lambda adapters: adapters.publish(config=b" " * _LARGE), "adapter_not_servable", f"{_LARGE} bytes"),
    "config-that-unpacks": (packed, "adapter_not_servable", "no JSON"),
    "config-too-deep": (lambda adapters: adapters.publish(config=b"[" * 100_000), "adapter_not_servable", "no JSON"),
}

# Read when the deployment is asked for.
DAMAGED_MANIFESTS: dict[str, tuple[Callable[[Adapters], ArtifactRef], str]] = {
    "name-upwards": (lambda adapters: adapters.publish_names("../../escaped"), "object name"),
    "name-upwards-inside": (lambda adapters: adapters.publish_names("a/../../../escaped"), "object name"),
    "name-absolute": (lambda adapters: adapters.publish_names("/tmp/escaped"), "object name"),
    "name-with-nul": (lambda adapters: adapters.publish_names("escaped\0.safetensors"), "object name"),
    "name-too-long": (lambda adapters: adapters.publish_names("escaped" * 1000), "object name"),
    "name-file-and-folder": (lambda adapters: adapters.publish_names("escaped", "escaped/x"), "object name"),
    "manifest-too-large": (lambda adapters: adapters.publish_names("x" * _LARGE), "more than"),
}


@pytest.fixture(scope="module")
def steady(deployments: Deployments, adapters: Adapters) -> Iterator[serving_pb2.Alias]:
    yield deployments.served("steady", adapters.publish(0))
    deployments.delete("steady")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_adapter_is_refused_and_what_served_goes_on(
    system: System, client: OpenAI, deployments: Deployments, adapters: Adapters, steady: serving_pb2.Alias, name: str
):
    make, code, words = DAMAGED[name]
    ref = make(adapters)
    deployments.deploy("steady", ref)
    failed = deployments.until("steady", "FAILED")
    assert failed.rollout.error.code == code, failed.rollout.error
    assert words in failed.rollout.error.message
    assert len(failed.rollout.error.message) < 2000
    assert str(system.layout.state_dir) not in failed.rollout.error.message
    assert (failed.version, failed.epoch, failed.etag) == (steady.version, steady.epoch, steady.etag)
    assert set(vllm_state(system)["adapters"]) >= {steady.version}
    assert failed.rollout.version not in vllm_state(system)["adapters"]
    assert say(client, "steady")


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_an_adapter_with_a_damaged_manifest_is_refused_at_once(
    system: System, client: OpenAI, deployments: Deployments, adapters: Adapters, steady: serving_pb2.Alias, name: str
):
    make, words = DAMAGED_MANIFESTS[name]
    before = deployments.get("steady")
    with pytest.raises(grpc.RpcError, match="DATA_LOSS") as caught:
        deployments.deploy("steady", make(adapters))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 4000
    assert str(system.layout.state_dir) not in str(caught.value)
    assert (deployments.get("steady"), before.version) == (before, steady.version)
    assert say(client, "steady")


def test_nothing_damaged_stays_or_gets_elsewhere(system: System, deployments: Deployments, steady: serving_pb2.Alias):
    deployments.until("steady", "FAILED", "READY")
    assert not [path for path in system.layout.state_dir.rglob("*escaped*") if "seaweedfs" not in path.parts]
    assert not [name for name in copies(system) if name.startswith(".")]
