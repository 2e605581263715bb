"""TLS to vLLM where it listens on a port: the name in its certificate, and what a client trusts.

The replicas of an installation share one certificate, whatever their hosts are called.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from finery_common.errors import FailedPreconditionError

VLLM_NAME = "finery-vllm"
"""The DNS name that vLLM's certificate has to have."""


def client_context(ca_file: Path) -> ssl.SSLContext:
    """Trusts what the authorities in `ca_file` (PEM) have signed. Raises FailedPreconditionError where there is none."""
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        raise FailedPreconditionError(f"FINERY_VLLM_CA_FILE: got {ca_file}, wanted a file of PEM certificates: {error}") from error
