"""A worker without a model: its line to a server that has bad moments, what it publishes, the folders and processes it leaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch

from finery.training.v1 import worker_pb2, worker_pb2_grpc
from finery_common.artifacts import ArtifactRef
from finery_common.errors import DeadlineExceededError, FailedPreconditionError, InternalError, InvalidArgumentError, ResourceExhaustedError
from finery_common.rpc.server import RpcServer, Servicer, token_authenticator
from finery_common.rpc.tokens import Principal, TokenSigner
from finery_common.spec import TrainingSpec
from finery_trainer import machine
from finery_trainer.client import Assignment, Command
from finery_trainer.engine import adapter as adapters
from finery_trainer.engine.loop import Action, Outcome, StepReport
from finery_trainer.launchers import work_dir
from finery_trainer.launchers.local import LocalLauncher
from finery_trainer.link import Link, ServerGone
from finery_trainer.machine import check_machine, cpu_limit, use_cpus
from finery_trainer.records import StepMetrics
from finery_trainer.requests import check_target_modules
from finery_trainer.settings import WorkerSettings
from finery_trainer.worker import Inputs, Stopped, Worker, _Run

JOB = "ftjob-" + "1" * 24
STEP = StepMetrics(1, 6, 0.2, 2.5, 1e-4, 0.3, 100.0, 50, 2**20)


class Server(worker_pb2_grpc.WorkerServiceServicer):
    """Answers with each of `errors` once."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.num_beats = 0
        self.action = worker_pb2.WORKER_ACTION_CONTINUE

    async def Heartbeat(self, request, context):
        self.num_beats += 1
        self._fail()
        return worker_pb2.WorkerCommand(action=self.action)

    async def ReportStep(self, request, context):
        self._fail()
        return worker_pb2.WorkerCommand(action=worker_pb2.WORKER_ACTION_PAUSE)

    def _fail(self):
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
async def serve():
    signer, servers = TokenSigner("s" * 40), []

    async def start(server: Server) -> dict[str, str]:
        add = partial(worker_pb2_grpc.add_WorkerServiceServicer_to_server, server)
        servicers = [Servicer("finery.training.v1.WorkerService", add)]
        servers.append(RpcServer(address="127.0.0.1:0", servicers=servicers, authenticate=token_authenticator(signer)))
        return {"address": f"127.0.0.1:{await servers[-1].start()}", "token": signer.sign(Principal("worker", "p", JOB, 1))}

    yield start
    for server in servers:
        await server.stop(drain_s=0)


async def test_a_base_model_that_another_process_fetches_is_awaited(serve, tmp_path):
    server, folder = Server(), tmp_path / "base"

    def wait(wait_s) -> None:
        settings = WorkerSettings(worker_token_file=tmp_path / "token", worker_base_wait_s=wait_s)
        Worker(settings, link=link, was_stopped=lambda: False)._await_base(folder)

    with Link(**await serve(server), heartbeat_s=0.1, tolerance_s=30) as link:
        await asyncio.to_thread(wait, 0)
        with pytest.raises(DeadlineExceededError, match=r"base was not there after 0 s; look at what fetches base models"):
            await asyncio.to_thread(wait, 0.1)
        waiting = asyncio.create_task(asyncio.to_thread(wait, 30))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        folder.mkdir()
        await asyncio.wait_for(waiting, 10)
        folder.rmdir()
        server.action = worker_pb2.WORKER_ACTION_PAUSE
        with pytest.raises(Stopped):
            await asyncio.to_thread(wait, 30)


async def test_a_server_in_trouble_gets_the_report_again(serve):
    where = await serve(Server(ResourceExhaustedError("the database is full"), InternalError("a bug")))
    with Link(**where, heartbeat_s=60, tolerance_s=30) as link:
        assert await asyncio.to_thread(link.report, lambda client: client.report_step(STEP)) is Command.PAUSE


