"""The conversion itself, in a process of its own: `python -m finery_converter.worker <task.json>`.

Owns the order of the steps and the way the launcher hears of them: one JSON object a line on standard output, `{"step", "progress"}`
while it works, `{"error"}` before a non-zero exit. Knows folders only: no store, no database, no network. The launcher cancels it by
killing it; it dies with its launcher.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from finery_common.conversion_spec import OutputFormat, OutputType
from finery_common.errors import FineryError, ResourceExhaustedError

NICENESS = 10
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Task:
    """What a worker is told. `output_dir` is empty and becomes the artifact; `scratch_dir` is its own."""

    base_dir: str
    adapter_dir: str
    output_dir: str
    scratch_dir: str
    format: str
    type: str
    model_name: str
    converter_dir: str

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Task:
        return cls(**json.loads(file.read_text()))


Report = Callable[[str, float], None]


def convert(task: Task, report: Report) -> None:
    """Does the whole task; `report` gets the step's name and the share of all work done. Raises FineryError."""
    if task.format == OutputFormat.GGUF:
        _convert_to_gguf(task, report)
    else:
        _merge(task, Path(task.output_dir), stored_as=task.type, report=lambda share: report("merging", share))


def _convert_to_gguf(task: Task, report: Report) -> None:
    from finery_converter import gguf

    converter_dir, scratch_dir = Path(task.converter_dir), Path(task.scratch_dir)
    report("checking", 0.0)
    gguf.check_supported(Path(task.base_dir), converter_dir=converter_dir, scratch_dir=scratch_dir)
    merged_dir = scratch_dir / "merged"
    merged_dir.mkdir()
    # In float32, so that the format's own rounding is the only one and vectors, which GGUF keeps in float32, lose nothing.
    _merge(task, merged_dir, stored_as="f32", report=lambda share: report("merging", share / 2))
    gguf.convert(
        merged_dir,
        Path(task.output_dir) / f"model.{task.type}.gguf",
        type_=OutputType(task.type),
        model_name=task.model_name,
        converter_dir=converter_dir,
        on_progress=lambda share: report("writing GGUF", 0.5 + share / 2),
    )


def _merge(task: Task, output_dir: Path, *, stored_as: str, report: Callable[[float], None]) -> None:
    import torch

    from finery_converter.merge import merge, plan_merge

    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "q8_0": torch.float32}
    plan = plan_merge(Path(task.base_dir), Path(task.adapter_dir), stored_as=dtypes[stored_as], fits=dtypes[task.type])
    # A GGUF file has at most two bytes for each element, beside the merged model that it is made from.
    _check_room(plan.size_bytes + (2 * plan.num_elements if task.format == OutputFormat.GGUF else 0), folder=output_dir)
    merge(plan, output_dir, on_progress=report)


def _check_room(needed_bytes: int, *, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise ResourceExhaustedError(
            f"The conversion needs {needed_bytes + _SPARE_BYTES:,} bytes of disk for its files and {free_bytes:,} are free at {folder}; "
            "free space there or move FINERY_STATE_DIR to a larger disk.",
            code="disk_full",
        )


def main(task_file: Path, lines: TextIO) -> int:
    """Runs the task in `task_file`, reporting to `lines`; answers the exit status."""

    def say(message: dict[str, object]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    try:
        convert(Task.read(task_file), lambda step, share: say({"step": step, "progress": round(share, 4)}))
    except FineryError as error:
        say({"error": {"kind": error.status, "code": error.code, "message": error.message}})
        return 1
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        say(
            {
                "error": {
                    "kind": ResourceExhaustedError.status,
                    "code": "disk_full",
                    "message": f"The disk filled up while converting: {error.strerror}.",
                }
            }
        )
        return 1
    return 0


if __name__ == "__main__":
    os.nice(NICENESS)
    # What libraries print must not mix with the reports.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(Path(sys.argv[1]), protocol))
