"""RMSNorm at the 8B shape: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/rms_norm.py [--sweep]

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. `--sweep` times launch shapes of the backward with the weight's
gradient, best first. The bytes are those of [T, D] tensors read and written once; what layer_norm shares is public.

T: rows, D: columns, P: programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from finery_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from finery_kernels.testing import random_normal

NUM_ROWS, NUM_COLUMNS, EPS = 16384, 4096, 1e-5
SPARE_COLUMNS = 64
"""Of the wider buffers whose views the strided row passes."""


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    x_TD, residual_TD, dy_TD, dresidual_TD, out_TD, sum_TD = activations(6)
    weight_D, dweight_D = torch.ones(NUM_COLUMNS, dtype=torch.bfloat16, device="cuda"), torch.zeros(NUM_COLUMNS, device="cuda")
    _, _, rstd_T = rms_norm_forward(x_TD, weight_D, eps=EPS)
    wide_TD, wide_out_TD, wide_sum_TD = activations(3, spare_columns=SPARE_COLUMNS)
    added: dict[str, Any] = {"eps": EPS, "residual_TD": residual_TD}
    saved = (dy_TD, x_TD, weight_D, rstd_T)
    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("rms_norm forward", 2, lambda: rms_norm_forward(x_TD, weight_D, eps=EPS, out=out_TD)),
        ("rms_norm add forward", 4, lambda: rms_norm_forward(x_TD, weight_D, **added, out=out_TD, residual_out=sum_TD)),
        (
            "rms_norm add forward strided",
            4,
            lambda: rms_norm_forward(wide_TD, weight_D, **added, out=wide_out_TD, residual_out=wide_sum_TD),
        ),
        ("rms_norm backward", 3, lambda: rms_norm_backward(*saved, out=out_TD)),
        ("rms_norm add backward", 4, lambda: rms_norm_backward(*saved, dresidual_TD=dresidual_TD, out=out_TD)),
        ("rms_norm backward dweight", 3, lambda: rms_norm_backward(*saved, out=out_TD, dweight_D=dweight_D)),
        (
            "rms_norm add backward dweight",
            4,
            lambda: rms_norm_backward(*saved, dresidual_TD=dresidual_TD, out=out_TD, dweight_D=dweight_D),
        ),
    ]
    return measured(cases)


def sweep() -> list[dict[str, Any]]:
    """Launch shapes of the backward with residual and weight gradient, without the sum over programs, by time."""
    from finery_kernels.rms_norm.triton import backward_dweight_kernel

    dy_TD, s_TD, dresidual_TD, dx_TD = activations(4)
    weight_D = torch.ones(NUM_COLUMNS, dtype=torch.bfloat16, device="cuda")
    rstd_T = torch.ones(NUM_ROWS, device="cuda")
    strides = [NUM_COLUMNS] * 4
    found: list[dict[str, Any]] = []
    for num_warps in (4, 8, 16):
        for stages in (1, 2, 3, 4):
            for per_multiprocessor in (1, 2, 3, 4):
                num_programs = per_multiprocessor * torch.cuda.get_device_properties(0).multi_processor_count
                tensors = (dy_TD, s_TD, weight_D, rstd_T, dresidual_TD, dx_TD, torch.empty(num_programs, NUM_COLUMNS, device="cuda"))
                sizes = (*strides, NUM_ROWS, 0.0, NUM_COLUMNS, NUM_COLUMNS, stages)
                options = {"num_warps": num_warps, "enable_fp_fusion": True}

                def launch(tensors: Any = tensors, sizes: Any = sizes, options: Any = options, grid: Any = (num_programs,)) -> None:
                    backward_dweight_kernel[grid](*tensors, *sizes, **options)

                name = f"warps {num_warps} stages {stages} programs {per_multiprocessor}/SM"
                found += measured([(name, 4, launch)], ceiling_gb_s=1.0)
    return sorted(found, key=lambda row: row["ms"])


def activations(count: int, *, spare_columns: int = 0) -> Iterable[Tensor]:
    """`count` random activations [T, D] in bf16 as views of rows `D + spare_columns` long."""
    seed_TD = random_normal(64, NUM_COLUMNS + spare_columns, seed=1, dtype=torch.bfloat16, device="cuda").repeat(NUM_ROWS // 64, 1)
    return tuple((seed_TD * (1 + index / 8))[:, :NUM_COLUMNS] for index in range(count))


def measured(cases: Iterable[tuple[str, int, Callable[[], object]]], *, ceiling_gb_s: float | None = None) -> list[dict[str, Any]]:
    """Median times of cases (op, how many [T, D] tensors it moves, call)."""
    ceiling_gb_s = ceiling_gb_s or copy_gb_s()
    found: list[dict[str, Any]] = []
    for op, num_tensors, call in cases:
        ms = _median_ms(call)
        gb_s = num_tensors * NUM_ROWS * NUM_COLUMNS * 2 / ms / 1e6
        found.append({"op": op, "shape": f"{NUM_ROWS}x{NUM_COLUMNS} bf16", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s})
    return found


def copy_gb_s() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / _median_ms(lambda: target.copy_(source)) / 1e6


def print_table(measured_rows: Iterable[dict[str, Any]]) -> None:
    """One line a row, under the card's name and the versions."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'op':36} {'shape':20} {'ms':>8} {'GB/s':>8} {'of copy':>8}")
    for row in measured_rows:
        print(f"{row['op']:36} {row['shape']:20} {row['ms']:8.4f} {row['gb_s']:8.0f} {row['share']:8.1%}")


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="RMSNorm at the 8B shape.")
    parser.add_argument("--sweep", action="store_true", help="launch shapes of the backward with the weight's gradient")
    print_table(sweep() if parser.parse_args().sweep else rows())
