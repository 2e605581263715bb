"""NF4 dequantization of the 8B shape's weights: time, bytes moved and the share of what a copy reaches on the same card.

    python3 kernels/benchmarks/nf4.py [--sweep]

with `kernels` on PYTHONPATH where Finery is not installed. Needs a GPU; bitsandbytes is measured beside it where it is installed. `--sweep`
times launch shapes. Bytes: half a byte and the absmax read, two bytes written an element. Every call takes another weight of a set larger
than L2, as a pass over a model does.

N: output features, K: input features.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.rms_norm import copy_gb_s, print_table
from finery_kernels.nf4 import Nf4State, dequantize
from finery_kernels.nf4.api import NF4_CODE

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SPARE_COLUMNS = 64
"""Of the wider buffers whose views the strided rows pass."""
SET_BYTES = 2**28
"""Packed bytes of a set of weights: five times an H200's L2."""


@dataclass(frozen=True)
class Weights:
    """Weights of one shape, and one place for each to be dequantized to."""

    packed: list[Tensor]
    states: list[Nf4State]
    outs_NK: list[Tensor]
    size_bytes: int
    """What dequantizing one of them moves."""

    def each(self, call: Callable[[Tensor, Nf4State, Tensor], object]) -> Callable[[], object]:
        """A call that takes the next weight whenever it is called."""
        turn = cycle(zip(self.packed, self.states, self.outs_NK, strict=True))
        return lambda: call(*next(turn))


def rows() -> list[dict[str, Any]]:
    """One dict a case: op, shape, ms (median), gb_s, and `share` of the measured copy."""
    ceiling_gb_s, found = copy_gb_s(), list[dict[str, Any]]()
    for shape in SHAPES:
        for nested in (True, False):
            kind = "nested" if nested else "plain"
            for spare in (0, SPARE_COLUMNS):
                weights = make_weights(shape, nested=nested, spare_columns=spare)
                name = f"nf4 {kind}{' strided' if spare else ''}"
                found.append(_row(name, shape, weights, weights.each(_ours), ceiling_gb_s))
                if not spare and importlib.util.find_spec("bitsandbytes") is not None:
                    found.append(_row(f"bitsandbytes {kind}", shape, weights, weights.each(_bitsandbytes()), ceiling_gb_s))
    return found


def sweep() -> list[dict[str, Any]]:
    """Launch shapes with nested absmax, fastest first."""
    from finery_kernels.nf4 import triton

    found: list[dict[str, Any]] = []
    for shape in SHAPES[2:]:
        for spare in (0, SPARE_COLUMNS):
            weights = make_weights(shape, nested=True, spare_columns=spare)
            for num_warps in triton.WARPS:

                def launch(packed: Tensor, state: Nf4State, out: Tensor, num_warps: int = num_warps) -> Tensor:
                    return triton.dequantize(
                        packed,
                        code_16=state.code_16,
                        absmax_B=state.absmax_B,
                        blocksize=state.blocksize,
                        nested_absmax_C=state.nested_absmax_C,
                        nested_code_256=state.nested_code_256,
                        nested_blocksize=state.nested_blocksize,
                        offset=state.offset,
                        out=out,
                        num_warps=num_warps,
                    )

                name = f"{num_warps} warps{' strided' if spare else ''}"
                found.append(_row(name, shape, weights, weights.each(launch), ceiling_gb_s=1.0))
    return sorted(found, key=lambda row: -row["gb_s"])


def make_weights(shape: tuple[int, int], *, nested: bool, spare_columns: int) -> Weights:
    """Random codes and absmax; a set of SET_BYTES."""
    num_elements = shape[0] * shape[1]
    num_blocks = num_elements // 64
    packed, states, outs_NK = list[Tensor](), list[Nf4State](), list[Tensor]()
    for _ in range(max(2, SET_BYTES // (num_elements // 2))):
        packed.append(torch.randint(256, (num_elements // 2, 1), dtype=torch.uint8, device="cuda"))
        states.append(_state(shape, num_blocks, nested=nested))
        outs_NK.append(torch.empty(shape[0], shape[1] + spare_columns, dtype=torch.bfloat16, device="cuda")[:, : shape[1]])
    absmax_bytes = num_blocks + num_blocks // 64 if nested else 4 * num_blocks
    return Weights(packed, states, outs_NK, num_elements // 2 + 2 * num_elements + absmax_bytes)


def _state(shape: tuple[int, int], num_blocks: int, *, nested: bool) -> Nf4State:
    code_16 = torch.tensor(NF4_CODE, device="cuda")
    if not nested:
        return Nf4State(shape=shape, dtype=torch.bfloat16, code_16=code_16, absmax_B=torch.rand(num_blocks, device="cuda"))
    return Nf4State(
        shape=shape,
        dtype=torch.bfloat16,
        code_16=code_16,
        absmax_B=torch.randint(256, (num_blocks,), dtype=torch.uint8, device="cuda"),
        nested_absmax_C=torch.rand(-(-num_blocks // 256), device="cuda"),
        nested_code_256=torch.linspace(-1.0, 1.0, 256, device="cuda"),
        offset=torch.rand((), device="cuda"),
    )


def _ours(packed: Tensor, state: Nf4State, out: Tensor) -> Tensor:
    return dequantize(packed, state, out=out)


def _bitsandbytes() -> Callable[[Tensor, Nf4State, Tensor], Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    quant_states: dict[Nf4State, Any] = {}

    def dequantize_4bit(packed: Tensor, state: Nf4State, out: Tensor) -> Tensor:
        if state not in quant_states:
            quant_states[state] = _quant_state(functional, state)
        result: Tensor = functional.dequantize_4bit(packed, quant_states[state], out=out)
        return result

    return dequantize_4bit


def _quant_state(functional: Any, state: Nf4State) -> Any:
    nested = None
    if state.nested_absmax_C is not None:
        nested = functional.QuantState(state.nested_absmax_C, code=state.nested_code_256, blocksize=256, dtype=torch.float32)
    shape, fields = torch.Size(state.shape), {"code": state.code_16, "blocksize": state.blocksize, "quant_type": "nf4"}
    return functional.QuantState(state.absmax_B, shape, **fields, dtype=state.dtype, offset=state.offset, state2=nested)


def _row(op: str, shape: tuple[int, int], weights: Weights, call: Callable[[], object], ceiling_gb_s: float) -> dict[str, Any]:
    ms = _median_ms(call)
    gb_s = weights.size_bytes / ms / 1e6
    return {"op": op, "shape": f"{shape[0]}x{shape[1]} bf16", "ms": ms, "gb_s": gb_s, "share": gb_s / ceiling_gb_s}


def _median_ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="NF4 dequantization of the 8B shape's weights.")
    parser.add_argument("--sweep", action="store_true", help="launch shapes")
    print_table(sweep() if parser.parse_args().sweep else rows())
