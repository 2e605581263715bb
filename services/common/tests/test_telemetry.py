"""What a process's logs never hold, and what Prometheus reads of it."""

from __future__ import annotations

import subprocess
import sys
import urllib.request

from prometheus_client import REGISTRY, Gauge

from finery_common.telemetry import serve_metrics

PROGRAM = """
from prometheus_client import REGISTRY

from finery_common.artifacts import ArtifactStore, S3Settings
from finery_common.artifacts.client import S3Client
from finery_common.errors import UnavailableError
from finery_common.telemetry import configure_logging

configure_logging("thing")
settings = S3Settings(endpoint="127.0.0.1:1", access_key="access", secret_key="secret", region="us-east-1", retry_deadline_s=2)
try:
    S3Client(settings).put_new("projects/p/files/f/manifest.json", b"x")
except UnavailableError as error:
    print("unavailable", error.message)
print("counted", REGISTRY.get_sample_value("finery_store_unavailable_total"))
"""


def test_a_store_that_is_gone_is_counted_and_leaves_no_signature_in_the_log():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("unavailable")
    assert done.stdout.endswith("counted 1.0\n")
    assert "Signature" not in done.stdout + done.stderr
    assert "X-Amz" not in done.stdout + done.stderr


def test_a_name_with_a_colon_reaches_prometheus_as_it_is():
    gauge = Gauge("thing:waiting", "As vLLM names its own.", ["replica"])
    gauge.labels("a").set(3)
    port = serve_metrics(host="127.0.0.1", port=0)
    accepted = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accepted})
    with urllib.request.urlopen(request) as answer:
        assert b'\nthing:waiting{replica="a"} 3.0\n' in answer.read()
    REGISTRY.unregister(gauge)
