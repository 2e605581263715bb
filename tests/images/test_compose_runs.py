"""compose.yaml runs: our images as it says, with this machine's store, database and Prometheus in the places of others' images.

Without Docker, in chroots; `FINERY_TEST_DOCKER=1` has Docker do the same, and restart what is killed.
Grafana is not there, nor what the profile `gpu` adds.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from images import docker_host, substitutes
from images.compose_host import PROGRAMS, ComposeHost, forbidden_network, prepare
from images.containers import Image, absent
from images.docker_host import DockerHost

from finery_cli.local.ports import free_ports
from finery_common.probe import trouble

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
OURS = ("gateway", "dataprep", "converter")
OTHERS = {"minio": substitutes.store, "postgres": substitutes.postgres, "prometheus": substitutes.prometheus}
Host = ComposeHost | DockerHost
MODEL = "Qwen3-8B"
ROWS = 20 * '{"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A row."}]}\n'


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The running system, started as README.md of deploy/compose says."""
    folder = tmp_path_factory.mktemp("compose")
    make = _by_docker if os.environ.get(docker_host.WANTED) else _in_chroots
    host = make(request, folder, base_model_dir)
    with host.network():
        host.up()
        yield host


def _in_chroots(request: pytest.FixtureRequest, folder: Path, base_model_dir: Path) -> ComposeHost:
    image_of: Callable[[str], Image] = request.getfixturevalue("image_of")
    images = {name: image_of(name) for name in OURS}
    if programs := absent((*PROGRAMS, "prometheus", "pg_isready")):
        pytest.fail(f"{', '.join(programs)} missing; `make setup-system` installs them", pytrace=False)
    if reason := forbidden_network():
        pytest.skip(f"compose.yaml cannot be run: {reason}")
    compose = prepare(folder)
    _choose(compose, base_model_dir)
    others = {name: make(folder / "substitutes" / name) for name, make in OTHERS.items()}
    return ComposeHost(compose, others | images, state=folder)


def _by_docker(request: pytest.FixtureRequest, folder: Path, base_model_dir: Path) -> DockerHost:
    compose = prepare(folder)
    _choose(compose, base_model_dir)
    images = docker_host.load_images(request.getfixturevalue("image_store"), folder)
    with (compose / ".env").open("a") as env:
        env.writelines(f"{name}={image}\n" for name, image in images.items())
    return DockerHost(compose, (*OURS, *OTHERS))


def _choose(compose: Path, base_model_dir: Path) -> None:
    """What is the user's to set: ports, here free ones; more workers; the catalogue's model, here a small one without weights."""
    names = ("HTTP_PORT", "GRPC_PORT", "PROMETHEUS_PORT")
    with (compose / ".env").open("a") as env:
        env.writelines(f"{name}={port}\n" for name, port in zip(names, free_ports(3), strict=True))
    (compose / "finery.env").write_text("FINERY_GATEWAY_WORKERS=2\n")
    model = compose / "models" / MODEL
    shutil.copytree(base_model_dir, model, ignore=shutil.ignore_patterns("*.safetensors"))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.fixture
def client(host: Host) -> Iterator[openai.OpenAI]:
    """At the published port, with the key that the gateway made at its first start."""
    key = host.containers["gateway"].execute("cat", "/var/lib/finery/api_key").stdout.strip()
    with openai.OpenAI(base_url=f"http://{host.published('gateway', 8080)}/v1", api_key=key, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def native(client: openai.OpenAI) -> Iterator[httpx.Client]:
    base_url = str(client.base_url).replace("/v1", "/api/v1")
    with httpx.Client(base_url=base_url, headers=client.auth_headers, timeout=60) as native:
        yield native


def test_what_the_profile_gpu_would_do_is_refused_in_words_and_the_rest_works(host, client, native):
    file = client.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    for ask in (
        lambda: client.fine_tuning.jobs.create(model=MODEL, training_file=file.id),
        lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}]),
        lambda: client.files.delete(file.id),
    ):
        with pytest.raises(openai.InternalServerError, match="cannot be reached at the moment") as refused:
            ask()
        assert refused.value.status_code == 503
    # The converter's own words.
    answer = native.post("conversions", json={"adapter": f"adapters/ftjob-{'0' * 24}-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found"), answer.text
    made = host.containers["gateway"].execute("python", "-m", "finery_gateway.keys", "create", "--project", "other")
    assert client.with_options(api_key=made.stdout.strip()).files.list().data == []
    assert trouble(f"grpc://{host.published('gateway', 8081)}") == ""


def test_prometheus_has_the_rules_and_finds_every_process_that_runs(host):
    url = f"http://{host.published('prometheus', 9090)}/api/v1"
    assert httpx.get(f"{url}/rules").json()["data"]["groups"] != []
    wanted = sorted([*((name, "up") for name in OURS), *[("gateway-worker", "up")] * 2, ("serving", "down"), ("trainer", "down")])
    deadline_s = time.monotonic() + 60
    while True:
        targets = [item for item in httpx.get(f"{url}/targets").json()["data"]["activeTargets"] if item["labels"]["job"] == "finery"]
        found = sorted((target["labels"]["service"], target["health"]) for target in targets)
        if found == wanted or time.monotonic() > deadline_s:
            break
        time.sleep(1)
    assert found == wanted, targets


def test_a_file_and_its_dataset_are_there_after_all_have_ended_with_0_and_started_again(host, client, native):
    file = client.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    assert file.id in [item.id for item in client.files.list()]
    made = native.post("datasets", json={"file": file.id, "base_model": MODEL, "max_sequence_length": 512}).json()
    # They end with its preparation.
    events = native.get(f"datasets/{made['id']}/events").text
    before = native.get(f"datasets/{made['id']}").json()
    assert before["state"] == "succeeded", events
    statuses = host.stop()
    del statuses["minio"]
    assert statuses == dict.fromkeys((*OURS, "postgres", "prometheus"), 0), {name: host.containers[name].log for name in statuses}
    host.up()
    assert native.get(f"datasets/{made['id']}").json() == before
    assert client.files.content(file.id).text == ROWS


@pytest.mark.skipif(not os.environ.get(docker_host.WANTED), reason=f"Docker's part, which {docker_host.WANTED}=1 asks for")
def test_what_is_killed_is_started_again(host, client, native):
    made = client.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
    for name in (*OURS, "postgres"):
        host.containers[name].kill()
    host.up()
    assert made.id in [item.id for item in client.files.list()]
    # The converter reads its own rows, and dataprep prepares.
    assert native.get("conversions").json()["data"] == []
    dataset = native.post("datasets", json={"file": made.id, "base_model": MODEL, "max_sequence_length": 512}).json()
    assert "succeeded" in native.get(f"datasets/{dataset['id']}/events").text
