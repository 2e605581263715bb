"""The GPUs of this machine, as nvidia-smi tells them: nothing is loaded, and no memory of theirs is taken.

Owns reading its output and `CUDA_VISIBLE_DEVICES`. What a process computes on is the engine's.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_QUERY = "index,uuid,name,memory.total,memory.free"
_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. `index` is as nvidia-smi counts; memory is in bytes."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


def visible_gpus(cuda_visible_devices: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a worker may use; none where there is no driver. Blocks.

    `cuda_visible_devices` is that variable's value, or None where it is not set.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        # A driver without a GPU, or one that does not answer: nothing can be trained on either.
        return ()
    return among(parse(answer.stdout), cuda_visible_devices)


def parse(output: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's CSV, memory there in MiB. A line that it has no numbers for is left out."""
    found: list[Gpu] = []
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_QUERY.split(",")) and all(fields[column].isdigit() for column in (0, 3, 4)):
            index, uuid, name, total_mib, free_mib = fields
            found.append(Gpu(index=int(index), uuid=uuid, name=name, total_bytes=int(total_mib) << 20, free_bytes=int(free_mib) << 20))
    return tuple(found)


def among(gpus: tuple[Gpu, ...], cuda_visible_devices: str | None) -> tuple[Gpu, ...]:
    """Those of `gpus` that the variable names by index or beginning of the UUID, in its order; as in CUDA, a wrong name ends the list."""
    if cuda_visible_devices is None:
        return gpus
    chosen: list[Gpu] = []
    for name in filter(None, map(str.strip, cuda_visible_devices.split(","))):
        gpu = next((gpu for gpu in gpus if name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))), None)
        if gpu is None:
            break
        chosen.append(gpu)
    return tuple(chosen)
