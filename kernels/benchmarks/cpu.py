"""LoRA on a CPU: Finery's training loop beside transformers' Trainer with PEFT, on the same rows.

    make bench-cpu
    .venv/bin/python kernels/benchmarks/cpu.py [--model DIR] [--threads 2] [--steps 3] [--rounds 3]

The setting is Trainer's own: padding to a micro-batch's longest row, 2 rows a micro-batch, 4 micro-batches a step, float32, AdamW. All
seven linears have adapters of r=16, and every token is a label. Rows have lognormal lengths, 138 tokens in the mean; each engine trains
one epoch over all of them, after a step on other rows to warm up. Engines take turns, each time in a process of its own, and the
median round counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks import baselines
from benchmarks.baselines import CHECKOUT, OURS, Row
from benchmarks.train import checkout_commit, worker_environment
from benchmarks.worker import PREFIX
from benchmarks.workloads import NUM_TOKEN_IDS, IntArray, short_lengths

if TYPE_CHECKING:
    from peft import PeftModel

MODEL = ".cache/models/SmolLM2-135M-Instruct"
TRAINER = "trainer"
BATCH_SIZE, ACCUMULATION, RANK, ALPHA, LEARNING_RATE = 2, 4, 16, 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; answers its exit status."""
    parser = argparse.ArgumentParser(prog="cpu.py", description="LoRA on a CPU, beside transformers' Trainer.")
    parser.add_argument("--model", type=Path, default=CHECKOUT / MODEL, help="folder of the checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of the measured epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print the table, write no rows")
    parser.add_argument("--worker", choices=(OURS, TRAINER), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        row = _measured(options.worker, options.model, num_steps=options.steps, num_threads=options.threads)
        print(f"\n{PREFIX}{json.dumps(asdict(row))}", flush=True)
        return 0
    _ensure_model(options.model)
    rows = _compare(options)
    print(f"{baselines.table(rows)}\n{platform.processor() or platform.machine()}, {options.threads} threads, torch {rows[0].torch}")
    if not options.dry_run:
        path = baselines.file_of("cpu")
        baselines.save(path, baselines.merge(baselines.load(path), rows))
    return 0


def token_rows(num_rows: int, *, seed: int) -> list[IntArray]:
    """Random rows of the short workloads' lengths."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, NUM_TOKEN_IDS, length, dtype=np.int64) for length in short_lengths(num_rows)]


def _compare(options: argparse.Namespace) -> list[Row]:
    stamp = {
        "run_id": secrets.token_hex(4),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": checkout_commit(),
        "command": "make bench-cpu",
    }
    measured: dict[str, list[Row]] = {OURS: [], TRAINER: []}
    for _ in range(options.rounds):
        for engine, found in measured.items():
            found.append(_in_a_process(engine, options))
            print(f"{engine}: {found[-1].tok_s:,.1f} tok/s, loss {found[-1].loss}", flush=True)
    return [replace(_median(found), **stamp) for found in measured.values()]


def _median(rows: Sequence[Row]) -> Row:
    return sorted(rows, key=lambda row: row.tok_s or 0)[len(rows) // 2]


def _in_a_process(engine: str, options: argparse.Namespace) -> Row:
    command = [sys.executable, "-P", "-m", "benchmarks.cpu", "--worker", engine, "--model", str(options.model.resolve())]
    command += ["--threads", str(options.threads), "--steps", str(options.steps)]
    environment = {**worker_environment(), "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode != 0 or not found:
        raise RuntimeError(f"{engine} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Row(**json.loads(found[0].removeprefix(PREFIX)))


def _measured(engine: str, model_dir: Path, *, num_steps: int, num_threads: int) -> Row:
    import torch

    torch.set_num_threads(num_threads)
    per_step = BATCH_SIZE * ACCUMULATION
    warmup, rows = token_rows(per_step, seed=1), token_rows(per_step * num_steps, seed=2)
    train = _finery if engine == OURS else _trainer
    seconds, loss = train(model_dir, warmup, rows)
    packages = ("peft", "accelerate")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return Row(
        workload=f"cpu lora {model_dir.name.lower()} {BATCH_SIZE}x{ACCUMULATION} {num_threads} threads",
        engine=engine,
        tok_s=round(sum(map(len, rows)) / sum(seconds), 1),
        step_s=round(statistics.median(seconds), 3),
        num_steps=num_steps,
        num_warmup_steps=1,
        loss=round(loss, 4),
        gpu="cpu",
        torch=torch.__version__,
        triton=importlib.metadata.version("triton"),
        transformers=importlib.metadata.version("transformers"),
        engine_version=baselines.finery_version() if engine == OURS else versions,
    )


def _finery(model_dir: Path, warmup: list[IntArray], rows: list[IntArray]) -> tuple[list[float], float]:
    """Seconds of each step of an epoch over `rows`, and its mean loss."""
    import torch

    from benchmarks.own_loop import written
    from finery_common.spec import TrainingSpec
    from finery_trainer import engine
    from finery_trainer.engine.loop import Action, StepReport

    spec = TrainingSpec.parse(
        {
            "base_model": "benchmark",
            "lora": {"rank": RANK, "alpha": float(ALPHA)},
            "optimizer": {"type": "adamw", "learning_rate": LEARNING_RATE},
            "batch": {"micro_batch_size": BATCH_SIZE, "gradient_accumulation_steps": ACCUMULATION},
        }
    )
    model = cast("PeftModel", engine.load(spec, model_dir, device=torch.device("cpu")))
    ends_s: list[float] = []
    losses: list[float] = []

    def on_step(report: StepReport) -> Action:
        ends_s.append(time.perf_counter())
        losses.append(report.loss)
        return Action.CONTINUE

    with tempfile.TemporaryDirectory() as folder:
        engine.loop.train(model, engine.data.TokenDataset(written(Path(folder, "warmup"), warmup)), spec, on_step)
        data = engine.data.TokenDataset(written(Path(folder, "rows"), rows))
        ends_s, losses = [], []
        started_s = time.perf_counter()
        engine.loop.train(model, data, spec, on_step)
    return np.diff([started_s, *ends_s]).tolist(), statistics.fmean(losses)


def _trainer(model_dir: Path, warmup: list[IntArray], rows: list[IntArray]) -> tuple[list[float], float]:
    """The same by transformers' Trainer, with its defaults besides batch size, accumulation and rate."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(3407)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir))
    ends_s: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends_s.append(time.perf_counter())

    def train(data: list[IntArray]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                gradient_accumulation_steps=ACCUMULATION,
                learning_rate=LEARNING_RATE,
                num_train_epochs=1,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            samples = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in data])
            trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator, callbacks=[Clock()])
            return float(trainer.train().training_loss)

    train(warmup)
    ends_s.clear()
    started_s = time.perf_counter()
    loss = train(rows)
    return np.diff([started_s, *ends_s]).tolist(), loss


def _ensure_model(folder: Path) -> None:
    """Makes SmolLM2's folder of the GGUF that set-up installed, where it is missing."""
    if folder.exists():
        return
    found = sorted((CHECKOUT / ".tools" / "smollm2").rglob("*.gguf"))
    if folder != CHECKOUT / MODEL or not found:
        raise FileNotFoundError(f"{folder} does not exist; name a checkpoint's folder, or run `make setup` for SmolLM2.")
    command = [sys.executable, "-P", "-m", "finery_trainer.base_models", "import-gguf", str(found[0]), str(folder)]
    subprocess.run(command, check=True, env={**worker_environment(), "PATH": os.environ.get("PATH", "")})


if __name__ == "__main__":
    sys.exit(main())
