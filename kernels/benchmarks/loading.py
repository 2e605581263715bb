"""How long an engine takes to load a model for training, and how much memory, in a process that has loaded none before.

Imports, the CUDA context and reading the files from disk come beforehand: the clock sees what the engine does with them.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import torch

from benchmarks.baselines import OURS, Row
from benchmarks.measure import peaks_gib, reset_peaks, synchronize
from benchmarks.workloads import Workload

_PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")
_PIECE_BYTES = 64 << 20


def measured(engine: str, workload: Workload, model_dir: Path) -> Row:
    """Seconds until the model is there with its adapters, ready to train, and the allocator's peaks until then."""
    _import_packages(engine, model_dir)
    _read_files(model_dir)
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    reset_peaks()
    synchronize()
    started_s = time.perf_counter()
    model = _load(engine, workload, model_dir)
    synchronize()
    seconds = time.perf_counter() - started_s
    assert any(parameter.requires_grad for parameter in model.parameters())
    allocated, reserved = peaks_gib()
    return Row(workload=workload.name, engine=engine, load_s=round(seconds, 2), peak_alloc_gib=allocated, peak_reserved_gib=reserved)


def _load(engine: str, workload: Workload, model_dir: Path) -> torch.nn.Module:
    if engine == OURS:
        from benchmarks import finery_engine

        return finery_engine.load(workload, model_dir)
    from benchmarks import peer_engines

    return peer_engines.load(engine, workload.method, model_dir, max_sequence_length=workload.sequence_length)


def _import_packages(engine: str, model_dir: Path) -> None:
    """What loading would import. Unsloth's has been, before everything else."""
    kind = json.loads((model_dir / "config.json").read_text())["model_type"]
    ours = ("benchmarks.finery_engine", "finery_trainer.engine") if engine == OURS else ("benchmarks.peer_engines",)
    theirs = ("liger_kernel.transformers",) if engine == "liger" else ()
    for name in (*_PACKAGES, f"transformers.models.{kind}.modeling_{kind}", *theirs, *ours):
        importlib.import_module(name)


def _read_files(model_dir: Path) -> None:
    """Brings the weights into the page cache."""
    buffer = bytearray(_PIECE_BYTES)
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
