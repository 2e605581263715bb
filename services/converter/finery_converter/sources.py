"""What a conversion is made from: adapters or a trained model of the project, the base model, a dataset to measure with.

Owns finding them, proving that they belong together, and their local folders. Everything here blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finery_common.artifacts import ArtifactRef, ArtifactStore, Manifest
from finery_common.catalogue import BaseModelEntry, Catalogue, folder_sha256, materialize
from finery_common.conversion_spec import BaseWeights, ConversionSpec
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

_LOOK_AT = {
    "adapters": "the job has not published it, or it was deleted. A job's checkpoints name the adapters there are.",
    "models": "no job of method full has published it, or it was deleted.",
    "datasets": "it is not prepared yet, or it was deleted.",
}
_PRECISION = "bfloat16"
_DEVICE = "cuda"
"""What artifacts mean that do not say so: training is for a GPU, where precision auto is bfloat16."""


@dataclass(frozen=True)
class Adapter:
    """A published adapter with its share of the whole."""

    key: str
    ref: ArtifactRef
    weight: float
    quantization: str
    """Of the base as it was trained on: none, nf4 or int8."""
    precision: str
    """Of the base as it was trained on: bfloat16, float16 or float32."""
    device: str
    """Where: cpu or cuda."""


@dataclass(frozen=True)
class Found:
    """All that a conversion needs from the store, and what the manifests say of it."""

    base_model: str
    base_model_sha256: str
    adapters: tuple[Adapter, ...] = ()
    model: ArtifactRef | None = None
    """Trained whole; then there are no adapters, and the base model only names what it came from."""
    dataset: ArtifactRef | None = None

    @property
    def trained_on(self) -> Literal["plain", "nf4"]:
        """Which weights the adapters were trained beside. Those of int8 are "plain": its products are no products of other weights."""
        return "nf4" if any(adapter.quantization == "nf4" for adapter in self.adapters) else "plain"

    @property
    def precision(self) -> str:
        """In which the base was loaded."""
        return self.adapters[0].precision if self.adapters else _PRECISION

    @property
    def device(self) -> str:
        """Where the base was quantized, if it was."""
        return self.adapters[0].device if self.adapters else _DEVICE

    @property
    def made_from(self) -> dict[str, str]:
        """Roles and digests, for the manifest."""
        digests = {"base_model": self.base_model_sha256}
        if len(self.adapters) == 1:
            digests["adapter"] = self.adapters[0].ref.manifest_sha256
        else:
            digests |= {f"adapter_{number}": adapter.ref.manifest_sha256 for number, adapter in enumerate(self.adapters, 1)}
        if self.model is not None:
            digests["model"] = self.model.manifest_sha256
        if self.dataset is not None:
            digests["calibration_dataset"] = self.dataset.manifest_sha256
        return digests


class Sources:
    """Adapters, models and datasets from the store, base models from the catalogue."""

    def __init__(self, artifacts: ArtifactStore, *, catalogue: Catalogue, cache_dir: Path) -> None:
        self._artifacts = artifacts
        self._catalogue = catalogue
        self._cache_dir = cache_dir

    def find(self, project: str, spec: ConversionSpec) -> Found:
        """What `spec` names in `project`.

        Raises NotFoundError where the project lacks it or the catalogue lacks its base model, FailedPreconditionError where a manifest
        does not name that, InvalidArgumentError where the parts belong to different base models.
        """
        manifests = {source.adapter: self._manifest(project, source.adapter, field="adapter") for source in spec.sources}
        adapters = tuple(_adapter(source.adapter, manifests[source.adapter], project, source.weight) for source in spec.sources)
        model = None
        if spec.model is not None:
            manifests[spec.model] = self._manifest(project, spec.model, field="model")
            model = manifests[spec.model].ref(_prefix(project, spec.model))
        key, first = next(iter(manifests.items()))
        base_model, base_model_sha256 = _said(first, "base_model", key=key), _said(first, "base_model_sha256", key=key)
        for other, manifest in manifests.items():
            _check_same_base(key, base_model_sha256, other, _said(manifest, "base_model_sha256", key=other))
        kinds = {(item.quantization, item.precision, item.device) for item in adapters}
        if len(kinds) > 1 and any(item.quantization == "nf4" for item in adapters) and spec.base_weights is BaseWeights.TRAINED:
            got = ", ".join(" ".join(kind) for kind in sorted(kinds))
            raise InvalidArgumentError(
                f"adapters: got some that were trained on other base weights than others ({got}), wanted one kind; train them alike, "
                "or use base_weights original.",
                param="spec.adapters",
            )
        self._catalogue.get(base_model)
        dataset = None if spec.calibration_dataset is None else self._dataset(project, spec.calibration_dataset, base_model)
        return Found(base_model, base_model_sha256, adapters, model, dataset)

    def base_folder(self, found: Found) -> Path:
        """The base model's folder. Raises FailedPreconditionError where its files are not those that were trained on."""
        folder = materialize(self._catalogue.get(found.base_model), cache_dir=self._cache_dir, store=self._artifacts)
        digest = folder_sha256(folder, memo_dir=self._cache_dir / "digests")
        if digest != found.base_model_sha256:
            raise FailedPreconditionError(
                f"The adapter was trained on {found.base_model} with SHA-256 {found.base_model_sha256}; "
                f"the catalogue's {found.base_model} has {digest}. Point the catalogue at the files it was trained on.",
                code="base_model_mismatch",
            )
        return folder

    def base_entry(self, found: Found) -> BaseModelEntry:
        """What the catalogue says of the base model."""
        return self._catalogue.get(found.base_model)

    def folder(self, ref: ArtifactRef) -> Path:
        """A local copy, every digest checked. Raises DataLossError, ResourceExhaustedError."""
        return self._artifacts.fetch(ref, self._cache_dir)

    def _manifest(self, project: str, key: str, *, field: str) -> Manifest:
        try:
            return self._artifacts.manifest(_prefix(project, key))
        except NotFoundError as error:
            collection = key.partition("/")[0]
            message = f"There is no {key} in project {project}: {_LOOK_AT[collection]}"
            raise NotFoundError(message, code=f"{collection.removesuffix('s')}_not_found", param=f"spec.{field}") from error

    def _dataset(self, project: str, key: str, base_model: str) -> ArtifactRef:
        manifest = self._manifest(project, key, field="calibration_dataset")
        made_for, kind = manifest.metadata.get("base_model"), manifest.spec.get("type", "supervised")
        if (made_for, kind) != (base_model, "supervised"):
            raise InvalidArgumentError(
                f"calibration_dataset: got {key}, {kind} rows for {made_for}, wanted supervised rows prepared for {base_model}.",
                param="spec.calibration_dataset",
            )
        return manifest.ref(_prefix(project, key))


def _prefix(project: str, key: str) -> str:
    return f"projects/{project}/{key}/"


def _adapter(key: str, manifest: Manifest, project: str, weight: float) -> Adapter:
    quantization = str(manifest.spec.get("quantization", "none"))
    asked = manifest.spec.get("precision", "auto")
    precision = str(manifest.metadata.get("precision") or (_PRECISION if asked == "auto" else asked))
    device = str(manifest.metadata.get("device") or _DEVICE)
    return Adapter(key, manifest.ref(_prefix(project, key)), weight, quantization, precision, device)


def _check_same_base(key: str, sha256: str, other: str, other_sha256: str) -> None:
    if other_sha256 != sha256:
        raise InvalidArgumentError(
            f"adapters: got {key} of the base weights {sha256} and {other} of {other_sha256}, wanted adapters of one base model.",
            param="spec.adapters",
        )


def _said(manifest: Manifest, name: str, *, key: str) -> str:
    value = manifest.metadata.get(name)
    if not isinstance(value, str) or not value:
        raise FailedPreconditionError(f"The manifest of {key} does not say {name}, so its base model cannot be checked; train it again.")
    return value
