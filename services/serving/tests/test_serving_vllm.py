"""Serving as a process with a real vLLM on its TLS port, a real store and SmolLM2: swaps under a running stream, room, projects.

Damaged adapters and a killed vLLM are in `tests/chaos`.

One process serves the whole module, each test under aliases of its own. vLLM holds two adapters at once here, so that room is short.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save_file

from finery.common.v1 import job_pb2
from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery_common.artifacts import ArtifactRef, ArtifactStore
from finery_common.catalogue import folder_sha256
from finery_common.errors import AlreadyExistsError, NotFoundError
from finery_common.rpc.channel import ServiceChannel, stream
from finery_common.rpc.tokens import TokenSigner
from finery_serving.preflight import base_shapes
from finery_serving.vllm_endpoint import TlsEndpoint

ROOT = Path(__file__).parents[3]
BASE = "SmolLM2-135M-Instruct"
PROJECT = "alpha"
RANK = 4
START_S = 240.0
RESOLVE_S = 30.0
PROMPT = [{"role": "user", "content": "Tell me about rivers."}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@dataclass
class Serving:
    """The process under test and how to reach it."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_port: int
    state_dir: Path
    signer: TokenSigner
    endpoint: TlsEndpoint

    @property
    def staged(self) -> set[str]:
        return {path.name for path in (self.state_dir / "cache" / "serving").glob("*") if not path.name.startswith(".")}


class Client:
    """The gRPC client of one project."""

    def __init__(self, serving: Serving, *, project: str) -> None:
        self.serving = serving
        self.project = project
        self.parent = f"projects/{project}"
        self.channel = ServiceChannel(serving.address, signer=serving.signer, caller="test")
        self.stub = serving_pb2_grpc.ServingServiceStub(self.channel.grpc)

    @property
    def credentials(self):
        return self.channel.metadata(project=self.project)

    async def deploy(self, alias: str, ref: ArtifactRef, *, request_id: str = "", canary_weight: int | None = None) -> serving_pb2.Alias:
        adapter = job_pb2.ArtifactRef(prefix=ref.prefix, manifest_sha256=ref.manifest_sha256, kind=ref.kind, size_bytes=ref.size_bytes)
        request = serving_pb2.DeployAdapterRequest(
            parent=self.parent,
            alias=alias,
            adapter=adapter,
            request_id=request_id or secrets.token_hex(8),
            canary_weight=canary_weight,
        )
        return await self.stub.DeployAdapter(request, metadata=self.credentials)

    async def get(self, alias: str) -> serving_pb2.Alias:
        return await self.stub.GetAlias(serving_pb2.GetAliasRequest(name=f"{self.parent}/aliases/{alias}"), metadata=self.credentials)

    async def delete(self, alias: str) -> None:
        await self.stub.DeleteAlias(serving_pb2.DeleteAliasRequest(name=f"{self.parent}/aliases/{alias}"), metadata=self.credentials)

    async def resolve(self, model: str, *, after_epoch: int = 0, timeout_s: float = RESOLVE_S) -> serving_pb2.Route:
        request = serving_pb2.ResolveModelRequest(parent=self.parent, model=model, after_epoch=after_epoch)
        return await self.stub.ResolveModel(request, metadata=self.credentials, timeout=timeout_s)

    async def until(self, alias: str, *states: str) -> serving_pb2.Alias:
        """The alias once its rollout is in one of `states`, by watching."""
        request = serving_pb2.WatchAliasesRequest(parent=self.parent)
        async for event in stream(self.stub.WatchAliases(request, metadata=self.credentials, timeout=START_S)):
            state = serving_pb2.RolloutState.Name(event.alias.rollout.state).removeprefix("ROLLOUT_STATE_")
            if event.alias.alias == alias and not event.deleted and state in states:
                return event.alias
        raise AssertionError("a watch has no end")

    async def loaded(self) -> set[str]:
        deployments = await self.stub.ListDeployments(serving_pb2.ListDeploymentsRequest(), metadata=self.credentials)
        return set(deployments.deployments[0].replicas[0].loaded_versions)

    async def answer(self, model: str, *, max_tokens: int = 8) -> str:
        async with self.ask(await self.resolve(model), model, max_tokens=max_tokens) as response:
            assert response.status_code == 200, await response.aread()
            body = json.loads(await response.aread())
        assert body["model"] == model
        return body["choices"][0]["message"]["content"]

    @contextlib.asynccontextmanager
    async def ask(self, route: serving_pb2.Route, alias: str, **fields: object) -> AsyncIterator[httpx.Response]:
        headers = {"x-finery-replica-token": route.targets[0].replicas[0].token, "x-finery-version": route.version, "x-finery-alias": alias}
        body = {"model": route.version, "messages": PROMPT, "temperature": 0, **fields}
        async with (
            self.serving.endpoint.async_client(timeout_s=120) as http,
            http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response,
        ):
            yield response


