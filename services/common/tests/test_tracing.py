"""Tracing costs nothing while it is off, and says what is missing. What it shows of a whole system is `tests/observability`'s."""

from __future__ import annotations

import os
import subprocess
import sys

from finery_common.tracing import is_tracing, span, traceparent

WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from finery_common.settings import ServiceSettings
from finery_common.service import run_service

async def serve(settings):
    print("serves")

sys.exit(run_service("thing", ServiceSettings, serve))
"""


def _run(**environment):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_while_it_is_off_there_are_no_spans():
    with span("work", parent="00-" + "1" * 32 + "-" + "2" * 16 + "-01") as opened:
        assert opened is None
        assert traceparent() == ""
    assert not is_tracing()


def test_opentelemetry_is_needed_only_where_a_collector_is_named():
    assert _run().stdout == "serves\n"
    refused = _run(FINERY_OTLP_ENDPOINT="http://127.0.0.1:4317")
    assert refused.returncode == 1
    assert "install the extra `tracing`" in refused.stderr
