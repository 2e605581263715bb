"""What a conversion is made from: an adapter of the project and the base model it was trained on.

Owns finding both, proving that they belong together, and their local folders. Everything here blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finery_common.artifacts import ArtifactRef, ArtifactStore, Manifest
from finery_common.catalogue import Catalogue, folder_sha256, materialize
from finery_common.errors import FailedPreconditionError, NotFoundError


@dataclass(frozen=True)
class Adapter:
    """A published adapter and what its manifest says it was trained on."""

    ref: ArtifactRef
    base_model: str
    base_model_sha256: str


class Sources:
    """Adapters from the store, base models from the catalogue."""

    def __init__(self, artifacts: ArtifactStore, *, catalogue: Catalogue, cache_dir: Path) -> None:
        self._artifacts = artifacts
        self._catalogue = catalogue
        self._cache_dir = cache_dir

    def find(self, project: str, adapter: str) -> Adapter:
        """The adapter with the key `adapters/<id>` of `project`.

        Raises NotFoundError where the project has none or the catalogue lacks its base model, FailedPreconditionError where its manifest
        does not name that.
        """
        prefix = f"projects/{project}/{adapter}/"
        try:
            manifest = self._artifacts.manifest(prefix)
        except NotFoundError as error:
            raise NotFoundError(
                f"There is no {adapter} in project {project}: the job has not published it, or it was deleted. "
                "A job's checkpoints name the adapters there are.",
                code="adapter_not_found",
                param="spec.adapter",
            ) from error
        base_model = _said(manifest, "base_model", adapter=adapter)
        self._catalogue.get(base_model)
        return Adapter(manifest.ref(prefix), base_model, _said(manifest, "base_model_sha256", adapter=adapter))

    def base_folder(self, adapter: Adapter) -> Path:
        """The base model's folder. Raises FailedPreconditionError where its files are not those that the adapter was trained on."""
        folder = materialize(self._catalogue.get(adapter.base_model), cache_dir=self._cache_dir, store=self._artifacts)
        digest = folder_sha256(folder, memo_dir=self._cache_dir / "digests")
        if digest != adapter.base_model_sha256:
            raise FailedPreconditionError(
                f"The adapter was trained on {adapter.base_model} with SHA-256 {adapter.base_model_sha256}; "
                f"the catalogue's {adapter.base_model} has {digest}. Point the catalogue at the files it was trained on.",
                code="base_model_mismatch",
            )
        return folder

    def adapter_folder(self, adapter: Adapter) -> Path:
        """A local copy, every digest checked. Raises DataLossError, ResourceExhaustedError."""
        return self._artifacts.fetch(adapter.ref, self._cache_dir)


def _said(manifest: Manifest, key: str, *, adapter: str) -> str:
    value = manifest.metadata.get(key)
    if not isinstance(value, str) or not value:
        raise FailedPreconditionError(f"The manifest of {adapter} does not say {key}, so its base model cannot be checked; train it again.")
    return value
