"""How fast merging is beside copying the same bytes, and beside PEFT's own merge; and what memory it takes.

Owns a model of random weights, the measurements and one line of JSON. Nothing is installed for it:

    PYTHONPATH=services/common:services/converter:kernels python services/converter/benchmarks/merge.py --dir /scratch --shape 8b

`--shape` chooses the model (see SHAPES). Every figure is a process of its own on files that were just written and synced, and, where
`--cold` is given and the kernel lets us, dropped from its cache. `copy` is what the disk can do with these bytes: read in blocks of
16 MiB and written, fsync included, which is how `merge` ends too. `peft` reads the base with safetensors, adds what `merge_and_unload`
adds, and writes nothing: its time is arithmetic and reading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from finery_converter.stored import Form

SHAPES = {
    "8b": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128_256, "shard_layers": 8},
    "1b": {"hidden": 2048, "intermediate": 8192, "layers": 10, "heads": 32, "kv_heads": 8, "vocab": 32_000, "shard_layers": 5},
    "tiny": {"hidden": 256, "intermediate": 512, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512, "shard_layers": 1},
}
RANK = 16
_COPY_BYTES = 16 * 1024 * 1024
_SPREAD = 0.02


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A llama of random bf16 weights in shards, and an adapter of rank 16 on all its linear layers."""
    from safetensors.torch import save_file

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    generator = torch.Generator().manual_seed(1)
    num_shards = -(-shape["layers"] // shape["shard_layers"]) + 1
    weight_map: dict[str, str] = {}
    pairs: dict[str, torch.Tensor] = {}
    for number, layers in enumerate([[], *_groups(shape)], start=1):
        sizes = _ends(shape) if not layers else {name: size for layer in layers for name, size in _layer(shape, layer).items()}
        file = f"model-{number:05}-of-{num_shards:05}.safetensors"
        save_file({name: _random(size, generator) for name, size in sizes.items()}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sizes, file)
        for name, size in sizes.items():
            if "proj" in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{module}.lora_A.weight"] = torch.randn(RANK, size[1], generator=generator)
                pairs[f"{module}.lora_B.weight"] = torch.randn(size[0], RANK, generator=generator) * 1e-3
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps(_config(shape)))
    save_file(pairs, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}))
    os.sync()


def _groups(shape: dict[str, int]) -> list[list[int]]:
    layers = list(range(shape["layers"]))
    return [layers[start : start + shape["shard_layers"]] for start in range(0, len(layers), shape["shard_layers"])]


def _ends(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    matrix = (shape["vocab"], shape["hidden"])
    return {"lm_head.weight": matrix, "model.embed_tokens.weight": matrix, "model.norm.weight": (shape["hidden"],)}


def _layer(shape: dict[str, int], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden"], shape["intermediate"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    sizes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}


def _random(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator).mul_(_SPREAD).to(torch.bfloat16)


def _config(shape: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def copy(folder: Path, out: Path) -> None:
    """The base's weights, read and written, each file synced."""
    buffer = bytearray(_COPY_BYTES)
    for file in sorted((folder / "base").glob("*.safetensors")):
        with file.open("rb", buffering=0) as source, (out / file.name).open("xb", buffering=0) as target:
            while read := source.readinto(buffer):
                target.write(memoryview(buffer)[:read])
            os.fsync(target.fileno())


def merge(folder: Path, out: Path, form: str) -> None:
    """What the converter does."""
    from finery_converter import merge as merging

    forms: dict[str, Form] = {"nf4": "nf4", "fp8": "fp8", "fp8_block": "fp8_block"}
    plan = merging.plan_merge(
        folder / "base",
        folder / "adapter",
        stored_as=torch.bfloat16,
        form=forms.get(form),
        trained_on="nf4" if form == "trained" else "plain",
    )
    merging.merge(plan, out, on_progress=lambda share: None)


def peft(folder: Path, out: Path) -> None:
    """What PEFT's `merge_and_unload` computes for each layer, in the base's own type, on tensors read by safetensors."""
    from safetensors import safe_open

    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as adapter:
        for file in sorted((folder / "base").glob("*.safetensors")):
            with safe_open(file, framework="pt") as base:
                for name in base.keys():  # noqa: SIM118  # no mapping
                    weight = base.get_tensor(name)
                    if "proj" in name:
                        module = f"base_model.model.{name.removesuffix('.weight')}"
                        a, b = (adapter.get_tensor(f"{module}.lora_{half}.weight") for half in "AB")
                        weight += ((b @ a) * 1.0).to(weight.dtype)


def measure(what: str, folder: Path, *, cold: bool) -> dict[str, float]:
    """Runs this file's `what` in a process of its own: seconds from the start of work to its end, and the peak of its memory."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    # Threads that spin while they wait cost more than they save where cores are shared.
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    command = [sys.executable, __file__, "--dir", str(folder), "--only", what]
    line = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout.splitlines()[-1]
    shutil.rmtree(out)
    return json.loads(line)


def run_one(what: str, folder: Path) -> dict[str, float]:
    """Does `what` and answers seconds and memory."""
    import_everything(what)
    before_bytes = peak_rss_bytes()
    start = time.perf_counter()
    if what == "copy":
        copy(folder, folder / "out")
    elif what == "peft":
        peft(folder, folder / "out")
    else:
        merge(folder, folder / "out", what)
    seconds = time.perf_counter() - start
    peak_bytes = peak_rss_bytes()
    return {"seconds": round(seconds, 3), "peak_rss_bytes": peak_bytes, "beside_imports_bytes": peak_bytes - before_bytes}


def peak_rss_bytes() -> int:
    """Of this process since it began; getrusage would count its parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def import_everything(what: str) -> None:
    """Imports are no part of what is measured."""
    if what not in ("copy", "peft"):
        from finery_converter import merge as merging

        assert merging


def rows(folder: Path, names: list[str], *, repeats: int, cold: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Every measurement `repeats` times, in turn, so that a disk that slows down slows all of them; the median of each."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(measure(name, folder, cold=cold))
    size_bytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    copied = statistics.median(result["seconds"] for result in found["copy"]) if "copy" in found else None
    for name, results in found.items():
        seconds = statistics.median(result["seconds"] for result in results)
        peak_bytes = max(result["beside_imports_bytes"] for result in results)
        row: dict[str, object] = {"seconds": seconds, "gb_per_s": round(size_bytes / seconds / 1e9, 3), "beside_imports_bytes": peak_bytes}
        row |= {"all_seconds": [result["seconds"] for result in results]}
        yield name, row if copied is None else row | {"of_copy": round(copied / seconds, 3)}


def main() -> None:
    """Makes the model where it is missing, measures, prints one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--what", nargs="+", default=["copy", "merged", "peft"], help="copy merged peft nf4 fp8 fp8_block trained")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        sys.stdout.write(json.dumps(run_one(chosen.only, chosen.dir)) + "\n")
        return
    folder = chosen.dir / f"finery-merge-{chosen.shape}"
    if not (folder / "adapter" / "adapter_config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, SHAPES[chosen.shape])
    size_bytes = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    results = dict(rows(folder, chosen.what, repeats=chosen.repeats, cold=chosen.cold))
    host = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    line = {"shape": chosen.shape, "size_bytes": size_bytes, "cold": chosen.cold, **host, "results": results}
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
