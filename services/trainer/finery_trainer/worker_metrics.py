"""What a worker measures of itself: the VRAM of its process, read at each scrape.

The same numbers after each step go to the training service with the report (`metrics`); these are there between steps, and before the
first. Other replicas of a run on several GPUs are processes of their own: `finery_gpu_memory_used_bytes` has their cards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

VRAM_KINDS = ("allocated", "reserved", "peak")


class VramCollector(Collector):
    """`finery_worker_vram_bytes` of the job that this process works on; nothing where torch is not loaded or has no GPU in use."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def describe(self) -> list[Metric]:
        """The family without samples."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        """What tensors hold, what torch holds for them, and the most that tensors held."""
        family = self._family()
        # A scrape must not be what loads torch, or takes memory of a GPU.
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            for gpu in range(torch.cuda.device_count()):
                values = (torch.cuda.memory_allocated(gpu), torch.cuda.memory_reserved(gpu), torch.cuda.max_memory_allocated(gpu))
                for kind, value in zip(VRAM_KINDS, values, strict=True):
                    family.add_metric([self._job_id, str(gpu), kind], value)
        yield family

    def _family(self) -> GaugeMetricFamily:
        text = "VRAM of the worker's process: allocated to tensors, reserved by torch, and the peak of what was allocated."
        return GaugeMetricFamily("finery_worker_vram_bytes", text, labels=["job_id", "gpu", "kind"])
