"""Renewals of vLLM's certificate, as Kubernetes makes them in a mounted Secret, up to the TLS context of a real vLLM's refresher."""

import asyncio
import os
import shutil
import ssl
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from finery_common.errors import FailedPreconditionError
from finery_serving.certificates import copied_into, keep_copied
from finery_serving.vllm_endpoint import TlsEndpoint
from finery_serving.vllm_process import make_runtime

VLLM_PYTHON = Path(os.environ.get("FINERY_VLLM_PYTHON", Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"))
STEP_S = 30.0

_REFRESHED = """
import asyncio, ssl, sys
try:
    from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
except ImportError:
    from vllm.entrypoints.ssl import SSLCertRefresher

async def main(certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    refresher = SSLCertRefresher(context, key_path=key, cert_path=certificate)
    await asyncio.sleep(0.1)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main(*sys.argv[1:]))
"""


class Secret:
    """A mounted Secret: its files are links through `..data`, which each renewal puts another folder behind."""

    def __init__(self, folder: Path, make_vllm_certificate) -> None:
        self.folder, self.make, self.count = folder, make_vllm_certificate, 0
        folder.mkdir()
        self.renew()
        for name in ("tls.crt", "tls.key"):
            (folder / name).symlink_to(Path("..data") / name)

    def renew(self) -> None:
        old = os.readlink(self.folder / "..data") if self.count else None
        self.count += 1
        made = self.folder / f"..{self.count}"
        made.mkdir()
        self.make(made)
        (self.folder / "..data_tmp").symlink_to(made.name)
        (self.folder / "..data_tmp").rename(self.folder / "..data")
        if old:
            shutil.rmtree(self.folder / old)

    @property
    def endpoint(self) -> TlsEndpoint:
        certificate = self.folder / "tls.crt"
        return TlsEndpoint("127.0.0.1:0", "127.0.0.1:0", certificate, self.folder / "tls.key", certificate)


@pytest.fixture
def secret(tmp_path, make_vllm_certificate):
    return Secret(tmp_path / "secret", make_vllm_certificate)


@contextmanager
def refreshed_by_vllm(endpoint: TlsEndpoint):
    """The port where vLLM's own refresher keeps a certificate."""
    command = [VLLM_PYTHON, "-c", _REFRESHED, endpoint.cert_file, endpoint.key_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(int(line.split()[1]) for line in process.stdout if line.startswith("port "))
        finally:
            process.kill()


async def test_vllm_shows_every_renewed_certificate(tmp_path, secret):
    (tmp_path / "runtime").mkdir()
    copies = copied_into(tmp_path / "runtime", mounted=secret.endpoint)
    renewing = asyncio.create_task(keep_copied(secret.endpoint, copies=copies, look_s=0.1))
    with refreshed_by_vllm(copies) as port:
        for _ in range(3):
            certificate = secret.endpoint.cert_file.read_text()
            async with asyncio.timeout(STEP_S):
                while await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port)) != certificate:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert copies.key_file.read_bytes() == secret.endpoint.key_file.read_bytes()
            assert copies.key_file.stat().st_mode & 0o777 == 0o600
            secret.renew()
    renewing.cancel()


async def test_half_a_renewal_leaves_vllm_what_it_has(tmp_path, vllm_certificate, make_vllm_certificate):
    mounted = Secret(tmp_path / "secret", make_vllm_certificate).endpoint
    (tmp_path / "runtime").mkdir()
    copies = copied_into(tmp_path / "runtime", mounted=mounted)
    before = copies.cert_file.read_bytes(), copies.key_file.read_bytes()
    renewing = asyncio.create_task(keep_copied(mounted, copies=copies, look_s=0.05))
    certificate, key = vllm_certificate
    mounted.cert_file.write_bytes(certificate.read_bytes())
    await asyncio.sleep(0.5)
    assert (copies.cert_file.read_bytes(), copies.key_file.read_bytes()) == before
    mounted.key_file.write_bytes(key.read_bytes())
    async with asyncio.timeout(STEP_S):
        while (copies.cert_file.read_bytes(), copies.key_file.read_bytes()) != (certificate.read_bytes(), key.read_bytes()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not renewing.done()
    renewing.cancel()


def test_a_certificate_with_the_key_of_another_is_refused_at_the_start(tmp_path, secret, vllm_certificate):
    shutil.copy(vllm_certificate[1], secret.endpoint.key_file)
    (tmp_path / "parent").mkdir()
    with pytest.raises(FailedPreconditionError, match=r"FINERY_VLLM_TLS_CERT_FILE: got \S+/tls.crt, wanted a PEM certificate, and its key"):
        make_runtime(tmp_path / "parent", xdg_runtime_dir=None, tls=secret.endpoint)
    assert list((tmp_path / "parent").iterdir()) == []