async def test_trouble_that_outlasts_the_tolerance_ends_the_attempt(serve):
    where = await serve(Server(*[InternalError("a bug")] * 1000))
    with Link(**where, heartbeat_s=60, tolerance_s=0.5) as link, pytest.raises(ServerGone, match="a bug"):
        await asyncio.to_thread(link.ask, lambda client: client.report_step(STEP))


async def test_a_refused_heartbeat_is_not_the_last(serve, wait_until):
    server = Server(InvalidArgumentError("no"))
    with Link(**await serve(server), heartbeat_s=0.05, tolerance_s=30) as link:

        async def has_beaten_again() -> bool:
            return server.num_beats >= 3

        await wait_until(has_beaten_again)
        assert link.check() is Command.CONTINUE


def ref(kind) -> ArtifactRef:
    return ArtifactRef(prefix=f"projects/p/{kind}/", kind=kind, manifest_sha256="0" * 64, size_bytes=1)


class Publications:
    """Stands for Publisher and Link: notes what is published."""

    def __init__(self):
        self.published: list[str] = []

    def _publish(self, kind, step):
        self.published.append(f"{kind} {step}")
        return ref(kind)

    def state(self, folder, *, step):
        return self._publish("checkpoint", step)

    def adapter(self, folder, *, step):
        return self._publish("adapter", step)

    def metrics(self, folder, *, step):
        return self._publish("metrics", step)

    def ask(self, call):
        return None


def test_the_last_steps_adapter_is_published_once(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "save", lambda *_args, **_fields: None)
    spy = Publications()
    assignment = Assignment("p", JOB, 1, TrainingSpec(base_model="tiny"), ref("dataset"), None, None)
    inputs = Inputs(tmp_path, "0" * 64, tmp_path, None, None)
    run = _Run(cast("object", None), assignment, inputs, work_dir=tmp_path, publisher=spy, link=spy, was_stopped=lambda: False)
    for step in (3, 6):
        report = StepReport(step, 6, step / 3, 2.5, 1e-4, 0.3, 100.0, 50, 2**20, None, is_epoch_end=True)
        run.on_checkpoint(report, lambda _folder: None)
    run.finish(Outcome(Action.CONTINUE, report))
    assert spy.published == ["checkpoint 3", "adapter 3", "checkpoint 6", "adapter 6", "metrics 6"]
    assert not list(tmp_path.glob("*-*"))


async def test_the_service_removes_what_killed_workers_left(system):
    left = work_dir(system.settings.state_dir, job_id=JOB, epoch=2)
    (left / "state-x").mkdir(parents=True)
    async with system.started():
        assert not left.exists()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


