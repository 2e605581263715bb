"""Cross-entropy with its gradient at the 8B vocabulary: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/cross_entropy.py [--sweep]

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU. `--sweep` times launch shapes. The bytes are those of reading the
logits once and writing their gradient once: what the second pass does not find in L2 shows as a smaller share.

T: rows, V: vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rms_norm import copy_gb_s, print_table
from finery_kernels.cross_entropy import cross_entropy_forward_backward_

NUM_ROWS = 2048
VOCABULARIES = (128256, 262144)


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    ceiling_gb_s = copy_gb_s()
    return [row for num_classes in VOCABULARIES for row in _of_one_vocabulary(num_classes, ceiling_gb_s)]


def _of_one_vocabulary(num_classes: int, ceiling_gb_s: float) -> list[dict[str, Any]]:
    logits_TV, targets_T, grad_scale = inputs(num_classes)
    narrow_TV = logits_TV.to(torch.bfloat16)
    out_TV = torch.empty_like(narrow_TV)
    upper_TV = logits_TV.view(torch.bfloat16)[:, num_classes:]

    def ours(logits_TV: Tensor, out: Tensor, softcap: float | None = None) -> Tensor:
        return cross_entropy_forward_backward_(logits_TV, targets_T, grad_scale=grad_scale, softcap=softcap, out=out)

    def eager() -> Tensor:
        leaf_TV = logits_TV.detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(leaf_TV, targets_T, reduction="sum"), leaf_TV)[0]

    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("fp32 to bf16", 6, lambda: ours(logits_TV, out_TV)),
        ("fp32 to bf16, softcap", 6, lambda: ours(logits_TV, out_TV, 30.0)),
        ("bf16 to bf16", 4, lambda: ours(narrow_TV, out_TV)),
        ("torch, fp32, autograd", 8, eager),
        # Last, since what it leaves behind are no logits.
        ("fp32 to bf16, in upper half", 6, lambda: ours(logits_TV, upper_TV)),
    ]
    return [_row(op, num_classes, size_bytes, call, ceiling_gb_s) for op, size_bytes, call in cases]


def sweep() -> list[dict[str, Any]]:
    """Launch shapes from fp32 to bf16, fastest first; the overlap is that of the head's tiles."""
    from finery_kernels.cross_entropy.triton import cross_entropy_kernel

    num_classes = VOCABULARIES[0]
    logits_TV, targets_T, grad_scale = inputs(num_classes)
    loss_T = torch.empty(NUM_ROWS, device="cuda")
    out_TV = logits_TV.view(torch.bfloat16)[:, num_classes:]
    tensors = (logits_TV, targets_T, grad_scale, loss_T, out_TV, logits_TV.stride(0), out_TV.stride(0))
    found: list[dict[str, Any]] = []
    for num_warps in (8, 16, 32):
        for width in (4, 8):
            for elements_per_thread in (8, 16, 32):
                shape = {"BLOCK": num_warps * 32 * width, "UNROLL": elements_per_thread // width}

                constants: dict[str, Any] = {"V": num_classes, "OVERLAP": True, **shape}
                options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": True}

                def launch(constants: dict[str, Any] = constants, options: dict[str, Any] = options) -> None:
                    cross_entropy_kernel[(NUM_ROWS,)](*tensors, 1.0, None, -100, **constants, **options)

                logits_TV.normal_()
                found.append(_row(f"{num_warps} warps, {width} of {elements_per_thread}", num_classes, 6, launch, 1.0))
    return sorted(found, key=lambda row: row["ms"])


def inputs(num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and the gradient's factor."""
    logits_TV = torch.randn(NUM_ROWS, num_classes, device="cuda")
    return logits_TV, torch.randint(num_classes, (NUM_ROWS,), device="cuda"), torch.full((1,), 1e-4, device="cuda")


def _row(op: str, num_classes: int, size_bytes: int, call: Callable[[], object], ceiling_gb_s: float) -> dict[str, Any]:
    """`size_bytes` a logit."""
    from triton.testing import do_bench

    ms = float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]
    gb_s = NUM_ROWS * num_classes * size_bytes / ms / 1e6
    return {"op": op, "shape": f"{NUM_ROWS}x{num_classes}", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Cross-entropy with its gradient at the 8B vocabulary.")
    parser.add_argument("--sweep", action="store_true", help="launch shapes")
    print_table(sweep() if parser.parse_args().sweep else rows())
