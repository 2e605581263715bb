"""The GPUs that this process can see, as NVML tells of them at each scrape: memory, use, power, temperature.

Owns the families `finery_gpu_…`. Nothing is loaded onto a GPU for it. Without the package nvidia-ml-py, without a driver or a GPU there
are no series. A card that MIG divides is told of by its instances. What a process itself holds is measured where it holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

_LABELS = ("gpu", "uuid", "name")
log = structlog.get_logger(__name__)


def serve_gpu_metrics() -> None:
    """Adds the GPUs to this process's `/metrics`, where there are any."""
    if find_spec("pynvml") is None:
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no GPU is measured", reason=str(error))
        return
    REGISTRY.register(GpuCollector(pynvml))


class GpuCollector(Collector):
    """Families of GPUs, by `nvml`: the module pynvml, initialized."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def describe(self) -> list[Metric]:
        """The families without samples."""
        return list(_families().values())

    def collect(self) -> Iterator[Metric]:
        """A sample of each family for each GPU; what a card does not tell is left out."""
        nvml, families = self._nvml, _families()
        readings: dict[str, Callable[[Any], float]] = {
            "used": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            "total": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "busy": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "power": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "temperature": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        }
        for index, gpu in self._gpus():
            with suppress(nvml.NVMLError):
                labels = [index, str(nvml.nvmlDeviceGetUUID(gpu)), str(nvml.nvmlDeviceGetName(gpu))]
                for key, read in readings.items():
                    with suppress(nvml.NVMLError):
                        families[key].add_metric(labels, read(gpu))
        yield from families.values()

    def _gpus(self) -> Iterator[tuple[str, Any]]:
        nvml = self._nvml
        try:
            num_gpus = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError:
            return
        for index in range(num_gpus):
            # One that is lost must not hide the others, nor what else the process measures.
            with suppress(nvml.NVMLError):
                gpu = nvml.nvmlDeviceGetHandleByIndex(index)
                parts = list(self._instances(gpu))
                yield from ((f"{index}:{part}", instance) for part, instance in parts) if parts else ((str(index), gpu),)

    def _instances(self, gpu: Any) -> Iterator[tuple[int, Any]]:
        nvml = self._nvml
        try:
            num_places = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu) if nvml.nvmlDeviceGetMigMode(gpu)[0] else 0
        except nvml.NVMLError:
            return
        for place in range(num_places):
            try:
                yield place, nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
            except nvml.NVMLError:
                continue


def _families() -> dict[str, GaugeMetricFamily]:
    return {
        "used": GaugeMetricFamily("finery_gpu_memory_used_bytes", "Memory of the GPU in use, by any process.", labels=_LABELS),
        "total": GaugeMetricFamily("finery_gpu_memory_total_bytes", "Memory of the GPU.", labels=_LABELS),
        "busy": GaugeMetricFamily("finery_gpu_utilization_ratio", "Part of the last second in which a kernel ran.", labels=_LABELS),
        "power": GaugeMetricFamily("finery_gpu_power_watts", "Power that the GPU draws.", labels=_LABELS),
        "temperature": GaugeMetricFamily("finery_gpu_temperature_celsius", "Temperature of the GPU.", labels=_LABELS),
    }
