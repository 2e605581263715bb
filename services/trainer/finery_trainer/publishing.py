"""What a worker publishes: full states, adapters or a model, the CSV of step metrics. Each is guarded by the attempt's epoch.

An earlier attempt of the same job may have published the same step before it died; what it published is then taken as it is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from finery_common.artifacts import ArtifactKind, ArtifactRef, ArtifactStore
from finery_common.errors import AlreadyExistsError
from finery_common.spec import Precision
from finery_trainer.client import Assignment
from finery_trainer.records import StepMetrics

CSV_NAME = "step_metrics.csv"
_COLUMNS = ("step", "epoch", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")


class MetricsTable:
    """Every step's metrics, kept across attempts: a full state carries the rows up to it."""

    def __init__(self, rows: list[list[str]] | None = None) -> None:
        self._rows = rows or []

    @classmethod
    def restored(cls, state_dir: Path) -> MetricsTable:
        """The table that `write` left in a full state's folder."""
        return cls(list(csv.reader(io.StringIO((state_dir / CSV_NAME).read_text())))[1:])

    def add(self, metrics: StepMetrics) -> None:
        """Appends a step."""
        values = (
            metrics.step,
            metrics.epoch,
            metrics.loss,
            "" if metrics.validation_loss is None else metrics.validation_loss,
            metrics.learning_rate,
            metrics.grad_norm,
            metrics.tokens_per_second,
            metrics.memory_bytes,
        )
        self._rows.append([f"{value:.6g}" if isinstance(value, float) else str(value) for value in values])

    def write(self, folder: Path) -> Path:
        """Writes the CSV, with its head, into `folder`."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *self._rows])
        path = folder / CSV_NAME
        path.write_text(text.getvalue())
        return path


class Publisher:
    """Publishes for one attempt, which runs in `precision` on `device`, cpu or cuda.

    `confirm` raises where the attempt no longer holds its job; it is asked before every manifest.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        assignment: Assignment,
        base_sha256: str,
        precision: Precision,
        device: str,
        confirm: Callable[[], None],
    ) -> None:
        self._store = store
        self._assignment = assignment
        self._base_sha256 = base_sha256
        self._precision = precision
        self._device = device
        self._confirm = confirm

    def state(self, folder: Path, *, step: int) -> ArtifactRef:
        """A full state, for resuming."""
        return self._publish(f"runs/{self._assignment.job_id}/checkpoints/{step}/", kind="checkpoint", folder=folder, step=step)

    def adapter(self, folder: Path, *, step: int) -> ArtifactRef:
        """An adapter in PEFT's format, for serving and conversion."""
        return self._publish(f"adapters/{self._assignment.job_id}-{step}/", kind="adapter", folder=folder, step=step)

    def model(self, folder: Path, *, step: int) -> ArtifactRef:
        """A whole model in Hugging Face's layout."""
        return self._publish(f"models/{self._assignment.job_id}/", kind="model", folder=folder, step=step)

    def metrics(self, folder: Path, *, step: int) -> ArtifactRef:
        """The CSV of all steps."""
        return self._publish(f"runs/{self._assignment.job_id}/metrics/", kind="metrics", folder=folder, step=step)

    def _publish(self, path: str, *, kind: ArtifactKind, folder: Path, step: int) -> ArtifactRef:
        work = self._assignment
        prefix = f"projects/{work.project}/{path}"
        made_from = {"dataset": work.training_dataset.manifest_sha256, "base_model": self._base_sha256}
        if work.validation_dataset is not None:
            made_from["validation_dataset"] = work.validation_dataset.manifest_sha256
        metadata: dict[str, str | int] = {
            "base_model": work.spec.base_model,
            "base_model_sha256": self._base_sha256,
            "job_id": work.job_id,
            "step": step,
            # What auto became, and where: NF4 weights can be made again by these.
            "precision": self._precision.value,
            "device": self._device,
        }
        with self._store.writer(prefix, kind=kind) as writer:
            writer.put_folder(folder)
            self._confirm()
            try:
                return writer.publish(
                    made_from=made_from, spec=work.spec.model_dump(mode="json"), attempt=f"{work.job_id}/{work.epoch}", metadata=metadata
                )
            except AlreadyExistsError:
                return self._store.ref(prefix)
