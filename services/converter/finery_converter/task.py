"""What a conversion's worker is told. Owns the file that says it; imports nothing heavy, for the service reads it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

REPORT_FILE = "report.json"
"""In the scratch folder; what it says goes into the manifest."""


@dataclass(frozen=True)
class Task:
    """What a worker is told. `output_dir` is empty and becomes the artifact; `scratch_dir` is its own."""

    spec: dict[str, Any]
    base_dir: str
    """Of a model that was trained whole, that model."""
    adapter_dirs: tuple[str, ...]
    """In the order of the spec."""
    dataset_dir: str | None
    """Of the calibration dataset."""
    trained_on: Literal["plain", "nf4"]
    precision: str
    """In which the base was trained on."""
    device: str
    """Where: cpu, or a GPU."""
    output_dir: str
    scratch_dir: str
    model_name: str
    converter_dir: str

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Task:
        fields: dict[str, Any] = json.loads(file.read_text())
        fields["adapter_dirs"] = tuple(fields["adapter_dirs"])
        return cls(**fields)
