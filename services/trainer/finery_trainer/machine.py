"""What this machine must have for a spec, checked by its worker before anything is fetched or loaded."""

from __future__ import annotations

from importlib.util import find_spec

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
