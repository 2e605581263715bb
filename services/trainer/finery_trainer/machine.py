"""This machine: what it must have for a spec, checked by its worker before anything is fetched or loaded, and its CPUs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from finery_common.errors import FailedPreconditionError
from finery_common.spec import Quantization, TrainingSpec


def check_machine(spec: TrainingSpec, *, num_gpus: int, has_bitsandbytes: bool) -> None:
    """Raises FailedPreconditionError, naming the field, where a machine with `num_gpus` visible GPUs cannot run `spec`."""
    if spec.gpus > max(1, num_gpus):
        there = f"{num_gpus} is visible" if num_gpus == 1 else f"{num_gpus} are visible"
        raise FailedPreconditionError(
            f"gpus: got {spec.gpus}, but {there} to the worker; lower it to {max(1, num_gpus)}.", param="spec.gpus"
        )
    if spec.quantization is not Quantization.NONE and not has_bitsandbytes:
        raise FailedPreconditionError(
            f"quantization: got {spec.quantization.value}, which needs the package bitsandbytes on the machine that trains; "
            "install it there, or use none.",
            param="spec.quantization",
        )


def check_this_machine(spec: TrainingSpec) -> None:
    """As `check_machine`, of the machine that this process runs on."""
    import torch

    check_machine(spec, num_gpus=torch.cuda.device_count(), has_bitsandbytes=find_spec("bitsandbytes") is not None)


def use_cpus(num_threads: int | None) -> int:
    """Has torch compute on a CPU with `num_threads`, or with what it chooses itself but for a container's limit, which it does not see.

    Answers how many there are now. `OMP_NUM_THREADS` counts where `num_threads` is None.
    """
    import torch

    if num_threads is None and "OMP_NUM_THREADS" not in os.environ and (limit := cpu_limit()) is not None:
        num_threads = min(torch.get_num_threads(), max(1, int(limit)))
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPUs that a container's limit comes to, by version 2 or 1 of control groups; None where there is none."""
    try:
        if (file := cgroup / "cpu.max").is_file():
            quota, period = file.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None
