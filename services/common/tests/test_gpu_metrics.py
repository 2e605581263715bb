"""What a scrape says of GPUs, by NVIDIA's binding to a library that stands in for the driver's."""

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

PROGRAM = """
from prometheus_client import generate_latest
from finery_common.gpu_metrics import serve_gpu_metrics
from finery_common.telemetry import configure_logging

configure_logging("thing")
serve_gpu_metrics()
print(generate_latest().decode())
"""


def _scraped(**environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True, timeout=60)
    samples = [sample for family in text_string_to_metric_families(done.stdout) for sample in family.samples]
    return {(sample.name, sample.labels["gpu"]): sample for sample in samples if sample.name.startswith("finery_gpu_")}


def test_cards_and_the_instances_of_a_divided_one_are_told_of_beside_one_that_is_lost(tmp_path):
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", source], check=True)
    found = _scraped(LD_LIBRARY_PATH=str(tmp_path))
    values = {key: sample.value for key, sample in found.items()}
    assert values == {
        ("finery_gpu_memory_used_bytes", "0"): 60,
        ("finery_gpu_memory_total_bytes", "0"): 80,
        ("finery_gpu_utilization_ratio", "0"): 0.5,
        ("finery_gpu_power_watts", "0"): 350,
        ("finery_gpu_temperature_celsius", "0"): 61,
        ("finery_gpu_memory_used_bytes", "1:0"): 4,
        ("finery_gpu_memory_total_bytes", "1:0"): 10,
        ("finery_gpu_temperature_celsius", "1:0"): 61,
        ("finery_gpu_memory_used_bytes", "1:2"): 4,
        ("finery_gpu_memory_total_bytes", "1:2"): 10,
        ("finery_gpu_temperature_celsius", "1:2"): 61,
    }
    assert found["finery_gpu_memory_used_bytes", "1:2"].labels == {"gpu": "1:2", "uuid": "GPU-12", "name": "NVIDIA H100"}


def test_without_a_driver_there_is_nothing_to_tell(tmp_path):
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_text("no library")
    assert _scraped(LD_LIBRARY_PATH=str(tmp_path)) == {}
