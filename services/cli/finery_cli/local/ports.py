"""Finding free TCP ports on loopback."""

from __future__ import annotations

import socket
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """`count` different ports that are free now. Whoever binds them first has them: start soon, and expect a clash."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    return why_taken(port) is None


def why_taken(port: int) -> str | None:
    """The system's reason why no server could listen on `port` now, or None where one could."""
    with socket.socket() as probe:
        # As servers do: connections of a previous run that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.strerror
        return None
