"""Asks services whether they are well: `python -m finery_common.probe grpc://HOST:PORT http://HOST:PORT/PATH …`.

For health checks inside a container, where no other client is at hand. Exits with 0 when all are; with 1, and a line for each that is not.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

TIMEOUT_S = 4.0


def trouble(url: str) -> str:
    """What keeps the service at `url` from being well; empty where nothing does."""
    scheme, address = urlsplit(url).scheme, urlsplit(url).netloc
    if scheme == "http":
        return _http_trouble(url)
    if scheme == "grpc" and address:
        return _grpc_trouble(address)
    return f"got {url!r}, wanted grpc://host:port or http://host:port/path"


def _http_trouble(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return "" if answer.status == 200 else f"{url} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


def _grpc_trouble(address: str) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            # What a call raises is a call as well; the stubs know only the error.
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            return f"{address} does not answer: {code}"
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if name == "SERVING" else f"{address} is {name}"


def main() -> int:
    """Answers the exit status."""
    troubles = [said for url in sys.argv[1:] or [""] if (said := trouble(url))]
    for said in troubles:
        sys.stderr.write(f"finery_common.probe: {said}\n")
    return int(bool(troubles))


if __name__ == "__main__":
    sys.exit(main())
