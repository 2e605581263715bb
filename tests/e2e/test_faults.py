"""Faults in the real system: what was running goes on, what was published stays, and the message says what happened.

Those of serving, and what needs a machine of its own, are in `tests/chaos`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest
from e2e.jobs import LONG_SPEC, NUM_STEPS, create_job, steps_of, wait_steps
from e2e.system import System, code_word_rows, wait_job
from minio import Minio
from openai import OpenAI

from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery.training.v1 import training_pb2, training_pb2_grpc, worker_pb2, worker_pb2_grpc
from finery_cli.local.ports import free_ports
from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = pytest.mark.timeout(900)


def worker_of(system: System) -> psutil.Process:
    trainer = psutil.Process(system.running.processes["trainer"])
    workers = [child for child in trainer.children(recursive=True) if "finery_trainer.worker" in " ".join(child.cmdline())]
    assert workers, "no worker runs"
    return workers[0]


def test_a_killed_worker_goes_on_from_its_checkpoint(system: System, client: OpenAI):
    job_id = create_job(client, LONG_SPEC)
    wait_steps(client, job_id, 4)
    worker_of(system).kill()
    wait_job(client, job_id, "succeeded")
    steps = steps_of(client, job_id)
    assert set(steps) == set(range(1, NUM_STEPS + 1))
    assert len(steps) < NUM_STEPS + 8, "it did not start from the beginning"


def test_a_store_that_is_gone_for_ten_seconds_loses_nothing(system: System, client: OpenAI):
    job_id = create_job(client, LONG_SPEC)
    wait_steps(client, job_id, 1)
    store = psutil.Process(system.running.processes["object store"])
    content = code_word_rows("cedar")
    with ThreadPoolExecutor(1) as pool:
        store.suspend()
        try:
            upload = pool.submit(client.files.create, file=("during.jsonl", content), purpose="fine-tune")
            time.sleep(10)
            assert not upload.done(), "an upload cannot end while the store is gone"
        finally:
            store.resume()
        assert client.files.content(upload.result(timeout=90).id).content == content
    wait_job(client, job_id, "succeeded")
    assert client.files.content(client.fine_tuning.jobs.retrieve(job_id).result_files[0]).text.count("\n") == NUM_STEPS + 1


def test_grpc_clients_see_their_project_and_nothing_internal(system: System, client: OpenAI):
    job_id = create_job(client, LONG_SPEC | {"max_steps": 1})
    metadata = (("authorization", f"Bearer {system.api_key}"),)
    with grpc.insecure_channel(system.running.grpc_address) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        job = stub.GetJob(training_pb2.GetJobRequest(name=f"projects/default/jobs/{job_id}"), metadata=metadata, timeout=30)
        assert job.spec.max_steps == 1
        refused = (
            (lambda: stub.ListJobs(training_pb2.ListJobsRequest(parent="projects/default"), timeout=30), "UNAUTHENTICATED"),
            (lambda: stub.ListJobs(training_pb2.ListJobsRequest(parent="projects/other"), metadata=metadata, timeout=30), "NOT_FOUND"),
            (
                lambda: worker_pb2_grpc.WorkerServiceStub(channel).GetAssignment(
                    worker_pb2.GetAssignmentRequest(), metadata=metadata, timeout=30
                ),
                "UNIMPLEMENTED",
            ),
            (
                lambda: serving_pb2_grpc.ServingServiceStub(channel).ResolveModel(
                    serving_pb2.ResolveModelRequest(parent="projects/default", model=QUICKSTART_MODEL), metadata=metadata, timeout=30
                ),
                "UNIMPLEMENTED",
            ),
        )
        for call, code in refused:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code().name == code
    wait_job(client, job_id, "succeeded")


def test_a_client_that_hangs_up_in_the_middle_of_an_upload_leaves_nothing(system: System, client: OpenAI):
    before = [file.id for file in client.files.list()]
    stored_before = stored_files(system)
    port = int(system.running.http_url.rpartition(":")[2])
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {system.api_key}\r\nContent-Length: 100000000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        # More than one part, so that something has reached the store when the client leaves.
        connection.sendall(head.encode() + b"x" * 40_000_000)
    deadline_s = time.monotonic() + 60
    while stored_files(system) != stored_before:
        assert time.monotonic() < deadline_s, "the half of a file is still in the store"
        time.sleep(0.3)
    assert [file.id for file in client.files.list()] == before


def test_a_client_that_hangs_up_in_the_middle_of_a_stream_frees_the_model(system: System, client: OpenAI):
    stream = client.chat.completions.create(
        model=QUICKSTART_MODEL,
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=1500,
        stream=True,
        extra_body={"min_tokens": 1500},
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 30
    while _running_requests(system) > 0:
        assert time.monotonic() < deadline_s, "vLLM goes on generating for a client that left"
        time.sleep(0.3)


def test_a_client_that_hangs_up_before_the_first_byte_frees_the_model(system: System, client: OpenAI):
    impatient = client.with_options(timeout=15, max_retries=0)
    fields = {"model": QUICKSTART_MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 1500}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(impatient.chat.completions.create, **fields, extra_body={"min_tokens": 1500})
        while _running_requests(system) == 0:
            assert not asking.done(), "vLLM never worked on it"
            time.sleep(0.1)
        with pytest.raises(openai.APITimeoutError):
            asking.result()
    deadline_s = time.monotonic() + 30
    while _running_requests(system) > 0:
        assert time.monotonic() < deadline_s, "vLLM goes on generating for a client that left"
        time.sleep(0.3)


def test_a_taken_port_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "finery_cli",
            "up",
            "--state-dir",
            str(tmp_path),
            "--port",
            str(port),
            "--grpc-port",
            str(free_ports(1)[0]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 1
    assert f"Port {port} is taken" in done.stderr
    assert "--port" in done.stderr


def test_a_dead_service_is_started_again(system: System, client: OpenAI):
    pid = system.running.processes["dataprep"]
    os.kill(pid, signal.SIGKILL)
    job_id = create_job(client, LONG_SPEC | {"max_steps": 1})
    wait_job(client, job_id, "succeeded")


def stored_files(system: System) -> set[str]:
    """Keys of uploads in the store, finished multipart uploads or not."""
    settings = system.store_settings()
    store = Minio(settings.endpoint, settings.access_key, settings.secret_key, secure=False)
    prefix = "projects/default/files/"
    keys = {item.object_name or "" for item in store.list_objects(settings.bucket, prefix=prefix, recursive=True)}
    return keys | {upload.object_name for upload in store._list_multipart_uploads(settings.bucket, prefix=prefix).uploads}


def _running_requests(system: System) -> float:
    text = httpx.get(f"http://{system.running.metrics['serving']}/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))
