"""`finery estimate`: what memory a job would need, before there is one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from finery_cli.client import connected
from finery_cli.commands.options import Json, Settings, read_settings
from finery_cli.output import fail, say, show
from finery_common.errors import InvalidArgumentError
from finery_common.spec import MemorySpec, MethodType, Quantization

_PARTS = ("weights", "adapters", "gradients", "optimizer_states", "activations", "workspace", "total")
_GPU_COLUMNS = ("gpu", "name", "memory", "free", "fits")


def register(app: typer.Typer) -> None:
    """Adds `finery estimate` to `app`."""
    app.command()(estimate)


def estimate(
    *,
    model: Annotated[str, typer.Option(help="Base model of the catalogue.")],
    method: Annotated[MethodType | None, typer.Option(help="Default: lora.")] = None,
    quantization: Annotated[Quantization | None, typer.Option(help="Of the frozen weights; lora with nf4 is QLoRA.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(min=8, help="In tokens.")] = None,
    spec: Settings = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="A GPU with so much free memory, such as 24GiB, instead of those there are.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what GPU memory a job would need, by part, and where it fits."""
    given = {"base_model": model, "method": method, "quantization": quantization, "max_sequence_length": max_sequence_length}
    settings = read_settings(spec) | {name: value for name, value in given.items() if value is not None}
    body = {"spec": settings} | ({} if gpu_memory is None else {"device_memory_bytes": _bytes(gpu_memory)})
    with connected() as gateway:
        answer = gateway.native.post("/estimate", json=body).json()
    if as_json:
        show(answer, columns=(), as_json=True)
    else:
        _show_tables(answer, gpu_memory=gpu_memory)


def _show_tables(answer: dict[str, Any], *, gpu_memory: str | None) -> None:
    parts = [{"part": part.replace("_", " "), "memory": _size(answer["gpu_memory"][f"{part}_bytes"])} for part in _PARTS]
    if answer["host_bytes"]:
        parts.append({"part": "pinned host memory", "memory": _size(answer["host_bytes"])})
    show(parts, columns=("part", "memory"), as_json=False)
    if gpu_memory is not None:
        why_not = "is too small: half a GiB stays free, and of the rest a run takes what memory.budget says, all of it by default"
        say(f"a GPU with {gpu_memory} free {'is enough' if answer['fits'] else why_not}")
    elif answer["gpus"]:
        show([_gpu_row(gpu) for gpu in answer["gpus"]], columns=_GPU_COLUMNS, as_json=False)
    else:
        say("no GPU is visible to the training service; --gpu-memory 24GiB asks about one")


def _gpu_row(gpu: dict[str, Any]) -> dict[str, object]:
    return {
        "gpu": gpu["index"],
        "name": gpu["name"],
        "memory": _size(gpu["total_bytes"]),
        "free": _size(gpu["free_bytes"]),
        "fits": "yes" if gpu["fits"] else "no",
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 24 else f"{num_bytes / (1 << 20):.2f} MiB"


def _bytes(text: str) -> int:
    try:
        size = MemorySpec.parse({"budget": text}).budget_bytes(1 << 60)
    except InvalidArgumentError:
        size = 0
    # A share, or everything, is no size.
    if not 1 < size < 1 << 59:
        fail(f"--gpu-memory: got {text!r}, wanted bytes, or a number with a unit such as 24GiB")
    return size
