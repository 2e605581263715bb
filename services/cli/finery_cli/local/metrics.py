"""Metrics of the supervisor."""

from prometheus_client import Counter

RESTARTS = Counter("finery_supervisor_restarts_total", "Processes that died and were started again.", ["process"])
