"""SwiGLU and GEGLU at the 8B shape: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/glu.py [--sweep]

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. `--sweep` times launch shapes of SwiGLU, best first. The bytes are
those of [T, F] tensors read and written once.

T: rows, F: columns of the activation, N = 2F.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rms_norm import copy_gb_s, print_table
from finery_kernels.glu import glu_backward, glu_forward
from finery_kernels.testing import random_normal

NUM_ROWS, NUM_COLUMNS = 16384, 14336
SPARE_COLUMNS = {"gate_up": 96, "act": 32}
"""Of the wider buffers whose views are passed: room for the adapters' inner activations of rank 32."""

Case = tuple[str, int, Callable[[], object]]


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    gate_up_TN, act_TF, dact_TF, again_TF = buffers()
    spoilt_TN = gate_up_TN.clone()
    cases: list[Case] = []
    for activation in ("silu", "gelu_tanh", "gelu"):
        options: Any = {"activation": activation}

        def forward(options: Any = options) -> Tensor:
            return glu_forward(gate_up_TN, **options, out=act_TF)

        def backward(options: Any = options) -> Tensor:
            return glu_backward(dact_TF, gate_up_TN, **options, out=spoilt_TN)

        def backward_again(options: Any = options) -> Tensor:
            return glu_backward(dact_TF, gate_up_TN, **options, out=spoilt_TN, act_out=again_TF)

        cases += [(f"{activation} forward", 3, forward), (f"{activation} backward", 5, backward)]
        cases.append((f"{activation} backward, act again", 6, backward_again))
    return measured(cases, ceiling_gb_s=copy_gb_s())


def sweep() -> list[dict[str, Any]]:
    """Launch shapes of SwiGLU, by time."""
    from finery_kernels.glu.triton import Launch
    from finery_kernels.glu.triton import glu_backward as launch_backward
    from finery_kernels.glu.triton import glu_forward as launch_forward

    gate_up_TN, act_TF, dact_TF, _ = buffers()
    spoilt_TN = gate_up_TN.clone()
    cases: list[Case] = []
    for block in (1024, 2048, 4096):
        for columns_per_thread in (8, 16, 32):
            options: Any = {"activation": "silu", "launch": Launch(block, columns_per_thread)}

            def forward(options: Any = options) -> Tensor:
                return launch_forward(gate_up_TN, **options, out=act_TF)

            def backward(options: Any = options) -> Tensor:
                return launch_backward(dact_TF, gate_up_TN, **options, out=spoilt_TN)

            name = f"block {block}, {columns_per_thread} a thread"
            cases += [(f"forward {name}", 3, forward), (f"backward {name}", 5, backward)]
    return sorted(measured(cases, ceiling_gb_s=copy_gb_s()), key=lambda row: -row["gb_s"])


def buffers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up and three activations, in bf16, as views of wider rows."""
    gate_up_TN = _noise(2 * NUM_COLUMNS, SPARE_COLUMNS["gate_up"])
    act_TF, dact_TF, again_TF = (_noise(NUM_COLUMNS, SPARE_COLUMNS["act"]) for _ in range(3))
    return gate_up_TN, act_TF, dact_TF, again_TF


def measured(cases: Iterable[Case], *, ceiling_gb_s: float) -> list[dict[str, Any]]:
    """Median times of cases (op, how many [T, F] tensors it moves, call)."""
    found: list[dict[str, Any]] = []
    for op, num_tensors, call in cases:
        ms = _median_ms(call)
        gb_s = num_tensors * NUM_ROWS * NUM_COLUMNS * 2 / ms / 1e6
        found.append({"op": op, "shape": f"{NUM_ROWS}x{NUM_COLUMNS} bf16", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s})
    return found


def _noise(num_columns: int, spare_columns: int) -> Tensor:
    few = random_normal(64, num_columns + spare_columns, seed=1, dtype=torch.bfloat16, device="cuda")
    return few.repeat(NUM_ROWS // 64, 1)[:, :num_columns]


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="SwiGLU and GEGLU at the 8B shape.")
    parser.add_argument("--sweep", action="store_true", help="launch shapes of SwiGLU")
    print_table(sweep() if parser.parse_args().sweep else rows())
