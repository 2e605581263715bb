"""TLS to vLLM where it listens on a port: the name in its certificate, and what a client trusts.

The replicas of an installation share one certificate, whatever their hosts are called.
"""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

from finery_common.errors import FailedPreconditionError

VLLM_NAME = "finery-vllm"
"""The DNS name that vLLM's certificate has to have."""


class Trust:
    """Trusts what the authorities in `ca_file` (PEM) have signed, also once the file has others.

    Raises FailedPreconditionError where there are none at first.
    """

    def __init__(self, ca_file: Path) -> None:
        self._ca_file = ca_file
        try:
            self._context = ssl.create_default_context(cafile=str(ca_file))
            self._changed_ns = ca_file.stat().st_mtime_ns
        except OSError as error:
            raise FailedPreconditionError(f"FINERY_VLLM_CA_FILE: got {ca_file}, wanted a file of PEM certificates: {error}") from error

    def context(self) -> ssl.SSLContext:
        """For the next connection; always the same object, which may learn of further authorities."""
        with contextlib.suppress(OSError):
            changed_ns = self._ca_file.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                self._context.load_verify_locations(cafile=str(self._ca_file))
                self._changed_ns = changed_ns
        return self._context
