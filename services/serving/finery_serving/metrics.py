"""What serving measures, and vLLM's own metrics passed on with the replica's id."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from finery_serving.vllm_endpoint import Endpoint

ADAPTER_STATES = ("cold", "loaded", "draining", "failed")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0)

VLLM_READY = Gauge("finery_serving_vllm_ready", "1 while vLLM answers", ["replica", "base_model"])
VLLM_STARTS = Counter("finery_serving_vllm_starts_total", "Starts of vLLM")
VLLM_START_SECONDS = Histogram(
    "finery_serving_vllm_start_seconds", "From the start of vLLM to its first answer", buckets=(10, 20, 40, 80, 160, 320, 640)
)
ADAPTER_STATE = Gauge(
    "finery_serving_adapter_state",
    f"State of a version on a replica: {', '.join(f'{number} {name}' for number, name in enumerate(ADAPTER_STATES))}",
    ["adapter", "version", "replica"],
)
LOAD_SECONDS = Histogram("finery_serving_adapter_load_seconds", "Loading a staged adapter into vLLM", buckets=_SECONDS)
STAGE_SECONDS = Histogram("finery_serving_adapter_stage_seconds", "Fetching and verifying an adapter", buckets=_SECONDS)
SWAP_SECONDS = Histogram("finery_serving_swap_seconds", "From staged to flipped", buckets=_SECONDS)
SWAPS = Counter("finery_serving_swaps_total", "Rollouts, promotions and roll backs by outcome", ["outcome"])
# A counter that first shows as 1 has not risen, as Prometheus sees it.
SWAPS.labels("failed")
EVICTIONS = Counter("finery_serving_evictions_total", "Versions unloaded to make room for another", ["replica"])


class ReplicaCollector(Collector):
    """At each scrape: requests in flight by version and the metrics that vLLM itself exposes (names that start with `vllm:`)."""

    def __init__(self, endpoint: Endpoint, *, replica: str, admin_token: str) -> None:
        self._replica = replica
        self._http = endpoint.client(timeout_s=2.0)
        self._http.headers["x-finery-admin-token"] = admin_token

    def describe(self) -> list[Metric]:
        """Nothing: what vLLM has is known only while it runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Nothing where vLLM does not answer; `finery_serving_vllm_ready` says so."""
        try:
            state, text = self._http.get("/finery/state"), self._http.get("/metrics")
        except httpx.TransportError:
            return
        if state.status_code != 200 or text.status_code != 200:
            return
        in_flight = GaugeMetricFamily("finery_serving_requests_in_flight", "Requests in flight", labels=["version", "replica"])
        for version, count in state.json()["in_flight"].items():
            in_flight.add_metric([version, self._replica], count)
        yield in_flight
        yield from relabelled(text.text, replica=self._replica)


def relabelled(text: str, *, replica: str) -> Iterator[Metric]:
    """vLLM's families in `text` (Prometheus' format), each sample with a `replica` label."""
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("vllm:"):
            continue
        made = (
            CounterMetricFamily(family.name, family.documentation)
            if family.type == "counter"
            else Metric(family.name, family.documentation, family.type)
        )
        for sample in family.samples:
            made.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        yield made