async def test_an_orderly_end_is_also_that_of_workers_of_a_killed_service(tmp_path):
    def note(process: subprocess.Popen[bytes], *, epoch: int, created: float) -> Path:
        file = tmp_path / "run" / f"worker-{JOB}-{epoch}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"job_id": JOB, "epoch": epoch, "pid": process.pid, "created": created}))
        return file

    processes = [sleeper(), sleeper()]
    try:
        worker, stranger = processes
        notes = [
            note(worker, epoch=1, created=psutil.Process(worker.pid).create_time()),
            note(stranger, epoch=2, created=psutil.Process(stranger.pid).create_time() - 1000),
        ]
        launcher = LocalLauncher(trainer_address="127.0.0.1:1", state_dir=tmp_path)
        assert worker.poll() is None
        await launcher.stop_all(grace_s=10)
        assert await asyncio.to_thread(worker.wait, 10) < 0
        assert stranger.poll() is None, "another process has that id by now"
        assert not any(file.exists() for file in notes)
        assert [(ended.epoch, ended.was_stopped) for ended in launcher.take_exits()] == [(1, True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("fields", "num_gpus", "has_bitsandbytes", "text"),
    [
        ({"gpus": 2}, 1, True, "gpus: got 2, but 1 is visible to the worker; lower it to 1"),
        ({"gpus": 2}, 0, True, "got 2, but 0 are visible"),
        ({"gpus": 8}, 4, True, "lower it to 4"),
        ({"quantization": "nf4"}, 1, False, "got nf4, which needs the package bitsandbytes"),
        ({"quantization": "int8"}, 0, False, "got int8"),
    ],
)
def test_what_this_machine_lacks_is_named_before_anything_is_loaded(fields, num_gpus, has_bitsandbytes, text):
    spec = TrainingSpec.parse({"base_model": "tiny", **fields})
    with pytest.raises(FailedPreconditionError, match=text) as caught:
        check_machine(spec, num_gpus=num_gpus, has_bitsandbytes=has_bitsandbytes)
    assert caught.value.param == f"spec.{next(iter(fields))}"
    assert check_machine(spec, num_gpus=8, has_bitsandbytes=True) is None


async def test_gpus_that_this_machine_has_not_are_refused_before_there_is_a_job(system):
    async with system.started():
        with pytest.raises(FailedPreconditionError, match="gpus: got 64, but .* visible to the worker; lower it to") as caught:
            await system.create(spec={"gpus": 64}, deploy=False)
    assert caught.value.param == "spec.gpus"


async def test_modules_that_the_base_model_has_not_are_refused_before_there_is_a_job(system):
    async with system.started():
        with pytest.raises(InvalidArgumentError, match="got 'c_attn', which tiny has not; it has down_proj, .*v_proj") as caught:
            await system.create(spec={"lora": {"target_modules": ["q_proj", "c_attn"]}}, deploy=False)
        await system.create(spec={"lora": {"target_modules": ["self_attn.q_proj", "lm_head"]}}, deploy=False)
    assert caught.value.param == "spec.lora.target_modules"


def test_names_of_modules_are_read_from_an_index_and_judged_only_where_they_can_be(tmp_path):
    spec = TrainingSpec.parse({"base_model": "m", "lora": {"target_modules": ["q_proj"]}})
    index = tmp_path / "model.safetensors.index.json"
    for text in ("garbage", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        assert check_target_modules(spec, tmp_path) is None
    assert check_target_modules(spec, tmp_path / "nowhere") is None
    names = ["h.0.attn.c_attn.weight", "h.0.ln_1.weight", "wte.weight", "embed_tokens.weight"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    with pytest.raises(InvalidArgumentError, match="got 'q_proj', which m has not; it has c_attn, lm_head, wte"):
        check_target_modules(spec, tmp_path)


async def test_several_gpus_for_a_model_outside_the_families_are_refused_before_there_is_a_job(system):
    base_dir = system.settings.state_dir / "base"
    base_dir.mkdir(parents=True)
    (base_dir / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_hidden_layers": 1}))
    with system.settings.catalogue.open("a") as catalogue:
        catalogue.write(f"  - {{name: other, path: {base_dir}, max_sequence_length: 64}}\n")
    lora = {"target_modules": ["query_key_value"]}
    async with system.started():
        with pytest.raises(FailedPreconditionError, match="got 2, wanted 1 for other, .*model_type gpt_neox.*set it to 1") as caught:
            await system.create(spec={"base_model": "other", "gpus": 2, "lora": lora}, deploy=False)
    assert caught.value.param == "spec.gpus"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "garbage\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_cpus_are_read_from_its_control_group(tmp_path, files, wanted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == wanted


@pytest.mark.parametrize(
    ("num_threads", "omp", "limit", "wanted"),
    [(3, "1", 1.0, 3), (None, None, 2.9, 2), (None, None, 0.5, 1), (None, None, 64.0, 4), (None, None, None, 4), (None, "7", 2.0, 4)],
)
def test_torch_computes_with_the_threads_that_are_set_or_that_the_container_has_cpus_for(monkeypatch, num_threads, omp, limit, wanted):
    monkeypatch.setattr(machine, "cpu_limit", lambda: limit)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    torch.set_num_threads(4)
    assert use_cpus(num_threads) == torch.get_num_threads() == wanted
