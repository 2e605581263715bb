"""Short rows through TRL's SFTTrainer with its own defaults for batching, which is how peers train them; and the same rows for us."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.baselines import Row
from benchmarks.measure import Engine, Steps, row_of, synchronize, timed
from benchmarks.peer_engines import LEARNING_RATE, PeerEngine
from benchmarks.workloads import PACKED_TOKENS, IntArray, Workload, short_steps, short_texts

NUM_TEXTS = 2000
LOGGED_STEPS = 5
"""Steps that one of a row's `losses` is the mean of."""


def short(engine: Engine, workload: Workload, *, num_steps: tuple[int, int]) -> Row:
    """Short rows through an engine that takes rows. Speed is the mean of a step's tokens over the median step, as for peers."""
    warmup, measured = num_steps
    rows = _tokenized(engine)
    batches = short_steps(rows, workload, warmup + measured)
    engine.prepare(workload)
    steps = timed(engine, batches, num_warmup=warmup)
    tokens_per_step = statistics.fmean(sum(map(len, batch)) for batch in short_steps(rows, workload, 200))
    row = row_of(engine.name, workload, steps, tokens_per_step=tokens_per_step)
    return replace(row, losses=means_of(steps.losses))


def means_of(losses: Sequence[float]) -> list[float]:
    """The means of `LOGGED_STEPS` losses each, as Trainer logs them; what is left over at the end is left out."""
    whole = len(losses) // LOGGED_STEPS * LOGGED_STEPS
    return [round(statistics.fmean(losses[start : start + LOGGED_STEPS]), 4) for start in range(0, whole, LOGGED_STEPS)]


def short_by_trl(engine: PeerEngine, workload: Workload, *, num_steps: tuple[int, int]) -> Row:
    """The same texts through TRL's SFTTrainer. Imported here, since Unsloth has to be imported before TRL."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # where Unsloth puts its own

    warmup, measured = num_steps
    clock = _clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=workload.batch_size,
            gradient_accumulation_steps=workload.accumulation,
            max_steps=warmup + measured,
            max_length=PACKED_TOKENS,
            packing=workload.is_packed,
            bf16=True,
            use_cpu=engine.device.type == "cpu",
            optim="adamw_8bit",
            learning_rate=LEARNING_RATE,
            # The same rows in the same order at the same rate for every engine: losses can be compared step by step.
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=LOGGED_STEPS,
            save_strategy="no",
            report_to="none",
            dataset_text_field="text",
            seed=3407,
        )
        trainer = SFTTrainer(
            model=engine.model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": short_texts(NUM_TEXTS)}),
            processing_class=AutoTokenizer.from_pretrained(engine.model_dir),
            callbacks=[clock],
        )
        mean_loss = trainer.train().training_loss
    assert trainer.train_dataset is not None
    logged = [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]
    mean_tokens = statistics.fmean(len(row) for row in trainer.train_dataset["input_ids"])
    steps = Steps(clock.seconds[warmup:], logged or [mean_loss], warmup)
    row = row_of(engine.name, workload, steps, tokens_per_step=mean_tokens * workload.rows_per_step)
    return replace(row, losses=logged)


def _tokenized(engine: Engine) -> list[IntArray]:
    """The texts with an end-of-sequence token each, as TRL makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    return [np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in tokenizer(short_texts(NUM_TEXTS))["input_ids"]]


def _clock() -> Any:
    """A callback that times every step, with the GPU waited for at both ends."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._started_s = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self._started_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self._started_s)

    return Clock()
