"""The gateway as a process of its own: how it starts, what it says when it cannot, how it ends."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys

import httpx
import psutil
import pytest

from finery_gateway.settings import GatewaySettings


@pytest.fixture
def environment(tmp_path, seaweedfs) -> dict[str, str]:
    (tmp_path / "token").write_text("s" * 40)
    s3 = seaweedfs.settings
    nowhere = "127.0.0.1:1"
    return {
        **os.environ,
        "FINERY_STATE_DIR": str(tmp_path),
        "FINERY_TOKEN_SECRET_FILE": str(tmp_path / "token"),
        "FINERY_S3_ENDPOINT": s3.endpoint,
        "FINERY_S3_ACCESS_KEY": s3.access_key,
        "FINERY_S3_SECRET_KEY": s3.secret_key,
        "FINERY_S3_BUCKET": s3.bucket,
        "FINERY_HTTP_PORT": "0",
        "FINERY_GRPC_ADDRESS": "127.0.0.1:0",
        **dict.fromkeys(
            ("FINERY_DATAPREP_ADDRESS", "FINERY_TRAINER_ADDRESS", "FINERY_CONVERTER_ADDRESS", "FINERY_SERVING_ADDRESS"), nowhere
        ),
    }


async def _start(environment: dict[str, str]) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "finery_gateway", env=environment, stdout=pipe, stderr=pipe)


async def test_it_starts_writes_the_first_key_answers_and_drains(environment, tmp_path):
    process = await _start(environment)
    assert process.stderr is not None
    seen = []
    async with asyncio.timeout(60):
        while True:
            line = json.loads(await process.stderr.readline())
            seen.append(line)
            if line["event"] == "serving HTTP":
                break
    key = (tmp_path / "api_key").read_text().strip()
    assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600
    assert key not in json.dumps(seen)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{line['port']}", headers=headers) as plain:
        assert (await plain.get("/v1/files")).json()["data"] == []
        # The inner services are not there: that costs their routes, not the process.
        gone = await plain.get("/v1/models")
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "unavailable")
        assert (await plain.get("/readyz")).status_code == 200
    async with httpx.AsyncClient() as plain:
        assert "finery_gateway_requests_total" in (await plain.get(f"http://127.0.0.1:{line['metrics_port']}/metrics")).text
    process.send_signal(signal.SIGTERM)
    out, err = await asyncio.wait_for(process.communicate(), 25)
    assert process.returncode == 0
    assert out == b""
    lines = [json.loads(line) for line in err.splitlines()]
    requests = [(line["route"], line["status"], line["service"]) for line in lines if line["event"] == "request"]
    assert requests == [("/v1/files", 200, "gateway"), ("/v1/models", 503, "gateway")]
    assert key.encode() not in err


async def _until(process: asyncio.subprocess.Process, event: str, *, times: int = 1) -> list[dict]:
    """The log lines with `event`, once there are as many."""
    assert process.stderr is not None
    found = []
    async with asyncio.timeout(60):
        while len(found) < times:
            line = json.loads(await process.stderr.readline())
            found += [line] if line["event"] == event else []
    return found


async def test_workers_share_the_port_are_replaced_when_they_die_and_drain_at_the_end(environment, tmp_path):
    process = await _start(environment | {"FINERY_GATEWAY_WORKERS": "2"})
    (served,) = await _until(process, "serving HTTP")
    assert served["workers"] == 2
    workers = {line["worker"]: line for line in await _until(process, "a worker serves HTTP", times=2)}
    assert set(workers) == {0, 1}
    key = (tmp_path / "api_key").read_text().strip()
    url = f"http://127.0.0.1:{served['port']}"

    async def ask() -> int:
        # A new connection every time, so that both workers come to answer.
        async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as plain:
            return (await plain.get("/v1/files")).status_code

    async def counted() -> dict[int, int]:
        """What each worker has answered, by the port that it told Prometheus."""
        counts = {}
        for number in (0, 1):
            (target,) = json.loads((tmp_path / "prometheus" / f"gateway-worker-{number}.json").read_text())
            assert target["labels"] == {"service": "gateway-worker"}
            async with httpx.AsyncClient() as plain:
                text = (await plain.get(f"http://{target['targets'][0]}/metrics")).text
            lines = [line for line in text.splitlines() if line.startswith("finery_gateway_requests_total{")]
            counts[number] = sum(int(float(line.rpartition(" ")[2])) for line in lines)
        return counts

    assert await asyncio.gather(*(ask() for _ in range(40))) == [200] * 40
    assert sum((await counted()).values()) == 40

    children = [child for child in psutil.Process(process.pid).children() if "finery_gateway.workers" in child.cmdline()]
    assert len(children) == 2
    children[0].kill()
    # Whoever comes meanwhile is answered by the other one, or waits.
    assert await asyncio.gather(*(ask() for _ in range(10))) == [200] * 10
    (again,) = await _until(process, "a worker serves HTTP")
    assert again["worker"] in (0, 1)
    assert await ask() == 200

    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 25)
    assert process.returncode == 0
    assert not any(child.is_running() for child in children)
    assert list((tmp_path / "prometheus").glob("*.json")) == []


async def test_workers_end_with_a_killed_parent(environment):
    process = await _start(environment | {"FINERY_GATEWAY_WORKERS": "2"})
    await _until(process, "a worker serves HTTP", times=2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=25)
    assert alive == []


def test_a_small_machine_has_one_worker_and_a_large_one_four(monkeypatch):
    for cores, workers in ((1, 1), (2, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert GatewaySettings().num_workers == workers
    assert GatewaySettings(gateway_workers=7).num_workers == 7


async def test_a_taken_port_or_a_missing_setting_is_one_clear_line(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for changes, words in (
            ({"FINERY_HTTP_PORT": port}, [port, "FINERY_HTTP_PORT"]),
            ({"FINERY_GRPC_ADDRESS": f"127.0.0.1:{port}"}, [port, "FINERY_GRPC_ADDRESS"]),
            ({"FINERY_TRAINER_ADDRESS": ""}, ["FINERY_TRAINER_ADDRESS"]),
        ):
            process = await _start(environment | changes)
            _, err = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 1
            last = err.decode().strip().splitlines()[-1]
            assert all(word in last for word in words), last
            assert "Traceback" not in err.decode()
