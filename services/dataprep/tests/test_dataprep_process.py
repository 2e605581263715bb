"""`python -m finery_dataprep` as an installation runs it."""

import json
import os
import signal
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc


@pytest.fixture
def environment(tmp_path, object_store, make_base):
    make_base("chatml")
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    (tmp_path / "catalogue.yaml").write_text("models:\n- {name: tiny, path: base, max_sequence_length: 4096}\n")
    (tmp_path / "token").write_text("s" * 40)
    store = object_store.settings
    return {key: value for key, value in os.environ.items() if not key.startswith("FINERY_")} | {
        "FINERY_STATE_DIR": str(tmp_path / "state"),
        "FINERY_GRPC_ADDRESS": "127.0.0.1:0",
        "FINERY_CATALOGUE": str(tmp_path / "catalogue.yaml"),
        "FINERY_TOKEN_SECRET_FILE": str(tmp_path / "token"),
        "FINERY_S3_ENDPOINT": store.endpoint,
        "FINERY_S3_BUCKET": store.bucket,
        "FINERY_S3_ACCESS_KEY": store.access_key,
        "FINERY_S3_SECRET_KEY": store.secret_key,
    }


def start(environment, log):
    return subprocess.Popen([sys.executable, "-m", "finery_dataprep"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def logged_port(path, process):
    while process.poll() is None:
        for line in path.read_text().splitlines():
            if "serving gRPC" in line:
                return json.loads(line)["port"]
    pytest.fail(path.read_text())


@pytest.mark.timeout(60)
def test_it_serves_until_terminated_and_says_nothing_on_stdout(environment, tmp_path):
    path = tmp_path / "log"
    with path.open("w") as log, start(environment, log) as process:
        port = logged_port(path, process)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="finery.dataset.v1.DatasetService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"FINERY_CATALOGUE": "/nowhere.yaml"}, "Cannot read the catalogue /nowhere.yaml"),
        ({"FINERY_S3_SECRET_KEY": "wrong"}, "refuse"),
        ({"FINERY_TOKEN_SECRET_FILE": "/nowhere"}, "FINERY_TOKEN_SECRET_FILE"),
        ({"FINERY_DATAPREP_WORKERS": "none"}, "dataprep_workers"),
        ({"FINERY_GRPC_ADDRESS": "taken"}, "is the port taken"),
    ],
)
def test_what_keeps_it_from_starting_is_said_in_one_line_at_the_end(environment, tmp_path, seaweedfs, change, words):
    if change == {"FINERY_GRPC_ADDRESS": "taken"}:
        change = {"FINERY_GRPC_ADDRESS": seaweedfs.settings.endpoint}
    done = subprocess.run(
        [sys.executable, "-m", "finery_dataprep"], env=environment | change, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    # Beside JSON logs, gRPC writes a line of its own about a port.
    *_, last = done.stderr.splitlines()
    assert last.startswith("finery_dataprep: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
