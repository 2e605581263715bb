"""The native REST API, its page, health and metrics."""

import json

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from finery.common.v1 import job_pb2
from finery.training.v1 import training_pb2
from finery_common.conversion_spec import ConversionSpec
from finery_common.errors import UnavailableError
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.messages import artifact_to_proto
from finery_common.rpc.tokens import TokenSigner
from finery_gateway.client import TrainingClient
from finery_gateway.errors import error_response

BASE = "SmolLM2-135M-Instruct"


@pytest.fixture
async def native(world):
    async with httpx.AsyncClient(base_url=f"{world.url}/api/v1", headers={"authorization": f"Bearer {world.api_key}"}) as plain:
        yield plain


async def _trained(world, client) -> str:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=await world.upload(), suffix="s")
    inner = world.training.job(job.id)
    inner.state = job_pb2.JOB_STATE_SUCCEEDED
    inner.adapter.CopyFrom(
        job_pb2.ArtifactRef(
            prefix=f"projects/{world.project}/adapters/{job.id}-20/", manifest_sha256="a" * 64, kind="adapter", size_bytes=9
        )
    )
    checkpoint = training_pb2.Checkpoint(name=f"{inner.name}/checkpoints/8", step=8, alias=f"ft:{BASE}:p:s:x:ckpt-step-8")
    checkpoint.adapter.CopyFrom(inner.adapter)
    checkpoint.adapter.prefix = f"projects/{world.project}/adapters/{job.id}-8/"
    checkpoint.create_time.CopyFrom(inner.create_time)
    world.training.checkpoints[inner.name] = [checkpoint]
    return job.id


async def test_a_dataset_is_made_listed_watched_and_deleted(native, world):
    file_id = await world.upload()
    made = await native.post("/datasets", json={"file": file_id, "base_model": BASE, "max_sequence_length": 512})
    assert made.status_code == 201
    dataset = made.json()
    assert (dataset["state"], dataset["spec"]["max_sequence_length"]) == ("running", 512)
    assert (await native.get(f"/datasets/{dataset['id']}")).json() == dataset
    assert [item["id"] for item in (await native.get("/datasets")).json()["data"]] == [dataset["id"]]
    stream = (await native.get(f"/datasets/{dataset['id']}/events")).text
    assert [line for line in stream.splitlines() if line.startswith("id:")] == ["id: 1", "id: 2", "id: 3"]
    resumed = (await native.get(f"/datasets/{dataset['id']}/events", headers={"last-event-id": "2"})).text
    assert json.loads(resumed.splitlines()[2].removeprefix("data: "))["message"] == "event 3"
    assert (await native.delete(f"/datasets/{dataset['id']}")).status_code == 204
    assert (await native.get(f"/datasets/{dataset['id']}")).status_code == 404


async def test_a_wrong_dataset_or_conversion_names_its_fields(native, world):
    answer = await native.post("/datasets", json={"file": "nonsense", "frobnicate": 1})
    assert answer.status_code == 400
    assert {item["field"] for item in answer.json()["error"]["violations"]} == {"file", "base_model", "frobnicate"}
    answer = await native.post("/datasets", json={"file": "file-" + "0" * 24, "base_model": BASE})
    assert answer.status_code == 404
    answer = await native.post("/conversions", json={"adapter": f"adapters/ftjob-{'0' * 24}-1", "type": "q8_0"})
    assert answer.status_code == 400
    assert "got q8_0 with format safetensors, wanted one of bf16" in answer.json()["error"]["message"]
    assert (await native.get("/nonsense")).json()["error"]["code"] == "unknown_url"
    assert (await native.put("/datasets")).status_code == 405


async def test_what_a_run_needs_is_estimated_without_a_job(native, world):
    spec = {"base_model": BASE, "lora": {"rank": 8}}
    answer = (await native.post("/estimate", json={"spec": spec})).json()
    assert (answer["gpu_memory"]["adapters_bytes"], answer["gpu_memory"]["total_bytes"], answer["host_bytes"]) == (8, 100, 7)
    assert answer["gpus"] == [{"index": 1, "name": "H200", "total_bytes": 200, "free_bytes": 150, "fits": True}]
    assert answer["fits"] is None
    assert not (await native.post("/estimate", json={"spec": spec, "device_memory_bytes": 99})).json()["fits"]
    assert not world.training.jobs


