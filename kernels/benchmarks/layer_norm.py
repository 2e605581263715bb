"""LayerNorm at the 8B shape: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/layer_norm.py

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. The bytes are those of [T, D] tensors read and written once.

T: rows, D: columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.rms_norm import EPS, NUM_COLUMNS, activations, measured, print_table
from finery_kernels.layer_norm import layer_norm_backward, layer_norm_forward


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    x_TD, residual_TD, dy_TD, dresidual_TD, out_TD, sum_TD = activations(6)
    weight_D, bias_D = torch.ones(2, NUM_COLUMNS, dtype=torch.bfloat16, device="cuda")
    dweight_D, dbias_D = torch.zeros(2, NUM_COLUMNS, device="cuda")
    _, _, mean_T, rstd_T = layer_norm_forward(x_TD, weight_D, bias_D, eps=EPS)
    inputs, saved = (x_TD, weight_D, bias_D), (dy_TD, x_TD, weight_D, mean_T, rstd_T)
    added: dict[str, Any] = {"eps": EPS, "residual_TD": residual_TD, "out": out_TD, "residual_out": sum_TD}
    sums: dict[str, Any] = {"out": out_TD, "dweight_D": dweight_D, "dbias_D": dbias_D}
    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("layer_norm forward", 2, lambda: layer_norm_forward(*inputs, eps=EPS, out=out_TD)),
        ("layer_norm add forward", 4, lambda: layer_norm_forward(*inputs, **added)),
        ("layer_norm backward", 3, lambda: layer_norm_backward(*saved, out=out_TD)),
        ("layer_norm add backward", 4, lambda: layer_norm_backward(*saved, dresidual_TD=dresidual_TD, out=out_TD)),
        ("layer_norm add backward parameters", 4, lambda: layer_norm_backward(*saved, dresidual_TD=dresidual_TD, **sums)),
    ]
    return measured(cases)


if __name__ == "__main__":
    print_table(rows())
