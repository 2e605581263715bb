"""What the gateway reads from the environment beside what every service reads."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from finery_common.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Settings of the gateway. `grpc_address` is where the public gRPC services listen."""

    http_host: str = "127.0.0.1"
    """Address of the REST API."""
    http_port: int = 8080
    """Port of the REST API; 0 takes a free one and logs it."""
    grpc_address: str = "127.0.0.1:8081"
    """Where the public gRPC services listen."""
    upload_limit_bytes: int = 512 * 1024 * 1024
    """The largest file that can be uploaded."""
    body_limit_bytes: int = 8 * 1024 * 1024
    """The largest body of any other request."""
    cold_wait_s: float = 30.0
    """How long a request waits for a model that is being loaded before it gets a 503."""
    log_content: bool = False
    """Also logs what was asked and answered, in the line of each generation. What users write is then in the log."""
    generation_timeout_s: float = 600.0
    """How long vLLM may be silent within one request."""
    gateway_workers: int = Field(default=0, ge=0, le=31)
    """Processes that answer HTTP on the one port; 0 takes one for every four cores of this machine, four at the most."""

    @property
    def num_workers(self) -> int:
        """As many as are to run."""
        return self.gateway_workers or min(4, max(1, len(os.sched_getaffinity(0)) // 4))

    @property
    def limits_file(self) -> Path:
        """Where this machine's gateway processes count what keys use. Another layout of the file takes another name."""
        return self.state_dir / "run" / "limits-1"
