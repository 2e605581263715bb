"""What is measured: workloads by name, the token ids they train on, and the memory they may take.

    qlora 2x2048x4               batch x tokens x gradient accumulation; `qlora 1x8192` where nothing is accumulated
    qlora 2x2048x4 equal-memory  the same for Finery, held to the memory that the leanest peer takes
    qlora 2x2048x4 deterministic the same for Finery, in its deterministic mode
    qlora 2x2048x8 gpus2         the same for Finery, on two GPUs
    qlora short 2x4              rows of lognormal length, 2 a micro-batch, 4 micro-batches a step; `packing` fills rows of 2,048
    context qlora 24             the longest row that trains on a card of 24 GiB; `context qlora 24 100000` begins at that length
    load qlora                   how long loading takes, and how much memory

Owns names and data; knows no engine and imports no torch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Kind = Literal["fixed", "short", "context", "load"]

METHODS = ("qlora", "lora", "fft")
NUM_TOKEN_IDS = 49152
"""Random token ids are below this, whatever the model's vocabulary."""
PACKED_TOKENS = 2048
"""Length that short rows are packed to."""
SHORT_GIB = 16.0
"""What Finery may allocate for short rows: their target is set at this much."""
RESERVED_GIB = 0.75
"""What the CUDA context and its libraries take of a card, beside the allocator's memory."""

# Peak of allocated memory of the leanest peer (Unsloth 2026.10.9, one H200, Llama-3.1-8B's shape, r=32 on all seven linears), in GiB.
PEER_PEAK_GIB = {
    "qlora 2x2048x4": 7.27,
    "qlora 1x8192": 8.25,
    "qlora 1x32768": 14.3,
    "qlora 1x131072": 39.4,
    "qlora short 2x4": 6.65,
    "lora 2x2048x4": 16.9,
    "lora 1x8192": 17.9,
    "lora 1x32768": 23.9,
    "fft 2x2048x2": 47.4,
    "fft 1x8192": 45.5,
}
# Unsloth's published longest contexts, Llama-3.1-8B QLoRA r=32: where a search begins.
PUBLISHED_CONTEXT = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733}

CONTEXT_STEP, LONGEST_CONTEXT = 1024, 1_048_576
"""Between which lengths a search goes; the latter is a spec's limit."""

