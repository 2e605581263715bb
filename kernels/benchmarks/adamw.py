"""AdamW's step and the gradients' norm: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/adamw.py

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU with 20 GB free. Sizes: the adapters of the 8B shape at rank 32
(84M), and a slice of 512M of its weights. The bytes are those that a step must read and write once.

N: elements of the flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from finery_kernels.adamw import State8bit, adamw_, adamw_8bit_, grad_norm
from finery_kernels.testing import random_normal

ADAPTER_ELEMENTS = 83_886_080
WEIGHT_ELEMENTS = 512 * 2**20


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    ceiling_gb_s = _copy_gb_s()
    found: list[dict[str, Any]] = []
    for num_elements in (ADAPTER_ELEMENTS, WEIGHT_ELEMENTS):
        for op, bytes_per_element, call in _cases(num_elements):
            ms = _median_ms(call)
            gb_s = bytes_per_element * num_elements / ms / 1e6
            found.append({"op": op, "shape": f"{num_elements / 1e6:.0f}M", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s})
    return found


def _cases(num_elements: int) -> Iterable[tuple[str, float, Callable[[], object]]]:
    """Op, bytes read and written for each element, and the call."""
    options: dict[str, Any] = {
        "lr": torch.tensor(1e-4, device="cuda"),
        "step": torch.tensor(10, device="cuda"),
        "clip_coef": torch.tensor(1.0, device="cuda"),
        "weight_decay": 0.01,
    }
    params_N, grads_N = torch.zeros(num_elements, device="cuda"), _noise(num_elements)
    half_N = params_N.bfloat16()
    moments = (torch.zeros_like(params_N), torch.zeros_like(params_N))
    half_moments = (torch.zeros_like(half_N), torch.zeros_like(half_N))
    state = State8bit.zeros(num_elements, device="cuda")
    shadow_N = torch.zeros_like(half_N)
    # Moments that are none of the ends of their codes.
    adamw_8bit_(params_N, grads_N, state, **options)
    yield "adamw fp32", 26, lambda: adamw_(params_N, grads_N, *moments, **options)
    yield "adamw fp32, bf16 shadow", 28, lambda: adamw_(params_N, grads_N, *moments, **options, shadow_N=shadow_N)
    yield "adamw fp32, bf16 moments", 18, lambda: adamw_(params_N, grads_N, *half_moments, **options)
    yield "adamw bf16, bf16 moments", 14, lambda: adamw_(half_N, grads_N, *half_moments, **options, stochastic_rounding=True)
    yield "adamw 8 bit, fp32", 14 + 16 / 256, lambda: adamw_8bit_(params_N, grads_N, state, **options)
    yield "adamw 8 bit, bf16", 10 + 16 / 256, lambda: adamw_8bit_(half_N, grads_N, state, **options)
    yield "grad_norm bf16", 2, lambda: grad_norm(grads_N)


def _noise(num_elements: int) -> torch.Tensor:
    return random_normal(2**20, seed=1, dtype=torch.bfloat16, device="cuda", scale=0.01).repeat(-(-num_elements // 2**20))[:num_elements]


def _copy_gb_s() -> float:
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / _median_ms(lambda: target.copy_(source)) / 1e6


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


def _print_table(measured: Iterable[dict[str, Any]]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'op':28} {'N':>8} {'ms':>9} {'GB/s':>8} {'of copy':>8}")
    for row in measured:
        print(f"{row['op']:28} {row['shape']:>8} {row['ms']:9.4f} {row['gb_s']:8.0f} {row['share']:8.1%}")


if __name__ == "__main__":
    _print_table(rows())
