"""EstimateResources over a real channel, and how this machine's GPUs are told."""

from __future__ import annotations

import pytest

from finery.training.v1 import spec_pb2, training_pb2
from finery_common.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from finery_common.spec import TrainingSpec
from finery_trainer import service
from finery_trainer.devices import Gpu, among, parse, visible_gpus
from finery_trainer.engine.passes import RESERVE_BYTES

CSV = """0, GPU-aaaa1111, NVIDIA H200, 143771, 143000
1, GPU-bbbb2222, NVIDIA L4, 23034, 22563
2, GPU-cccc3333, NVIDIA Thor, [N/A], [N/A]
"""
MIB = 1 << 20
H200 = Gpu(index=0, uuid="GPU-aaaa1111", name="NVIDIA H200", total_bytes=143771 * MIB, free_bytes=143000 * MIB)
SMALL = Gpu(index=1, uuid="GPU-bbbb2222", name="Small", total_bytes=MIB, free_bytes=MIB // 2)


def test_gpus_are_read_from_what_nvidia_smi_prints():
    gpus = parse(CSV)
    assert gpus[0] == H200
    assert [gpu.index for gpu in gpus] == [0, 1], "one without numbers cannot be judged"


@pytest.mark.parametrize(
    ("variable", "indices"), [(None, [0, 1]), ("", []), ("1", [1]), ("1,0", [1, 0]), ("GPU-bb", [1]), ("1,7,0", [1]), ("-1", [])]
)
def test_only_visible_gpus_are_told(variable, indices):
    assert [gpu.index for gpu in among(parse(CSV), variable)] == indices


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus(None) == ()


@pytest.mark.parametrize("exit_status", [0, 9])
def test_the_driver_is_asked_and_may_fail(monkeypatch, tmp_path, exit_status):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{CSV}'\nexit {exit_status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [gpu.index for gpu in visible_gpus(None)] == ([0, 1] if exit_status == 0 else [])


async def ask(system, *, parent=None, **fields) -> training_pb2.EstimateResourcesResponse:
    memory = fields.pop("device_memory_bytes", None)
    spec = TrainingSpec.parse({"base_model": "tiny", "max_sequence_length": 64, **fields}).to_proto(spec_pb2.TrainingSpec)
    request = training_pb2.EstimateResourcesRequest(parent=parent or f"projects/{system.project}", spec=spec, device_memory_bytes=memory)
    return await system.stub.EstimateResources(request, metadata=system.metadata())


async def test_a_run_is_estimated_by_part_before_anything_is_loaded(system, monkeypatch):
    monkeypatch.setattr(service, "visible_gpus", lambda _: (H200, SMALL))
    async with system.started():
        answer = await ask(system)
        longer = await ask(system, batch={"micro_batch_size": 8})
    parts = {field.name: value for field, value in answer.gpu_memory.ListFields()}
    total = parts.pop("total_bytes")
    assert parts.keys() == {
        f"{name}_bytes" for name in ("weights", "adapters", "gradients", "optimizer_states", "activations", "workspace")
    }
    assert total == sum(parts.values())
    assert [(gpu.index, gpu.name, gpu.fits) for gpu in answer.gpus] == [(0, "NVIDIA H200", True), (1, "Small", False)]
    assert not answer.HasField("fits")
    assert longer.gpu_memory.activations_bytes > answer.gpu_memory.activations_bytes
    assert not list(system.settings.state_dir.glob("work/*"))


async def test_another_machines_gpu_can_be_asked_about(system, monkeypatch):
    monkeypatch.setattr(service, "visible_gpus", lambda _: ())
    async with system.started():
        need = (await ask(system)).gpu_memory.total_bytes + RESERVE_BYTES
        assert (await ask(system, device_memory_bytes=need)).fits
        assert not (await ask(system, device_memory_bytes=need - 16 * MIB)).fits
        assert not (await ask(system, device_memory_bytes=need, memory={"budget": 0.5})).fits
        with pytest.raises(InvalidArgumentError, match="device_memory_bytes: got 0"):
            await ask(system, device_memory_bytes=0)


async def test_what_cannot_be_estimated_is_named(system):
    async with system.started():
        with pytest.raises(NotFoundError, match="there are: tiny, gone"):
            await ask(system, base_model="gpt")
        with pytest.raises(NotFoundError, match=r"Base model gone: .*config.json"):
            await ask(system, base_model="gone")
        with pytest.raises(InvalidArgumentError, match="got 65, wanted at most 64"):
            await ask(system, max_sequence_length=65)
        with pytest.raises(InvalidArgumentError, match="got 'nothing', which is no linear layer"):
            await ask(system, lora={"target_modules": ["nothing"]})
        with pytest.raises((PermissionDeniedError, NotFoundError)):
            await ask(system, parent="projects/another")