@pytest.fixture(scope="module")
def serving(
    base_model_dir: Path, object_store: ArtifactStore, vllm_certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    state_dir = tmp_path_factory.mktemp("serving")
    secret, catalogue = state_dir / "secret", state_dir / "catalogue.yaml"
    secret.write_text(secrets.token_hex(32))
    catalogue.write_text(f"models:\n  - name: {BASE}\n    path: {base_model_dir}\n    max_sequence_length: 512\n")
    grpc_port, metrics_port = free_port(), free_port()
    s3 = object_store.settings
    certificate, key = vllm_certificate
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "VLLM_LISTEN_ADDRESS": address,
        "VLLM_ADVERTISE_ADDRESS": address,
        "VLLM_TLS_CERT_FILE": certificate,
        "VLLM_TLS_KEY_FILE": key,
        "VLLM_CA_FILE": certificate,
        "VLLM_PYTHON": os.environ.get("FINERY_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python")),
        "STATE_DIR": state_dir,
        "GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
        "METRICS_PORT": metrics_port,
        "S3_ENDPOINT": s3.endpoint,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "S3_BUCKET": s3.bucket,
        "TOKEN_SECRET_FILE": secret,
        "CATALOGUE": catalogue,
        "MAX_LORAS": 2,
        "MAX_CPU_LORAS": 2,
        "MAX_LORA_RANK": 8,
        "VLLM_KV_CACHE_GIB": 1,
    }
    environment = {**os.environ, **{f"FINERY_{name}": str(value) for name, value in settings.items()}}
    with (state_dir / "serving.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "finery_serving"], env=environment, stdout=log, stderr=log)
    endpoint = TlsEndpoint(address, address, certificate, key, certificate)
    made = Serving(process, f"127.0.0.1:{grpc_port}", metrics_port, state_dir, TokenSigner(secret.read_text()), endpoint)
    wait_healthy(made)
    children: list[psutil.Process] = []
    try:
        yield made
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        code = process.wait(timeout=40)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert (code, alive) == (0, []), (state_dir / "serving.log").read_text()[-4000:]


@pytest.fixture
async def client(serving: Serving) -> AsyncIterator[Client]:
    made = Client(serving, project=PROJECT)
    await made.resolve(BASE, timeout_s=START_S)
    yield made
    await made.channel.close()


@pytest.fixture(scope="module")
def adapters(base_model_dir: Path, object_store: ArtifactStore, tmp_path_factory: pytest.TempPathFactory):
    """Publishes an adapter of random weights: another seed says something else."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = base_shapes(base_model_dir)
    sha256 = folder_sha256(base_model_dir, memo_dir=folder / "digests")

    def publish(seed: int) -> ArtifactRef:
        generator = np.random.default_rng(seed)
        tensors = {}
        for name, (outputs, inputs) in ((name, shape) for name, shape in shapes.items() if "q_proj" in name or "down_proj" in name):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, inputs**-0.5, (RANK, inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.5, (outputs, RANK)).astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        weights = (folder / "adapter_model.safetensors").read_bytes()
        peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": ["q_proj", "down_proj"]}
        job_id = f"ftjob-{secrets.token_hex(12)}"
        with object_store.writer(f"projects/{PROJECT}/adapters/{job_id}-20/", kind="adapter") as writer:
            writer.put_bytes("adapter_config.json", data=json.dumps(peft).encode())
            writer.put_bytes("adapter_model.safetensors", data=weights)
            metadata = {"base_model": BASE, "base_model_sha256": sha256, "job_id": job_id, "step": 20}
            return writer.publish(made_from={"base_model": sha256}, spec={}, attempt="1", metadata=metadata)

    return publish


async def test_the_base_model_answers_and_tells_its_name(client):
    route = await client.resolve(BASE)
    assert (route.version, route.epoch, route.base_model, route.max_model_len) == (BASE, 0, BASE, 512)
    assert route.targets[0].replicas[0].address == client.serving.endpoint.address
    assert await client.answer(BASE)


async def test_a_deployed_adapter_answers_under_its_alias_as_soon_as_it_is_resolved(client, adapters):
    alias = f"ft:{BASE}:{PROJECT}:first:1"
    made = await client.deploy(alias, adapters(1))
    assert (made.version, made.rollout.state) == ("", serving_pb2.ROLLOUT_STATE_PENDING)
    # Waits for the rollout: no polling by the caller.
    route = await client.resolve(alias)
    assert route.epoch == 1
    assert await client.answer(alias) != await client.answer(BASE)
    ready = await client.until(alias, "READY")
    assert ready.version == route.version
    assert 0 < ready.rollout.swap_seconds < 10
    await client.delete(alias)


async def test_a_swap_leaves_a_running_stream_unharmed(client, adapters):
    first, second = adapters(2), adapters(3)
    for alias, ref in (("swap-reference", first), ("swap", first)):
        await client.deploy(alias, ref)
    old = await client.resolve("swap")
    expected = await client.answer("swap-reference", max_tokens=64)
    await client.delete("swap-reference")

    raw, flipped = b"", None
    async with client.ask(old, "swap", stream=True, max_tokens=64, ignore_eos=True) as response:
        async for chunk in response.aiter_bytes():
            raw += chunk
            if flipped is None:
                await client.deploy("swap", second)
                flipped = await client.resolve("swap", after_epoch=old.epoch)
                after_swap = await client.answer("swap")
                draining = await client.until("swap", "DRAINING", "READY")
                assert (draining.version, draining.rollout.state) == (flipped.version, serving_pb2.ROLLOUT_STATE_DRAINING)
    events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert raw.endswith(b"data: [DONE]\n\n")
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert text.startswith(expected[:200])
    assert {event["model"] for event in events} == {"swap"}
    assert old.version.encode() not in raw

    assert flipped is not None
    assert flipped.version != old.version
    assert flipped.epoch == old.epoch + 1
    assert await client.answer("swap") == after_swap != expected[: len(after_swap)]
    await client.until("swap", "READY")
    async with client.ask(old, "swap") as response:
        assert (response.status_code, response.headers["x-finery-retired"]) == (409, "1")
    assert await client.loaded() == {flipped.version}
    await client.delete("swap")


async def test_a_canary_answers_beside_what_serves_and_takes_its_place(client, adapters):
    async def says(version: str) -> str:
        route = await client.resolve("split")
        route.version = version
        async with client.ask(route, "split", max_tokens=8) as response:
            assert response.status_code == 200
            body = json.loads(await response.aread())
        assert body["model"] == "split"
        return body["choices"][0]["message"]["content"]

    await client.deploy("split", adapters(20))
    old = await client.until("split", "READY")
    await client.deploy("split", adapters(21), canary_weight=25)
    canary = await client.until("split", "CANARY")
    route = await client.resolve("split")
    assert [(target.version, target.weight) for target in route.targets] == [(old.version, 75), (canary.canary.version, 25)]
    assert await client.loaded() == {old.version, canary.canary.version}
    before, beside = await says(old.version), await says(canary.canary.version)
    assert before != beside
    name = f"{client.parent}/aliases/split"
    promote = serving_pb2.PromoteAliasRequest(name=name, etag=canary.etag, request_id=secrets.token_hex(8))
    assert (await client.stub.PromoteAlias(promote, metadata=client.credentials)).version == canary.canary.version
    assert await client.answer("split") == beside
    await client.until("split", "READY")
    assert await client.loaded() == {canary.canary.version}
    roll_back = serving_pb2.RollBackAliasRequest(name=name, request_id=secrets.token_hex(8))
    await client.stub.RollBackAlias(roll_back, metadata=client.credentials)
    assert (await client.until("split", "READY")).version == old.version
    assert await client.answer("split") == before
    await client.delete("split")


async def test_of_two_deploys_the_later_wins(client, adapters):
    first, second = adapters(4), adapters(5)
    await client.deploy("race", first)
    made = await client.deploy("race", second)
    ready = await client.until("race", "READY")
    assert (ready.version, ready.epoch) == (made.rollout.version, 2)
    await client.delete("race")


async def test_an_adapter_that_does_not_exist_is_refused_and_makes_no_alias(client):
    ref = ArtifactRef(prefix=f"projects/{PROJECT}/adapters/ftjob-none-1/", manifest_sha256="0" * 64, kind="adapter", size_bytes=1)
    with pytest.raises(NotFoundError, match="There is no artifact"):
        await client.deploy("nothing", ref)
    with pytest.raises(NotFoundError, match="There is no model"):
        await client.resolve("nothing")


async def test_more_versions_than_vllm_holds_all_answer(client, adapters):
    refs = {f"many-{number}": adapters(10 + number) for number in range(3)}
    for alias, ref in refs.items():
        await client.deploy(alias, ref)
        await client.until(alias, "READY")
    first = {alias: await client.answer(alias) for alias in refs}
    assert len(set(first.values())) == 3
    assert {alias: await client.answer(alias) for alias in refs} == first
    assert len(await client.loaded()) <= 2
    for alias in refs:
        await client.delete(alias)


async def test_a_deleted_alias_is_gone_at_once_and_its_copy_soon(client, adapters):
    ref = adapters(9)
    await client.deploy("gone", ref)
    route = await client.resolve("gone")
    assert ref.manifest_sha256 in client.serving.staged
    await client.delete("gone")
    with pytest.raises(NotFoundError):
        await client.resolve("gone")
    with pytest.raises(NotFoundError):
        await client.get("gone")
    await eventually(lambda: ref.manifest_sha256 not in client.serving.staged)
    async with client.ask(route, "gone") as response:
        assert response.status_code == 409


async def test_a_repeated_deploy_is_one_rollout(client, adapters):
    ref, other = adapters(30), adapters(31)
    await client.deploy("once", ref, request_id="the-request")
    await client.until("once", "READY")
    again = await client.deploy("once", ref, request_id="the-request")
    assert (again.epoch, again.rollout.state) == (1, serving_pb2.ROLLOUT_STATE_READY)
    with pytest.raises(AlreadyExistsError):
        await client.deploy("once", other, request_id="the-request")
    await client.delete("once")


async def test_another_project_sees_nothing(client, adapters):
    ref = adapters(32)
    await client.deploy("private", ref)
    await client.resolve("private")
    stranger = Client(client.serving, project="beta")
    for call in (stranger.resolve("private"), stranger.get("private"), stranger.delete("private"), stranger.deploy("mine", ref)):
        with pytest.raises(NotFoundError):
            await call
    assert await stranger.loaded() == set()
    assert (await stranger.resolve(BASE)).version == BASE
    await stranger.channel.close()
    await client.delete("private")


async def test_vllm_refuses_a_wrong_token_and_other_paths(client):
    route = await client.resolve(BASE)
    route.targets[0].replicas[0].token += "x"
    async with client.ask(route, BASE) as response:
        assert response.status_code == 401
    async with client.serving.endpoint.async_client(timeout_s=10) as http:
        assert (await http.post("/adapters", json={"name": "x", "src": "/"})).status_code == 404
        assert (await http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/"})).status_code == 401
        assert (await http.get("/docs")).status_code == 404
    async with httpx.AsyncClient(base_url=f"http://{client.serving.endpoint.advertise_address}") as plain:
        with pytest.raises(httpx.RemoteProtocolError):
            await plain.get("/health")


async def test_metrics_tell_of_adapters_and_pass_vllms_own_on(client, adapters):
    await client.deploy("measured", adapters(33))
    route = await client.resolve("measured")
    await client.answer("measured")
    await eventually(lambda: 'finery_serving_adapter_state{adapter="measured",replica="replica-' in metrics(client.serving))
    text = metrics(client.serving)
    assert f'version="{route.version}"}} 1.0' in text
    assert "finery_serving_swap_seconds_count" in text
    assert "finery_serving_adapter_load_seconds_count" in text
    assert "finery_serving_requests_in_flight" in text
    assert any(line.startswith("vllm:generation_tokens_total{") and 'replica="replica-' in line for line in text.splitlines())
    await client.delete("measured")


def metrics(serving: Serving) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{serving.metrics_port}/metrics", timeout=10) as answer:
        return answer.read().decode()


async def eventually(holds) -> None:
    """Waits until `holds()`, for what only shows from outside."""
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def wait_healthy(serving: Serving) -> None:
    deadline = time.monotonic() + 60
    with grpc.insecure_channel(serving.address) as channel:
        while time.monotonic() < deadline and serving.process.poll() is None:
            with contextlib.suppress(grpc.RpcError):
                if health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1).status == 1:
                    return
            time.sleep(0.1)
    serving.process.kill()
    pytest.fail((serving.state_dir / "serving.log").read_text()[-4000:], pytrace=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
