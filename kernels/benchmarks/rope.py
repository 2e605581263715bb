"""Rotary embedding and the heads' RMSNorm at the 8B shape: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/rope.py [--sweep]

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. `--sweep` times launch shapes, best first. The bytes are those of
the heads read and written once; tables and statistics are left out.

T: tokens, H: query heads, K: key heads, d: head dimension, N = (H + 2K)d.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.rms_norm import copy_gb_s, print_table
from finery_kernels.rope import rope_qkv_backward, rope_qkv_forward_
from finery_kernels.testing import random_normal

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16384, 32, 8, 128
NUM_COLUMNS = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
SPARE_COLUMNS = 96
"""Of the wider rows: room for the adapters' inner activations of rank 32."""
PART_HEADS = NUM_HEADS + NUM_KV_HEADS
ROW_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS

Case = tuple[str, int, Callable[[], object]]


class Inputs(NamedTuple):
    """Rows [T, N] that lie apart, contiguous gradients as attention returns them, a table, and the norm's weights and statistics."""

    qkv: Tensor
    out: Tensor
    pre: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    table: tuple[Tensor, Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    dweights: tuple[Tensor, Tensor]
    rstd: Tensor


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    x = inputs()
    shape: Any = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
    norm: Any = {"q_norm": x.weights[0], "k_norm": x.weights[1]}
    saved = norm | {"pre_TN": x.pre, "rstd_TG": x.rstd, "out_TN": x.out}
    dweights: Any = {"dq_norm": x.dweights[0], "dk_norm": x.dweights[1]}
    forward = norm | shape | {"eps": 1e-6, "rstd_out": x.rstd}
    pre_out = x.pre[:, : PART_HEADS * HEAD_DIM]
    return measured(
        [
            ("rope forward", 2 * PART_HEADS, lambda: rope_qkv_forward_(x.qkv, *x.table, **shape)),
            ("rope backward", 2 * ROW_HEADS, lambda: rope_qkv_backward(*x.gradients, *x.table, out_TN=x.out)),
            ("norm rope forward", 2 * PART_HEADS, lambda: rope_qkv_forward_(x.qkv, *x.table, **forward)),
            ("norm rope forward, pre kept", 3 * PART_HEADS, lambda: rope_qkv_forward_(x.qkv, *x.table, **forward, pre_out=pre_out)),
            ("norm rope backward", 2 * ROW_HEADS + PART_HEADS, lambda: rope_qkv_backward(*x.gradients, *x.table, **saved)),
            (
                "norm rope backward dweight",
                2 * ROW_HEADS + PART_HEADS,
                lambda: rope_qkv_backward(*x.gradients, *x.table, **saved, **dweights),
            ),
        ]
    )


def sweep() -> list[dict[str, Any]]:
    """Launch shapes, by rate."""
    from finery_kernels.rope import triton as kernels

    x = inputs()
    heads = tuple(part.unflatten(1, (-1, HEAD_DIM)) for part in _parts(x.qkv))
    targets = tuple(part.unflatten(1, (-1, HEAD_DIM)) for part in _parts(x.out))
    pre = tuple(part.unflatten(1, (-1, HEAD_DIM)) for part in _parts(x.pre)[:2])
    norm: Any = {"norm_offset": 0.0, "rstd_TG": x.rstd}
    cases: list[Case] = []
    for tile in (256, 512, 1024, 2048):
        for pairs_per_thread in (4, 8, 16):
            launch: Any = {"launch": kernels.Launch(tile=tile, pairs_per_thread=pairs_per_thread)}

            def forward(launch: Any = launch) -> None:
                kernels.rotate(heads[:2], heads[:2], x.table, inverse=False, **launch)

            def backward(launch: Any = launch) -> None:
                kernels.rotate(x.gradients, targets, x.table, inverse=True, **launch)

            def norm_backward(launch: Any = launch) -> None:
                kernels.norm_rotate_backward(x.gradients, pre, targets, x.weights, x.table, **norm, **launch)

            name = f"tile {tile}, {pairs_per_thread} a thread"
            cases += [(f"forward {name}", 2 * PART_HEADS, forward), (f"backward {name}", 2 * ROW_HEADS, backward)]
            cases.append((f"norm backward {name}", 2 * ROW_HEADS + PART_HEADS, norm_backward))
    for programs, registers in ((4, 255), (6, 168), (8, 128), (12, 168)):
        launch = {"launch": kernels.Launch(programs_per_sm=programs, max_registers=registers), "dweights": x.dweights}

        def dweight(launch: Any = launch) -> None:
            kernels.norm_rotate_backward(x.gradients, pre, targets, x.weights, x.table, **norm, **launch)

        cases.append((f"dweight {programs} programs, {registers} registers", 2 * ROW_HEADS + PART_HEADS, dweight))
    return sorted(measured(cases), key=lambda row: -row["gb_s"])


def inputs() -> Inputs:
    """Random inputs at the 8B shape, positions of packed sequences of 2,048 tokens."""
    qkv, out, pre = (_noise(NUM_COLUMNS, SPARE_COLUMNS) for _ in range(3))
    dq, dk, dv = (_noise(n * HEAD_DIM, 0).unflatten(1, (n, HEAD_DIM)) for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    angles = torch.outer(torch.arange(8192), 5e5 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))).repeat(1, 2)
    positions = (torch.arange(NUM_TOKENS) % 2048).to(torch.int32)
    ones, zeros = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device="cuda"), torch.zeros(HEAD_DIM, device="cuda")
    rstd = torch.ones(NUM_TOKENS, PART_HEADS, device="cuda")
    table = (angles.cos().cuda(), angles.sin().cuda(), positions.cuda())
    return Inputs(qkv, out, pre, (dq, dk, dv), table, (ones, ones), (zeros, zeros.clone()), rstd)


def measured(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Median times of cases (op, how many heads a token it moves, call)."""
    ceiling_gb_s = copy_gb_s()
    found: list[dict[str, Any]] = []
    for op, num_heads, call in cases:
        ms = _median_ms(call)
        gb_s = num_heads * HEAD_DIM * NUM_TOKENS * 2 / ms / 1e6
        found.append({"op": op, "shape": f"{NUM_TOKENS}x{NUM_COLUMNS} bf16", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s})
    return found


def _parts(rows_TN: Tensor) -> tuple[Tensor, ...]:
    return rows_TN.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], dim=1)


def _noise(num_columns: int, spare_columns: int) -> Tensor:
    few = random_normal(64, num_columns + spare_columns, seed=1, dtype=torch.bfloat16, device="cuda")
    return few.repeat(NUM_TOKENS // 64, 1)[:, :num_columns]


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rotary embedding and the heads' RMSNorm at the 8B shape.")
    parser.add_argument("--sweep", action="store_true", help="launch shapes")
    print_table(sweep() if parser.parse_args().sweep else rows())
