"""What the operations' tests share: error budgets against fp64, poisoned and strided inputs, compilation without a GPU.

Owns how exactness is judged and how a kernel is compiled for a card that is not there. Leaves shapes, oracles and factors to each
operation's tests. Imports no pytest, and triton only in the process that compiles.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Constant: TypeAlias = int | float | bool | str | None

ARCHITECTURES = (80, 90)
"""The compute capabilities that every kernel is compiled for: A100 and H100/H200."""


def relative_error(got: Tensor, oracle: Tensor) -> float:
    """L2 norm of the difference over that of `oracle`, in fp64; the plain norm of `got` where the oracle is zero."""
    oracle = oracle.double()
    norm = torch.linalg.vector_norm(oracle).item()
    error = torch.linalg.vector_norm(got.to(oracle.device).double() - oracle).item()
    return error / norm if norm > 0 else error


def assert_within_budget(got: Tensor, oracle_fp64: Tensor, eager: Tensor, *, factor: float, name: str = "result") -> None:
    """Asserts that `got` errs by no more than `factor` times what the plain low-precision implementation errs by.

    Errors are relative L2 errors against the fp64 oracle. A floor of 1e-7 (1e-15 for fp64) stands in where `eager` happens to be exact.
    All three have one shape; every element of `got` must be finite, which is what a poisoned output that was not written is not.
    """
    assert oracle_fp64.dtype == torch.float64, f"the oracle of {name} is {oracle_fp64.dtype}, not float64"
    assert got.shape == oracle_fp64.shape == eager.shape, f"{name}: {tuple(got.shape)}, {tuple(oracle_fp64.shape)}, {tuple(eager.shape)}"
    unwritten = int((~torch.isfinite(got)).sum())
    assert unwritten == 0, f"{name}: {unwritten} of {got.numel()} elements are not finite"
    budget = factor * relative_error(eager, oracle_fp64) + (1e-15 if got.dtype == torch.float64 else 1e-7)
    error = relative_error(got, oracle_fp64)
    assert error <= budget, (
        f"{name}: relative error {error:.3e} exceeds its budget {budget:.3e} ({factor} times the eager implementation's)"
    )


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_device() -> torch.device:
    """Where a kernel can run in this process: the GPU, or the CPU under the interpreter. Raises RuntimeError where it cannot."""
    if torch.cuda.is_available() and not interpreting():
        return torch.device("cuda")
    if interpreting():
        return torch.device("cpu")
    raise RuntimeError("there is no GPU and TRITON_INTERPRET is not 1: no kernel can run here")


def truncation_factor(dtype: torch.dtype) -> float:
    """What a budget of `dtype` is multiplied by for the interpreter's sake, which truncates to bf16: twice the RMS error of rounding."""
    return 2.0 if interpreting() and dtype == torch.bfloat16 else 1.0


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", row_stride: int | None = None) -> Tensor:
    """A tensor of NaN (of the largest value for integers), as an output that must be written whole.

    With `row_stride`, the last dimension's vectors lie that many elements apart in a poisoned buffer: a view, as the engine hands over.
    """
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    if row_stride is None:
        return torch.full(shape, value, dtype=dtype, device=device)
    assert row_stride >= shape[-1], f"a row stride of {row_stride} for rows of {shape[-1]}"
    return torch.full((*shape[:-1], row_stride), value, dtype=dtype, device=device)[..., : shape[-1]]


def strided(values: Tensor, *, row_stride: int) -> Tensor:
    """`values` [..., D] as a view of rows `row_stride` apart; what lies between them is NaN."""
    view = poisoned(*values.shape, dtype=values.dtype, device=values.device, row_stride=row_stride)
    return view.copy_(values)


