"""Metrics of every gRPC server."""

from prometheus_client import Counter, Histogram

RPC_REQUESTS = Counter("finery_rpc_requests_total", "Finished gRPC requests.", ["method", "code"])
RPC_SECONDS = Histogram("finery_rpc_seconds", "Time from a request's arrival to its end, streams included.", ["method"])
