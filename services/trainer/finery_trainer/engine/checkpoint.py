"""Full training states: trained weights, optimizer, step, random generators. A resumed run goes on as one that never stopped.

Owns the form on disk: `state.safetensors` for every tensor and `state.json` for the rest. The data cursor is the step: the order of
rows is a function of seed and epoch. Where a state is kept is the worker's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finery_common.errors import DataLossError
from finery_trainer.engine.optim import Stepper

_TENSORS, _REST = "state.safetensors", "state.json"
_CPU_RNG = "rng.cpu"


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: steps done of `num_steps`, tokens seen, and the data it counts in."""

    step: int
    num_steps: int
    num_trained_tokens: int
    num_rows: int


def save(folder: Path, *, model: torch.nn.Module, stepper: Stepper, cursor: Cursor) -> None:
    """Writes the state into `folder`, which must exist."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in _trained(model).items()}
    moments, numbers = stepper.state()
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
    tensors[_CPU_RNG] = torch.get_rng_state()
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / _TENSORS)
    (folder / _REST).write_text(json.dumps({"cursor": asdict(cursor), "optimizer": numbers}))


def read_cursor(folder: Path) -> Cursor:
    """Where the state in `folder` stands. Raises DataLossError where there is none that can be read."""
    try:
        return Cursor(**json.loads((folder / _REST).read_text())["cursor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"The checkpoint's {_REST} cannot be read ({error}); resume from another checkpoint.") from error


def restore(folder: Path, *, model: torch.nn.Module, stepper: Stepper) -> Cursor:
    """Puts the state in `folder` into `model`, `stepper` and the random generators. Raises DataLossError where it does not fit."""
    cursor = read_cursor(folder)
    tensors, numbers = _read(folder)
    trained = _trained(model)
    weights = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    if _forms(trained) != _forms(weights):
        raise DataLossError("The checkpoint's weights are not those of this model, precision and LoRA shape; start the job anew.")
    moments = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    if _forms(moments) != _forms(stepper.state()[0]):
        raise DataLossError("The checkpoint's optimizer states are not those of this optimizer.type and model; start the job anew.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    stepper.load_state((moments, numbers))
    stepper.step = cursor.step
    torch.set_rng_state(tensors[_CPU_RNG])
    for index in range(torch.cuda.device_count()):
        if (saved := tensors.get(f"rng.cuda.{index}")) is not None:
            torch.cuda.set_rng_state(saved, index)
    return cursor


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(all tensors, the optimizer's numbers). Raises DataLossError where a file is not whole."""
    try:
        tensors = load_file(folder / _TENSORS)
        if _CPU_RNG not in tensors:
            raise KeyError(_CPU_RNG)
        return tensors, json.loads((folder / _REST).read_text())["optimizer"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataLossError(f"The checkpoint's state cannot be read ({error}); resume from another checkpoint.") from error


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