def far_apart(values: Tensor, *, dim: int = 0) -> Tensor:
    """`values` as a view whose slices along `dim` lie over 2^30 elements apart, so that the third is past 2^31.

    What lies between them is never touched. Off the GPU it costs addresses, no memory: 4 GiB of them for three slices in 16 bits.
    """
    stride = 2**30 + 8
    inner = values.select(dim, 0).contiguous()
    strides = (*inner.stride()[:dim], stride, *inner.stride()[dim:])
    buffer = torch.empty((values.shape[dim] - 1) * stride + inner.numel(), dtype=values.dtype, device=values.device)
    return buffer.as_strided(values.shape, strides).copy_(values)


def assert_padding_untouched(view: Tensor) -> None:
    """Asserts that what lies between the rows of a `poisoned` or `strided` floating-point view is NaN still."""
    base = view._base  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    assert base is not None, "the tensor is no view"
    assert bool(torch.isnan(base[..., view.shape[-1] :]).all()), "the kernel wrote beyond its columns"


def random_normal(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", scale: float = 1.0, mean: float = 0.0
) -> Tensor:
    """Normal values drawn on the CPU in fp32 (the same on every device), then rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + mean).to(dtype).to(device)


@dataclass(frozen=True)
class Compilation:
    """One kernel to be compiled: `signature` types every argument as Triton writes it ("*bf16", "i32", "fp32", "constexpr").

    `constexprs` holds plain values, and data types as "tl.bfloat16". Pointers count as aligned to 16 bytes, as torch allocates;
    `divisible` names the integer arguments (strides) that are multiples of 16. `module` and `name` say where the kernel
    lies; `compile_for` fills them in.
    """

    module: str
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Constant]
    arch: int
    divisible: Sequence[str] = ()
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4})


@dataclass(frozen=True)
class Compiled:
    """What came of a compilation. `stack_bytes` is what a thread has in memory for want of registers."""

    name: str
    arch: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    ptx: str


def compilation(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    arch: int,
    *,
    divisible: Sequence[str] = (),
    **options: int,
) -> Compilation:
    """The order to compile `kernel`, a module-level function under `triton.jit`; `options` are num_warps, num_stages and the like."""
    function = kernel.fn
    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    return Compilation(function.__module__, function.__name__, types, dict(constexprs), arch, tuple(divisible), options or {"num_warps": 4})


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    arch: int,
    *,
    divisible: Sequence[str] = (),
    **options: int,
) -> Compiled:
    """Compiles one kernel for the NVIDIA architecture `arch` (80, 90), without a GPU; arguments as in `compilation`.

    Runs in a process of its own, since this one may be the interpreter's: `compile_all` takes many at the price of one start.
    Raises RuntimeError with the compiler's words.
    """
    return compile_all([compilation(kernel, signature, constexprs, arch, divisible=divisible, **options)])[0]


def compile_all(orders: Sequence[Compilation]) -> list[Compiled]:
    """Compiles all of `orders` in one process without the interpreter's flag. Raises RuntimeError with the compiler's words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "finery_kernels.testing"]
    text = json.dumps([asdict(order) for order in orders])
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {[order.name for order in orders]} failed:\n{done.stderr[-6000:]}")
    return [Compiled(**answer) for answer in json.loads(done.stdout.splitlines()[-1])]


def _compile(order: Compilation) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(order.module), order.name)
    constexprs = {name: _constant(value) for name, value in order.constexprs.items()}
    signature = {name: order.signature[name] for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in order.divisible]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    # Said outright, since Triton is changing the default and warns until then.
    options = {"enable_fp_fusion": True, **order.options}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", order.arch, 32), options=options)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    return Compiled(order.name, order.arch, compiled.metadata.shared, registers, stack_bytes, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, by the disassembler that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {text!r}")
    return int(found[1]), int(found[2])


def _constant(value: Constant) -> object:
    if isinstance(value, str) and value.startswith("tl."):
        return getattr(importlib.import_module("triton.language"), value.removeprefix("tl."))
    return value


def _main() -> None:
    orders = [Compilation(**order) for order in json.load(sys.stdin)]
    answers = [asdict(_compile(order)) for order in orders]
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    _main()
