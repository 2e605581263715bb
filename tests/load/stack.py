"""A store, a serving service with its vLLM and a gateway, as processes of their own: what the benchmark runs on.

Training, datasets and conversion are left out: the gateway is told of addresses at which nothing listens.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load.installation import Place

from finery_cli.local.ports import free_ports
from finery_cli.local.seaweedfs import SeaweedFS
from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import folder_sha256
from finery_common.rpc.tokens import TokenSigner

_START_S = 900.0
_BASE = "base"


@dataclass(frozen=True)
class Stack:
    """The running processes; `metrics_url` is the serving service's."""

    place: Place
    metrics_url: str


@contextlib.contextmanager
def running_stack(folder: Path, *, model: Path, vllm_python: Path, max_model_len: int, serving: dict[str, object]) -> Iterator[Stack]:
    """Starts everything under `folder`, with `serving` as further settings of the serving service, and stops it at the end."""
    secret, catalogue = folder / "secret", folder / "catalogue.yaml"
    secret.write_text(secrets.token_hex(32))
    catalogue.write_text(f"models:\n  - name: {_BASE}\n    path: {model}\n    max_sequence_length: {max_model_len}\n")
    rpc, metrics, http, public, nowhere = free_ports(5)
    with contextlib.ExitStack() as stack:
        seaweedfs = SeaweedFS(folder)
        stack.callback(seaweedfs.stop)
        s3 = seaweedfs.start()
        seaweedfs.wait_ready()
        inner = f"127.0.0.1:{nowhere}"
        settings: dict[str, object] = {
            "STATE_DIR": folder,
            "S3_ENDPOINT": s3.endpoint,
            "S3_ACCESS_KEY": s3.access_key,
            "S3_SECRET_KEY": s3.secret_key,
            "S3_BUCKET": s3.bucket,
            "TOKEN_SECRET_FILE": secret,
            "CATALOGUE": catalogue,
            "VLLM_PYTHON": vllm_python,
            "SERVING_ADDRESS": f"127.0.0.1:{rpc}",
            "DATAPREP_ADDRESS": inner,
            "TRAINER_ADDRESS": inner,
            "CONVERTER_ADDRESS": inner,
            "HTTP_PORT": http,
        }
        own = {"GRPC_ADDRESS": f"127.0.0.1:{rpc}", "METRICS_PORT": metrics}
        agent = stack.enter_context(_process("finery_serving", settings | own | serving, folder))
        stack.enter_context(_process("finery_gateway", settings | {"GRPC_ADDRESS": f"127.0.0.1:{public}", "METRICS_PORT": 0}, folder))
        url, key_file = f"http://127.0.0.1:{http}", folder / "api_key"
        _until_answered(url, key_file)
        place = Place(
            http_url=url,
            api_key=key_file.read_text().strip(),
            serving_address=f"127.0.0.1:{rpc}",
            serving_pid=agent.pid,
            serving_cache=folder / "cache" / "serving",
            signer=TokenSigner(secret.read_text()),
            store=ArtifactStore.connect(s3),
            project="default",
            base_model=_BASE,
            base_sha256=folder_sha256(model, memo_dir=folder / "digests"),
        )
        yield Stack(place, f"http://127.0.0.1:{metrics}/metrics")


@contextlib.contextmanager
def _process(module: str, settings: dict[str, object], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **{f"FINERY_{name}": str(value) for name, value in settings.items()}}
    with (folder / f"{module}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _until_answered(url: str, key_file: Path) -> None:
    """Waits until the base model answers through the gateway."""
    ends_s, body = time.monotonic() + _START_S, f'{{"model": "{_BASE}", "prompt": "Hello", "max_tokens": 1}}'.encode()
    while True:
        with contextlib.suppress(OSError):
            headers = {"authorization": f"Bearer {key_file.read_text().strip()}", "content-type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60).close()
            return
        assert time.monotonic() < ends_s, f"nothing answers after {_START_S:.0f} s; the logs are in {key_file.parent}"
        time.sleep(1)
