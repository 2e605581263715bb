"""LoRA projections at the 8B shape, r=32: time and TFLOP/s of the products, and what the adapters add to those of the base weights alone.

    python3 kernels/benchmarks/lora.py

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU.

T: rows, K: inputs, N: outputs of all members, R: their ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

from finery_kernels.lora import Adapter, StackedLayout, lora_backward_adapters, lora_backward_input, lora_down, lora_forward
from finery_kernels.testing import random_normal

NUM_ROWS = 16384
LAYOUTS = {
    "q/k/v": StackedLayout(4096, (4096, 1024, 1024), (32, 32, 32)),
    "o": StackedLayout(4096, (4096,), (32,)),
    "gate/up": StackedLayout(4096, (14336, 14336), (32, 32)),
    "down": StackedLayout(14336, (4096,), (32,)),
}


def rows() -> list[dict[str, Any]]:
    """One dict a projection and pass: op, shape, ms (median), tflop_s, and `over_base`, the time over that of the base product alone."""
    return [row for name, layout in LAYOUTS.items() for row in measured(name, layout)]


def measured(name: str, layout: StackedLayout) -> list[dict[str, Any]]:
    """Forward, backward to the input, and the adapters' gradients of one projection."""
    num_inputs, num_outputs = layout.in_features, layout.num_outputs
    weight_ext = random_normal(*layout.shape, seed=1, dtype=torch.bfloat16, device="cuda", scale=0.02)
    x_ext = random_normal(NUM_ROWS, layout.shape[1], seed=2, dtype=torch.bfloat16, device="cuda")
    dy_ext = random_normal(NUM_ROWS, layout.shape[0], seed=3, dtype=torch.bfloat16, device="cuda")
    x_TK, xa_TR, weight_NK = x_ext[:, :num_inputs], x_ext[:, num_inputs:], weight_ext[:num_outputs, :num_inputs]
    y_TN, dx_TK = torch.empty_like(dy_ext[:, :num_outputs]), torch.empty_like(x_TK)
    grads = [
        Adapter(torch.zeros(r, num_inputs, device="cuda"), torch.zeros(n, r, device="cuda"), 1.0)
        for n, r in zip(layout.out_features, layout.ranks, strict=True)
    ]

    def forward() -> None:
        lora_down(x_TK, weight_ext, layout, out=xa_TR)
        lora_forward(x_ext, weight_ext, layout, out=y_TN)

    cases: list[tuple[str, Callable[[], object], Callable[[], object] | None]] = [
        ("forward", forward, lambda: torch.mm(x_TK, weight_NK.T, out=y_TN)),
        ("backward", lambda: lora_backward_input(dy_ext, weight_ext, layout, out=dx_TK), lambda: torch.mm(y_TN, weight_NK, out=dx_TK)),
        ("adapters", lambda: lora_backward_adapters(dy_ext, x_TK, xa_TR, layout, grads), None),
    ]
    flop = 2 * NUM_ROWS * num_inputs * num_outputs
    table: list[dict[str, Any]] = []
    for each, run, base in cases:
        ms = _median_ms(run)
        row = {"op": f"{name} {each}", "shape": f"{NUM_ROWS}x{num_inputs}x{num_outputs}", "ms": ms}
        if base is not None:
            row |= {"tflop_s": flop / ms / 1e9, "over_base": ms / _median_ms(base)}
        table.append(row)
    return table


def _median_ms(call: Callable[[], object]) -> float:
    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for row in rows():
        speed = f"{row['tflop_s']:8.0f} TFLOP/s {row['over_base']:6.3f} x base" if "tflop_s" in row else ""
        print(f"{row['op']:20} {row['shape']:20} {row['ms']:8.4f} ms {speed}")
