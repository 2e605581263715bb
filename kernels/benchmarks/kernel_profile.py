"""Where the time of a step goes: kernels by time from torch.profiler, and the share of the wall that the GPU is busy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import Engine, synchronize
from benchmarks.workloads import Workload, token_rows

NUM_STEPS = 2


@dataclass(frozen=True)
class Kernel:
    """All launches of one name."""

    name: str
    count: int
    total_us: float


def profile(engine: Engine, workload: Workload, *, num_warmup: int) -> str:
    """The table of `NUM_STEPS` steps of a fixed workload after `num_warmup` ones."""
    engine.prepare(workload)
    for step in range(num_warmup):
        engine.step(token_rows(workload, step))
    batches = [token_rows(workload, num_warmup + step) for step in range(NUM_STEPS)]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        started_s = time.perf_counter()
        for rows in batches:
            engine.step(rows)
        synchronize()
        wall_s = time.perf_counter() - started_s
    return f"{engine.name}, {workload.name}, {NUM_STEPS} steps under the profiler\n{table(_kernels(profiler), wall_s=wall_s)}\n"


def table(kernels: Sequence[Kernel], *, wall_s: float, num_rows: int = 80) -> str:
    """`kernels` by time, with their share of all kernel time; the busy share can pass 100 % where streams overlap."""
    total_us = sum(kernel.total_us for kernel in kernels) or 1.0
    lines = [f"wall {wall_s * 1e3:.1f} ms, kernels {total_us / 1e3:.1f} ms, busy {total_us / wall_s / 1e4:.1f} %"]
    lines.append(f"{'ms':>10} {'share':>7} {'count':>7} {'mean us':>9}  kernel")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.total_us)[:num_rows]:
        share, mean_us = kernel.total_us / total_us, kernel.total_us / kernel.count
        lines.append(f"{kernel.total_us / 1e3:>10.3f} {share:>7.2%} {kernel.count:>7} {mean_us:>9.1f}  {kernel.name[:120]}")
    return "\n".join(lines)


def _kernels(profiler: torch.profiler.profile) -> list[Kernel]:
    on_gpu = torch.cuda.is_available()
    found: list[Kernel] = []
    for event in profiler.key_averages():
        if (event.device_type.name == "CUDA") == on_gpu:
            total_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append(Kernel(str(event.key), int(event.count), float(total_us)))
    return found
