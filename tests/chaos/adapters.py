"""Adapters of random weights for SmolLM2, whole ones and those that are damaged in a way of their own, in a system's real store."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
from e2e.system import System
from minio import Minio
from safetensors.numpy import save

from finery_cli.local.stack import QUICKSTART_MODEL
from finery_common.artifacts import ArtifactRef, ArtifactStore, Manifest, ObjectEntry
from finery_common.catalogue import folder_sha256
from finery_serving.preflight import CONFIG_NAME, WEIGHTS_NAME, base_shapes

RANK = 4
CONFIG: Mapping[str, object] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": RANK,
    "bias": "none",
    "target_modules": ["q_proj", "down_proj"],
}


class Adapters:
    """Publishes to the store of one system, under the default project."""

    def __init__(self, system: System, base_model_dir: Path, *, memo_dir: Path) -> None:
        settings = system.store_settings()
        self.store = ArtifactStore.connect(settings)
        self._bucket = settings.bucket
        self._minio = Minio(settings.endpoint, access_key=settings.access_key, secret_key=settings.secret_key, secure=False)
        self._shapes = {name: shape for name, shape in base_shapes(base_model_dir).items() if "q_proj" in name or "down_proj" in name}
        self._base_sha256 = folder_sha256(base_model_dir, memo_dir=memo_dir)
        self.weights = cache(self._weights)

    def publish(self, seed: int = 0, *, rank: int = RANK, **files: bytes) -> ArtifactRef:
        """Random weights by `seed`, of which each says something else. `files` are added, or take the place of `config` and `weights`."""
        config = json.dumps({**CONFIG, "r": rank}).encode()
        return self.publish_files(
            {CONFIG_NAME: files.pop("config", config), WEIGHTS_NAME: files.pop("weights", None) or self.weights(seed, rank)}
        )

    def publish_files(self, files: Mapping[str, bytes], *, base_sha256: str = "") -> ArtifactRef:
        """An artifact of `files`, as an adapter of the base model that is served."""
        with self.store.writer(_new_prefix(), kind="adapter") as writer:
            for name, data in files.items():
                writer.put_bytes(name, data=data)
            return writer.publish(made_from={}, spec={}, attempt="1", metadata=self._metadata(base_sha256))

    def publish_names(self, *names: str) -> ArtifactRef:
        """An artifact whose manifest, which no writer of ours would write, has objects of these names."""
        entries = tuple(ObjectEntry(name=name, size_bytes=1, sha256="0" * 64) for name in names)
        made = Manifest(
            kind="adapter",
            folder=f"objects/{secrets.token_hex(16)}/",
            objects=entries,
            made_from={},
            spec={},
            attempt="1",
            metadata=self._metadata(""),
            created_at=datetime.now(UTC),
        )
        prefix = _new_prefix()
        self._put(f"{prefix}manifest.json", made.to_bytes())
        return made.ref(prefix)

    def replace(self, ref: ArtifactRef, name: str, data: bytes, *, encoding: str = "") -> ArtifactRef:
        """Writes over an object of a published artifact."""
        self._put(ref.prefix + self.store.manifest(ref).folder + name, data, encoding=encoding)
        return ref

    def _put(self, key: str, data: bytes, *, encoding: str = "") -> None:
        metadata = {"Content-Encoding": encoding} if encoding else None
        self._minio.put_object(self._bucket, key, io.BytesIO(data), len(data), metadata=metadata)

    def _metadata(self, base_sha256: str) -> dict[str, str]:
        return {"base_model": QUICKSTART_MODEL, "base_model_sha256": base_sha256 or self._base_sha256}

    def _weights(self, seed: int, rank: int) -> bytes:
        generator = np.random.default_rng(seed)
        tensors = {}
        for name, (outputs, inputs) in self._shapes.items():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.5, (outputs, rank)).astype(np.float32)
        return save(tensors)


def _new_prefix() -> str:
    return f"{'projects/default'}/adapters/ftjob-{secrets.token_hex(12)}-1/"