MEAN_SHORT_TOKENS, SHORT_SIGMA, MAX_SHORT_TOKENS = 138, 0.7, 1500
_WORDS = (
    "air",
    "book",
    "city",
    "door",
    "earth",
    "fire",
    "game",
    "head",
    "idea",
    "land",
    "mind",
    "night",
    "order",
    "power",
    "road",
    "water",
)
EQUAL_MEMORY, DETERMINISTIC = "equal-memory", "deterministic"
_VARIANT = r"(?: (equal-memory|deterministic|gpus[1-9]\d*))?"
_FIXED = re.compile(rf"(qlora|lora|fft) (\d+)x(\d+)(?:x(\d+))?{_VARIANT}")
_SHORT = re.compile(r"(qlora|lora|fft) short (\d+)x(\d+)( packing)?(?: (equal-memory))?")
_CONTEXT = re.compile(r"context (qlora|lora|fft) (\d+)(?: (\d+))?")
_LOAD = re.compile(r"load (qlora|lora|fft)")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One row of the table, for any engine. `sequence_length` of short workloads is the longest row they may see, of contexts where the
    search begins."""

    kind: Kind
    method: str
    batch_size: int
    sequence_length: int
    accumulation: int
    variant: str = ""
    """How Finery does it, of what peers do in one way: `equal-memory`, `deterministic`, `gpus2`."""
    is_packed: bool = False
    card_gib: int | None = None

    @property
    def name(self) -> str:
        """The canonical name, which `parse` reads back."""
        if self.kind == "load":
            return f"load {self.method}"
        if self.kind == "context":
            assert self.card_gib is not None
            start = "" if self.sequence_length == _start_of(self.card_gib) else f" {self.sequence_length}"
            return f"context {self.method} {self.card_gib}{start}"
        if self.kind == "short":
            name = f"{self.method} short {self.batch_size}x{self.accumulation}" + (" packing" if self.is_packed else "")
        else:
            name = f"{self.method} {self.batch_size}x{self.sequence_length}" + (f"x{self.accumulation}" if self.accumulation > 1 else "")
        return name + (f" {self.variant}" if self.variant else "")

    @property
    def base(self) -> Workload:
        """The same work as peers do it: without a limit on memory, and in a search from where the card's begins."""
        start = self.sequence_length if self.card_gib is None else _start_of(self.card_gib)
        return replace(self, variant="", sequence_length=start)

    @property
    def num_gpus(self) -> int | None:
        """GPUs of a run through Finery's own training loop; None: steps on one GPU, which the benchmark drives."""
        return int(self.variant.removeprefix("gpus")) if self.variant.startswith("gpus") else None

    @property
    def on_one_gpu(self) -> Workload:
        """What a run on several GPUs is compared with."""
        return replace(self, variant="gpus1")

    @property
    def process(self) -> str:
        """Workloads of one method that differ in it are measured in processes of their own."""
        return self.kind if self.kind in ("context", "load") else "gpus" if self.num_gpus else ""

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Of a fixed or a context workload."""
        return self.rows_per_step * self.sequence_length

    @property
    def budget_gib(self) -> float | None:
        """Memory that Finery may allocate; None: what the card has."""
        if self.card_gib is not None:
            return self.card_gib - RESERVED_GIB
        if self.variant == EQUAL_MEMORY:
            return PEER_PEAK_GIB[self.base.name]
        return SHORT_GIB if self.kind == "short" else None

    @property
    def num_steps(self) -> tuple[int, int]:
        """(warm-up, measured): fewer where a step is long."""
        if self.kind == "short":
            return 10, 25
        return (3, 5) if self.tokens_per_step <= 16384 else (2, 3) if self.tokens_per_step <= 32768 else (1, 3)


def parse(text: str) -> Workload:
    """The workload that `text` names. Raises ValueError that says what was wanted."""
    name = " ".join(text.split())
    if match := _FIXED.fullmatch(name):
        workload = _fixed(match)
    elif match := _SHORT.fullmatch(name):
        workload = _short(match)
    elif match := _CONTEXT.fullmatch(name):
        workload = _context(match)
    elif match := _LOAD.fullmatch(name):
        workload = Workload(kind="load", method=match[1], batch_size=1, sequence_length=PACKED_TOKENS, accumulation=1)
    else:
        raise ValueError(f"workload: got {text!r}; wanted such as 'qlora 2x2048x4 equal-memory', 'qlora short 2x4' or 'context qlora 24'.")
    return _checked(workload)


def parse_all(text: str) -> list[Workload]:
    """The workloads of a comma-separated list, each once. Raises ValueError where one is none or the list is empty."""
    found = list(dict.fromkeys(parse(part) for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError("workloads: got none; wanted such as 'qlora 2x2048x4,lora 1x8192'.")
    return found


def token_rows(workload: Workload, step: int) -> list[IntArray]:
    """The random rows of step `step` of a fixed or context workload: the same for every engine."""
    generator = np.random.default_rng([3407, step])
    ids = generator.integers(0, NUM_TOKEN_IDS, (workload.rows_per_step, workload.sequence_length), dtype=np.int64)
    return list(ids)


def short_texts(num_texts: int) -> list[str]:
    """Texts of lognormal length, `MEAN_SHORT_TOKENS` words in the mean, of words that are one token in most vocabularies."""
    generator = random.Random(3407)
    return [" ".join(generator.choices(_WORDS, k=length)) for length in short_lengths(num_texts)]


def short_lengths(num_rows: int) -> list[int]:
    """Lognormal lengths as of instruction data, `MEAN_SHORT_TOKENS` in the mean; the same ones for the same number."""
    generator = random.Random(3407)
    mu = math.log(MEAN_SHORT_TOKENS) - SHORT_SIGMA**2 / 2
    return [min(MAX_SHORT_TOKENS, max(8, round(generator.lognormvariate(mu, SHORT_SIGMA)))) for _ in range(num_rows)]


def short_steps(rows: Sequence[IntArray], workload: Workload, num_steps: int) -> list[list[IntArray]]:
    """`rows` in order, as the rows of `num_steps` steps; they begin anew at their end.

    Packed, a step holds as many whole rows as fit `rows_per_step` packs of `PACKED_TOKENS`.
    """
    steps: list[list[IntArray]] = [[]]
    position = 0
    while len(steps) <= num_steps:
        row = rows[position % len(rows)]
        if steps[-1] and _is_full(steps[-1], row, workload):
            steps.append([])
            continue
        steps[-1].append(row)
        position += 1
    return steps[:num_steps]


def _fixed(match: re.Match[str]) -> Workload:
    return Workload(
        kind="fixed",
        method=match[1],
        batch_size=int(match[2]),
        sequence_length=int(match[3]),
        accumulation=int(match[4] or 1),
        variant=match[5] or "",
    )


def _short(match: re.Match[str]) -> Workload:
    return Workload(
        kind="short",
        method=match[1],
        batch_size=int(match[2]),
        sequence_length=PACKED_TOKENS,
        accumulation=int(match[3]),
        is_packed=bool(match[4]),
        variant=match[5] or "",
    )


def _context(match: re.Match[str]) -> Workload:
    card_gib = int(match[2])
    start = int(match[3] or _start_of(card_gib))
    return Workload(kind="context", method=match[1], batch_size=1, sequence_length=start, accumulation=1, card_gib=card_gib)


def _start_of(card_gib: int) -> int:
    """Where a search begins unless it is said: what Unsloth publishes for the card, or about that."""
    return PUBLISHED_CONTEXT.get(card_gib) or max(1024, 4400 * (card_gib - 7))


def _is_full(step: Sequence[IntArray], row: IntArray, workload: Workload) -> bool:
    if not workload.is_packed:
        return len(step) == workload.rows_per_step
    return sum(map(len, step)) + len(row) > workload.rows_per_step * PACKED_TOKENS


def _checked(workload: Workload) -> Workload:
    if min(workload.batch_size, workload.sequence_length, workload.accumulation) < 1 or workload.sequence_length < 2:
        raise ValueError(f"workload: got {workload.name!r}; wanted at least one row of two tokens.")
    if workload.num_gpus and workload.method == "fft":
        raise ValueError(f"workload: got {workload.name!r}; several GPUs train adapters only.")
    if workload.variant == EQUAL_MEMORY and workload.base.name not in PEER_PEAK_GIB:
        raise ValueError(f"workload: no peer's memory is known for {workload.base.name!r}; it is for {', '.join(PEER_PEAK_GIB)}.")
    if workload.card_gib is not None and workload.card_gib <= 1:
        raise ValueError(f"workload: got a card of {workload.card_gib} GiB; wanted 2 or more.")
    if workload.kind == "context" and not CONTEXT_STEP <= workload.sequence_length <= LONGEST_CONTEXT:
        wanted = f"{CONTEXT_STEP} to {LONGEST_CONTEXT}"
        raise ValueError(f"workload: got a search from {workload.sequence_length} tokens; wanted {wanted}.")
    return workload
