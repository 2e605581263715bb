"""Counters of the artifact store, served by whichever process uses it."""

from __future__ import annotations

from prometheus_client import Counter

ARTIFACT_BYTES = Counter("finery_artifact_bytes_total", "Bytes exchanged with the artifact store.", ["direction"])
STORE_UNAVAILABLE = Counter(
    "finery_store_unavailable_total", "Requests that the artifact store did not answer, or refused the keys of, after their retries."
)
ARTIFACT_FAILURES = Counter("finery_artifact_failures_total", "Artifact operations that failed after their retries.", ["operation"])
# A counter that first shows as 1 has not risen, as Prometheus sees it.
ARTIFACT_FAILURES.labels("verify")
