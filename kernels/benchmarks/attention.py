"""Attention at the 8B shape, 32 query and 8 key-value heads of 128: forward and backward of every backend that is there.

    python3 kernels/benchmarks/attention.py

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. 16,384 rows, causal: dense at four lengths, a pack of long samples
of different lengths, and one of short samples (lognormal, mean 138). Operations are those of the causal half, 4 d a score forward and
2.5 times that backward; the share is of a 8192³ matrix product in bf16 on the same card.

T: rows, S: sequences, H: query heads, K: key-value heads, d: head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from finery_kernels.attention import Backend, attention_backward, attention_forward
from finery_kernels.attention.backends import fa3_installed
from finery_kernels.errors import UnsupportedError
from finery_kernels.testing import random_normal

NUM_ROWS, HEADS, KV_HEADS, HEAD_DIM = 16384, 32, 8, 128
BACKENDS: tuple[Backend, ...] = ("cudnn", "flash", "fa3", "flex")
LONG_SAMPLES = (6000, 4096, 2500, 1900, 1100, 788)


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), tflop_s, and `share` of the measured matrix product."""
    ceiling_tflop_s = _gemm_tflop_s()
    dense: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        (f"{NUM_ROWS // length}x{length}", (length,) * (NUM_ROWS // length), {"lengths_equal": length})
        for length in (512, 2048, 8192, NUM_ROWS)
    ]
    packs: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("pack, long", LONG_SAMPLES, {}),
        ("pack, long, window 1024", LONG_SAMPLES, {"window": 1024}),
        ("pack, long, softcap", LONG_SAMPLES, {"softcap": 50.0}),
        ("pack, short", _short_samples(), {}),
        ("pack, short, loose bound", _short_samples(), {"max_seqlen": 4096}),
    ]
    found: list[dict[str, Any]] = []
    for (shape, lengths, options), backend in itertools.product([*dense, *packs], BACKENDS):
        if backend == "fa3" and not fa3_installed():
            continue
        deterministic = (False, True) if backend == "flash" else (False,)
        for mode in deterministic:
            found += _measured(shape, lengths, {**options, "backend": backend, "deterministic": mode}, ceiling_tflop_s)
    return found


def _measured(shape: str, lengths: tuple[int, ...], options: dict[str, Any], ceiling_tflop_s: float) -> Iterable[dict[str, Any]]:
    """Forward and backward of one backend; nothing where it does not take the case."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    row_TN = random_normal(NUM_ROWS, width, seed=1, dtype=torch.bfloat16, device="cuda")
    q_THd, k_TKd, v_TKd = row_TN.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    dout_THd = random_normal(NUM_ROWS, HEADS, HEAD_DIM, seed=2, dtype=torch.bfloat16, device="cuda")
    bounds_S = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    arguments: dict[str, Any] = {"cu_seqlens": bounds_S, "max_seqlen": max(lengths), **options}
    try:
        out_THd, lse = attention_forward(q_THd, k_TKd, v_TKd, **arguments)
    except UnsupportedError:
        return
    window = options.get("window")
    scores = sum(_scores(length, window) for length in lengths) * HEADS
    name = f"{options['backend']}{' deterministic' if options['deterministic'] else ''}"
    calls: list[tuple[str, float, Callable[[], object]]] = [
        ("forward", 4.0, lambda: attention_forward(q_THd, k_TKd, v_TKd, **arguments)),
        ("backward", 10.0, lambda: attention_backward(dout_THd, q_THd, k_TKd, v_TKd, out_THd, lse, **arguments)),
    ]
    for direction, operations, call in calls:
        ms = _median_ms(call)
        tflop_s = operations * HEAD_DIM * scores / ms / 1e9
        yield {"op": f"{name} {direction}", "shape": shape, "ms": ms, "tflop_s": tflop_s, "share": tflop_s / ceiling_tflop_s}


def _scores(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _short_samples() -> tuple[int, ...]:
    """Lengths that fill the rows: lognormal with mean 138, the last one cut to fit."""
    drawn = (random_normal(NUM_ROWS, seed=3) * 0.8 + 4.6).exp().int().clamp(min=1).tolist()
    ends = [end for end in itertools.accumulate(drawn) if end < NUM_ROWS]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends, NUM_ROWS]))


def _gemm_tflop_s() -> float:
    left, right = (random_normal(8192, 8192, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (1, 2))
    return 2 * 8192**3 / _median_ms(lambda: left @ right) / 1e9


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


def _print_table(measured: Iterable[dict[str, Any]]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"{'op':32} {'shape':26} {'ms':>9} {'TFLOP/s':>8} {'of GEMM':>8}")
    for row in measured:
        print(f"{row['op']:32} {row['shape']:26} {row['ms']:9.4f} {row['tflop_s']:8.0f} {row['share']:8.1%}")


if __name__ == "__main__":
    _print_table(rows())
