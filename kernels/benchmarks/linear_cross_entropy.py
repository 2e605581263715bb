"""Cross-entropy through the head's weight at the 8B shape: time, TFLOP/s and memory, by rows of a tile.

    python3 kernels/benchmarks/linear_cross_entropy.py

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. FLOP are those of the products with the weight: two, or three with
the weight's gradient. `share` is of the card's own speed at the first product alone. Memory is the peak beyond inputs and results.

T: rows, D: hidden size, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from finery_kernels.linear_cross_entropy import linear_cross_entropy_forward_backward

NUM_ROWS, HIDDEN, NUM_CLASSES = 16384, 4096, 128256
TILES = (512, 1024, 2048, 4096)


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), tflop_s, `share` of the measured product, and extra_gib."""
    h_TD = torch.randn(NUM_ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    weight_VD = torch.randn(NUM_CLASSES, HIDDEN, dtype=torch.bfloat16, device="cuda") * HIDDEN**-0.5
    targets_T = torch.randint(NUM_CLASSES, (NUM_ROWS,), device="cuda")
    grad_scale, out_TD = torch.full((1,), 1e-4, device="cuda"), torch.empty_like(h_TD)
    rows_L = torch.arange(0, NUM_ROWS, 4, device="cuda")
    ceiling_tflop_s = product_tflop_s(h_TD[:4096], weight_VD)

    def head(tile_rows: int, **options: Any) -> Callable[[], object]:
        targets_L = targets_T[options["rows_L"]] if "rows_L" in options else targets_T
        options |= {"grad_scale": grad_scale, "out_dh": out_TD, "tile_rows": tile_rows}
        return lambda: linear_cross_entropy_forward_backward(h_TD, weight_VD, targets_L, **options)

    cases = [(f"tiles of {tile_rows}", NUM_ROWS, 2, head(tile_rows)) for tile_rows in TILES]
    cases.append(("a quarter of the rows, tiles of 1024", NUM_ROWS // 4, 2, head(1024, rows_L=rows_L)))
    dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    cases += [(f"fp32 dweight, tiles of {tile_rows}", NUM_ROWS, 3, head(tile_rows, dweight_VD=dweight_VD)) for tile_rows in (1024, 4096)]
    return [_row(*case, ceiling_tflop_s=ceiling_tflop_s) for case in cases]


def product_tflop_s(h_TD: Tensor, weight_VD: Tensor) -> float:
    """h @ weight.T to fp32, as the tiles have it, on its own."""
    logits_TV = torch.empty(h_TD.shape[0], weight_VD.shape[0], device="cuda")
    ms = _median_ms(lambda: torch.mm(h_TD, weight_VD.T, out_dtype=torch.float32, out=logits_TV))
    return 2 * logits_TV.numel() * HIDDEN / ms / 1e9


def _row(op: str, num_rows: int, num_products: int, call: Callable[[], object], *, ceiling_tflop_s: float) -> dict[str, Any]:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    extra_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    ms = _median_ms(call)
    tflop_s = 2 * num_products * num_rows * HIDDEN * NUM_CLASSES / ms / 1e9
    shape = f"{num_rows}x{HIDDEN}x{NUM_CLASSES}"
    return {"op": op, "shape": shape, "ms": ms, "tflop_s": tflop_s, "share": tflop_s / ceiling_tflop_s, "extra_gib": extra_gib}


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


def print_table(measured_rows: Iterable[dict[str, Any]]) -> None:
    """One line a row, under the card's name and the versions."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'op':38} {'shape':20} {'ms':>9} {'TFLOP/s':>8} {'of mm':>7} {'GiB':>6}")
    for row in measured_rows:
        print(f"{row['op']:38} {row['shape']:20} {row['ms']:9.3f} {row['tflop_s']:8.0f} {row['share']:7.1%} {row['extra_gib']:6.2f}")


if __name__ == "__main__":
    print_table(rows())
