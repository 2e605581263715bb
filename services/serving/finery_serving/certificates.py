"""vLLM's certificate and key, as copies that vLLM can watch.

Owns the copies in the replica's runtime folder, and their renewal. Leaves reading them again to vLLM's `--enable-ssl-refresh`.

That watches inodes. The files of a mounted Secret are links into a folder that every renewal replaces, and of those, as of a file that
another is renamed over, it sees the first change and no other. What is written over in place it sees every time.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from dataclasses import replace
from pathlib import Path

import structlog

from finery_common.errors import FailedPreconditionError
from finery_serving.vllm_endpoint import TlsEndpoint

log = structlog.get_logger(__name__)


def copied_into(folder: Path, *, mounted: TlsEndpoint) -> TlsEndpoint:
    """`mounted` with copies of its certificate and key in `folder`, which only this user reads.

    Raises FailedPreconditionError where they cannot be read or do not belong together.
    """
    copies = replace(mounted, cert_file=folder / "vllm-tls.crt", key_file=folder / "vllm-tls.key")
    for file in (copies.cert_file, copies.key_file):
        file.touch(mode=0o600)
    try:
        _renew(mounted, copies=copies)
    except OSError as error:
        raise FailedPreconditionError(
            f"FINERY_VLLM_TLS_CERT_FILE: got {mounted.cert_file}, wanted a PEM certificate, and its key in {mounted.key_file}: {error}"
        ) from error
    return copies


async def keep_copied(mounted: TlsEndpoint, *, copies: TlsEndpoint, look_s: float = 10.0) -> None:
    """Copies certificate and key again whenever others are mounted; never ends by itself."""
    while True:
        await asyncio.sleep(look_s)
        try:
            if await asyncio.to_thread(_renew, mounted, copies=copies):
                log.info("vLLM's certificate is renewed", file=str(mounted.cert_file))
        except OSError as error:
            # Seen while it was being renewed, or no pair: vLLM keeps the one it has.
            log.warning("cannot renew vLLM's certificate; looking again", reason=str(error))


def _renew(mounted: TlsEndpoint, *, copies: TlsEndpoint) -> bool:
    """Whether there were others. Raises OSError, of which an SSLError is one, and leaves the copies where the new ones are no pair."""
    certificate, key = mounted.cert_file.read_bytes(), mounted.key_file.read_bytes()
    if (certificate, key) == (copies.cert_file.read_bytes(), copies.key_file.read_bytes()):
        return False
    with tempfile.TemporaryDirectory(dir=copies.key_file.parent) as folder:
        tried = replace(mounted, cert_file=Path(folder, "crt"), key_file=Path(folder, "key"))
        _write(tried, certificate=certificate, key=key)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tried.cert_file, tried.key_file)
    _write(copies, certificate=certificate, key=key)
    return True


def _write(endpoint: TlsEndpoint, *, certificate: bytes, key: bytes) -> None:
    endpoint.cert_file.write_bytes(certificate)
    endpoint.key_file.write_bytes(key)