async def test_an_estimate_of_what_cannot_be_names_the_field(native):
    answer = await native.post("/estimate", json={"spec": {"base_model": BASE, "method": "full", "quantization": "nf4"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "spec.quantization"
    answer = await native.post("/estimate", json={"spec": {"base_model": BASE}, "device_memory_bytes": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "device_memory_bytes")


async def test_a_conversion_is_created(native):
    made = await native.post("/conversions", json={"adapter": f"adapters/ftjob-{'0' * 24}-1", "format": "gguf", "type": "q8_0"})
    assert made.status_code == 201
    spec = {"adapter": f"adapters/ftjob-{'0' * 24}-1", "format": "gguf", "type": "q8_0"}
    assert made.json()["spec"] == ConversionSpec.parse(spec).model_dump(mode="json"), "with every default said"


async def test_what_a_conversion_published_is_listed_and_read(native, world):
    made = (await native.post("/conversions", json={"adapter": f"adapters/ftjob-{'0' * 24}-1", "format": "gguf"})).json()
    unfinished = await native.get(f"/conversions/{made['id']}/files")
    assert unfinished.status_code == 409
    assert "has no files" in unfinished.json()["error"]["message"]
    with world.gateway.store.writer(f"projects/{world.project}/models/{made['id']}/", kind="model") as writer:
        writer.put_bytes("model.gguf", data=b"GGUF" * 1000)
        ref = writer.publish(made_from={}, spec={}, attempt="1")
    world.conversions.conversions[made["name"]].artifact.CopyFrom(artifact_to_proto(ref))
    assert [(item["name"], item["size_bytes"]) for item in (await native.get(f"/conversions/{made['id']}/files")).json()] == [
        ("model.gguf", 4000)
    ]
    assert (await native.get(f"/conversions/{made['id']}/files/model.gguf")).content == b"GGUF" * 1000
    missing = await native.get(f"/conversions/{made['id']}/files/other.gguf")
    assert missing.status_code == 404
    assert "model.gguf" in missing.json()["error"]["message"]


async def test_a_jobs_adapter_or_checkpoint_is_deployed_under_an_alias(native, client, world):
    job_id = await _trained(world, client)
    made = await native.post("/deployments", json={"job_id": job_id})
    assert made.status_code == 201
    assert made.json()["alias"] == f"ft:{BASE}:{world.project}:s:{job_id.removeprefix('ftjob-')}"
    assert made.json()["version"].startswith(f"{job_id}-20-")
    early = await native.post("/deployments", json={"job_id": job_id, "step": 8, "alias": "early"})
    assert early.json()["version"].startswith(f"{job_id}-8-")
    assert early.headers["etag"] == '"e1"'
    assert (await native.get("/deployments/early")).json() == early.json()
    assert len((await native.get("/deployments")).json()["data"]) == 2


async def test_a_deployment_under_an_old_etag_loses_nothing(native, client, world):
    job_id = await _trained(world, client)
    etag = (await native.post("/deployments", json={"job_id": job_id, "alias": "a"})).headers["etag"]
    newer = await native.post("/deployments", json={"job_id": job_id, "step": 8, "alias": "a"}, headers={"if-match": etag})
    assert newer.status_code == 201
    for refused in (
        await native.post("/deployments", json={"job_id": job_id, "alias": "a"}, headers={"if-match": etag}),
        await native.delete("/deployments/a", headers={"if-match": etag}),
    ):
        assert refused.status_code == 409
        assert refused.headers["x-should-retry"] == "false"
    assert (await native.delete("/deployments/a", headers={"if-match": newer.headers["etag"]})).status_code == 204


async def test_what_cannot_be_deployed_is_refused(native, client, stranger, world):
    job_id = await _trained(world, client)
    missing = await native.post("/deployments", json={"job_id": job_id, "step": 9})
    assert missing.status_code == 404
    assert "it has 8" in missing.json()["error"]["message"]
    world.training.job(job_id).ClearField("adapter")
    assert (await native.post("/deployments", json={"job_id": job_id})).status_code == 409
    assert (await native.post("/deployments", json={"job_id": job_id, "alias": "a/b"})).status_code == 400
    world.training.job(job_id).model.prefix = f"projects/{world.project}/models/{job_id}/"
    whole = await native.post("/deployments", json={"job_id": job_id})
    assert (whole.status_code, f"s3_prefix projects/{world.project}/models/{job_id}/" in whole.json()["error"]["message"]) == (409, True)
    world.training.job(job_id).ClearField("model")
    foreign = await native.post("/deployments", json={"job_id": job_id}, headers={"authorization": f"Bearer {stranger.api_key}"})
    assert foreign.status_code == 404


async def test_aliases_are_watched(native, world):
    world.serving.flip(world.project, "a", "v1")
    async with native.stream("GET", "/deployments/events") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "event: alias"
        assert json.loads((await anext(lines)).removeprefix("data: "))["version"] == "v1"


async def test_models_are_the_bases_and_the_projects_aliases_with_their_lineage(client, stranger, world):
    world.serving.flip(world.project, "m", "ftjob-1-8-cafe", job_id="ftjob-1")
    models = {model.id: model async for model in client.models.list()}
    assert models.keys() == {BASE, "m"}
    assert (models["m"].owned_by, models["m"].model_extra["base_model"], models["m"].model_extra["job_id"]) == (
        world.project,
        BASE,
        "ftjob-1",
    )
    assert (await client.models.retrieve("m")) == models["m"]
    assert (await client.models.retrieve(BASE)).owned_by == "finery"
    assert [model.id async for model in stranger.models.list()] == [BASE]
    for call in (stranger.models.retrieve, stranger.models.delete):
        with pytest.raises(openai.NotFoundError):
            await call("m")
    with pytest.raises(openai.ConflictError, match="base model"):
        await client.models.delete(BASE)
    gone = await client.models.delete("m")
    assert gone.deleted
    assert "Taken out of serving" in gone.model_extra["message"]
    assert [model.id async for model in client.models.list()] == [BASE]


async def test_every_base_model_that_is_served_is_a_model(client, native, world):
    world.serving.more_bases["other-base"] = "unix:///nowhere"
    assert [model.id async for model in client.models.list()] == [BASE, "other-base"]
    assert (await client.models.retrieve("other-base")).id == "other-base"
    with pytest.raises(openai.ConflictError, match="other-base is a base model"):
        await client.models.delete("other-base")
    assert [item["base_model"] for item in (await native.get("/replicas")).json()] == [BASE, "other-base"]


async def test_a_service_that_is_gone_is_503_without_addresses():
    channel = ServiceChannel("127.0.0.1:1", signer=TokenSigner("s" * 40), caller="gateway")
    with pytest.raises(UnavailableError, match="training service cannot be reached") as caught:
        await TrainingClient(channel).list_base_models("p")
    await channel.close()
    assert "127.0.0.1" not in caught.value.message
    assert error_response(caught.value).headers["retry-after"] == "2"


async def test_the_page_shows_every_path_and_loads_nothing(world):
    async with httpx.AsyncClient(base_url=world.url) as plain:
        page, api = (await plain.get("/docs")).text, (await plain.get("/openapi.json")).json()
    for path in api["paths"]:
        assert path in page
    assert "<script" not in page
    assert "src=" not in page
    assert "learning_rate_multiplier" in page


async def test_health_needs_no_key_and_everything_else_does(world):
    async with httpx.AsyncClient(base_url=world.url) as plain:
        assert (await plain.get("/healthz")).json() == {"ok": True}
        assert (await plain.get("/readyz")).json() == {"ready": True}
        api = (await plain.get("/openapi.json")).json()
        for path, methods in api["paths"].items():
            if path in ("/healthz", "/readyz"):
                continue
            for method in methods:
                answer = await plain.request(
                    method.upper(), path.replace("{job_id}", "ftjob-" + "0" * 24).replace("{file_id}", "file-" + "0" * 24)
                )
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_requests_are_counted_by_route_and_project(client, world):
    [model async for model in client.models.list()]
    labels = {"route": "/v1/models", "method": "GET", "status": "200", "project": world.project}
    assert REGISTRY.get_sample_value("finery_gateway_requests_total", labels) == 1
