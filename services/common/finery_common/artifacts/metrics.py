"""Counters of the artifact store, served by whichever process uses it."""

from __future__ import annotations

from prometheus_client import Counter

ARTIFACT_BYTES = Counter("finery_artifact_bytes_total", "Bytes exchanged with the artifact store.", ["direction"])
ARTIFACT_FAILURES = Counter("finery_artifact_failures_total", "Artifact operations that failed after their retries.", ["operation"])
