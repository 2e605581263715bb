"""What the images of the services run: started from their root alone, as in a container."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from images.containers import signal_first_process

USER = 10001
SERVICES = ["gateway", "dataprep", "converter", "serving"]
NOWHERE = "127.0.0.1:1"
# What the service logs once it serves, and where the port is in that line.
SERVES = {"gateway": ("serving HTTP", "http://127.0.0.1:{port}/readyz"), "dataprep": ("serving gRPC", "grpc://127.0.0.1:{port}")}
SERVES["converter"] = SERVES["serving"] = SERVES["dataprep"]


@pytest.fixture
def state(tmp_path) -> Path:
    """A state directory as a volume brings it: empty, the user's."""
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, USER, USER)
    return folder


@pytest.fixture
def inputs(tmp_path, seaweedfs) -> Path:
    """What is mounted read-only: secrets as files, and a catalogue with one model."""
    folder = tmp_path / "inputs"
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "catalogue.yaml").write_text("models:\n- {name: tiny, path: model, max_sequence_length: 4096}\n")
    (folder / "token").write_text("s" * 40)
    (folder / "access").write_text(seaweedfs.settings.access_key)
    (folder / "secret").write_text(seaweedfs.settings.secret_key)
    return folder


@pytest.fixture
def settings(seaweedfs) -> dict[str, str]:
    """The settings that differ from the image's own: where things are, and ports of this machine that are free."""
    return {
        "FINERY_S3_ENDPOINT": seaweedfs.settings.endpoint,
        "FINERY_S3_BUCKET": seaweedfs.settings.bucket,
        "FINERY_S3_ACCESS_KEY_FILE": "/mnt/access",
        "FINERY_S3_SECRET_KEY_FILE": "/mnt/secret",
        "FINERY_TOKEN_SECRET_FILE": "/mnt/token",
        "FINERY_CATALOGUE": "/mnt/catalogue.yaml",
        "FINERY_GRPC_ADDRESS": "127.0.0.1:0",
        "FINERY_METRICS_HOST": "127.0.0.1",
        "FINERY_METRICS_PORT": "0",
        "FINERY_HTTP_HOST": "127.0.0.1",
        "FINERY_HTTP_PORT": "0",
        **{f"FINERY_{name}_ADDRESS": NOWHERE for name in ("DATAPREP", "TRAINER", "CONVERTER", "SERVING")},
    }


def _logged(log: Path, event: str, process: subprocess.Popen[str]) -> dict:
    """The log line with `event`, once it is there."""
    deadline_s = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline_s:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        for line in lines:
            if line["event"] == event:
                return line
        time.sleep(0.1)
    pytest.fail(f"{event!r} was not logged:\n{log.read_text()}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_on_a_read_only_root_is_healthy_and_ends_with_0(service, image_of, state, inputs, settings, tmp_path):
    image = image_of(service)
    log = tmp_path / "log"
    event, url = SERVES[service]
    with log.open("w") as stderr, image.popen(state, inputs=inputs, environment=settings, stderr=stderr) as process:
        try:
            port = _logged(log, event, process)["port"]
            probe = [*image.config["Healthcheck"]["Test"][1:-1], url.format(port=port)]
            asked = image.run(*probe, state=state)
            assert (asked.returncode, asked.stderr) == (0, "")
            status = Path(f"/proc/{psutil.Process(process.pid).children()[0].pid}/status").read_text().splitlines()
            ids = {line.split()[0]: set(line.split()[1:]) for line in status if line}
            assert ids["Uid:"] == ids["Gid:"] == {str(USER)}
            assert ids["CapEff:"] == ids["CapBnd:"] == {"0" * 16}
            signal_first_process(process, signal.SIGTERM)
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()
    assert out == ""
    # What it keeps is in the state directory and its own.
    assert {path.stat().st_uid for path in state.rglob("*")} == {USER}
    assert (state / "db" / f"{service}.sqlite").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_serving_starts_vllm_by_the_images_own_python_and_without_its_own_modules(image_of, state, inputs, settings, tmp_path):
    image = image_of("serving")
    log = tmp_path / "log"
    with log.open("w") as stderr, image.popen(state, inputs=inputs, environment=settings, stderr=stderr) as process:
        try:
            failed = _logged(log, "vLLM did not start", process)
            signal_first_process(process, signal.SIGTERM)
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()
    # The base that stands in for vLLM's image has none. Debian's Python says so, not the agent's.
    assert failed["last_lines"].startswith("/usr/bin/python3: Error while finding module specification for 'vllm"), failed["last_lines"]
