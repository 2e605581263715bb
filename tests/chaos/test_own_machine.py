"""Faults of a machine: Ctrl-C, its database killed, its clock set back, its disk full. One system of its own has what they need.

It runs on a PostgreSQL server of this module, its Python programs read a clock that `set_clock.c` sets, and its cache is a small disk: a
tmpfs in a mount namespace, where the machine lets us make one. The first test starts it twice, the others use what it has left running.

Elsewhere: a full disk under the database, `test_database`, and under the store, `test_seaweedfs`; what a full disk says, `test_artifacts`.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from chaos.adapters import Adapters
from chaos.load import Load, say
from chaos.serving import SETTLE_S, Deployments
from e2e.jobs import LONG_SPEC, NUM_STEPS, create_job, steps_of, wait_steps
from e2e.system import System, start_system, stop_system, wait_job, wait_served

from finery_serving.preflight import WEIGHTS_NAME

pytestmark = pytest.mark.timeout(900)

DISK_MIB = 256


class Clock:
    """The time of day of the programs that `environment` starts; others have the machine's own."""

    def __init__(self, folder: Path) -> None:
        library = folder / "set_clock.so"
        source = Path(__file__).parent / "set_clock.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"], check=True)
        self._file = folder / "clock"
        self._file.write_bytes(struct.pack("<q", 0))
        self.environment = {"LD_PRELOAD": str(library), "FINERY_TEST_CLOCK": str(self._file)}

    def set(self, offset_s: int) -> None:
        """Sets it to `offset_s` seconds after the machine's."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<q", offset_s))


@dataclass
class Machine:
    """The system as it runs now, and how its surroundings are reached."""

    system: System
    clock: Clock
    has_disk: bool
    job_id: str
    """Of the job that its predecessor's end cut short."""

    @property
    def cache_dir(self) -> Path:
        """The cache of its adapters, which only its processes see as it is."""
        seen_by = self.system.running.processes["serving"]
        return Path(f"/proc/{seen_by}/root{self.system.layout.state_dir}/cache/serving")

    @contextmanager
    def full_disk(self, *, while_staging: bool) -> Iterator[Callable[[], None]]:
        """The cache's disk has no room within the block, or none from the moment on that `fill()` has seen bytes of a copy arrive."""
        filler = self.cache_dir.parent / "filler"
        if not while_staging:
            fill(filler)
        try:
            yield lambda: self._fill_while_staging(filler)
        finally:
            filler.unlink()

    def _fill_while_staging(self, filler: Path) -> None:
        store = psutil.Process(self.system.running.processes["object store"])
        deadline_s = time.monotonic() + 60
        while not any(file.stat().st_size for file in self.cache_dir.glob(f".*.staging/{WEIGHTS_NAME}")):
            assert time.monotonic() < deadline_s, "nothing is staged"
            time.sleep(0.001)
        store.suspend()
        try:
            fill(filler)
        finally:
            store.resume()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path, own_postgres) -> Iterator[Machine]:
    state_dir = tmp_path_factory.mktemp("machine")
    clock = Clock(tmp_path_factory.mktemp("clock"))
    disk = mounting(state_dir / "cache")
    options = {"database_url": own_postgres.url, "wrapper": disk, "environment": clock.environment}
    first = start_system(state_dir, base_model_dir, **options)
    client = first.client()
    job_id = create_job(client, LONG_SPEC)
    wait_steps(client, job_id, 3)
    stop_system(first)
    assert first.process.returncode == 0
    assert first.layout.running() is None
    second = start_system(state_dir, base_model_dir, **options)
    try:
        yield Machine(second, clock, has_disk=bool(disk), job_id=job_id)
    finally:
        stop_system(second)


def fill(filler: Path) -> None:
    """Writes until the disk is full."""
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def mounting(folder: Path) -> list[str]:
    """What becomes a command that has a small disk at `folder`; nothing where this machine does not let us mount one."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "{folder}" && exec "$@"'
    wrapper = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mount, "sh"]
    return wrapper if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0 else []


@pytest.fixture(scope="module")
def deployments(machine: Machine) -> Iterator[Deployments]:
    wait_served(machine.system)
    made = Deployments(machine.system)
    yield made
    made.channel.close()


@pytest.fixture(scope="module")
def adapters(machine: Machine, base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(machine.system, base_model_dir, memo_dir=tmp_path_factory.mktemp("digests"))


@pytest.fixture(scope="module")
def served(deployments: Deployments, adapters: Adapters) -> str:
    """An alias that serves."""
    deployments.served("kept", adapters.publish(0))
    return "kept"


def test_ctrl_c_in_the_middle_of_training_loses_nothing_with_postgresql(machine: Machine):
    job_id = machine.job_id
    wait_job(machine.system.client(), job_id, "succeeded")
    assert set(steps_of(machine.system.client(), job_id)) == set(range(1, NUM_STEPS + 1))


def test_a_killed_database_breaks_no_stream_and_loses_no_deployment(
    machine: Machine, deployments: Deployments, adapters: Adapters, served: str, own_postgres
):
    client = machine.system.client()
    before, ref = say(client, served), adapters.publish(1)
    with Load(machine.system, [served]) as load:
        load.wait_answers(timeout_s=SETTLE_S)
        own_postgres.kill()
        try:
            with pytest.raises(grpc.RpcError) as caught:
                deployments.deploy("during", ref, request_id="during")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            load.wait_asked(timeout_s=SETTLE_S)
        finally:
            own_postgres.start()
        load.wait_answers(timeout_s=SETTLE_S)
    assert set(load.outcomes) <= {"answered", "503"}, load.outcomes
    assert say(client, served) == before
    deployments.deploy("during", ref, request_id="during")
    assert deployments.until("during", "READY").version
    deployments.delete("during")


def test_a_clock_that_is_set_back_stops_nothing(machine: Machine, deployments: Deployments, adapters: Adapters, served: str, is_long: bool):
    client = machine.system.client()
    before = deployments.get(served)
    with Load(machine.system, [served]) as load:
        load.wait_answers(timeout_s=SETTLE_S)
        machine.clock.set(-600)
        after = deployments.served(served, adapters.publish(2))
        load.wait_answers(timeout_s=SETTLE_S)
    assert set(load.outcomes) == {"answered"}, load.outcomes
    assert after.update_time.ToSeconds() < before.update_time.ToSeconds(), "the clock was set"
    assert after.epoch == before.epoch + 1
    assert say(client, served)
    if is_long:
        job_id = create_job(client, LONG_SPEC)
        wait_job(client, job_id, "succeeded")


def test_a_disk_that_is_full_before_or_while_an_adapter_is_staged_leaves_what_served_and_no_rest(
    machine: Machine, deployments: Deployments, adapters: Adapters, served: str
):
    if not machine.has_disk:
        pytest.skip("this machine lets nobody mount a small disk")
    before = deployments.get(served)
    large = adapters.publish(weights=bytes(96 << 20))
    with machine.full_disk(while_staging=False):
        deployments.deploy(served, adapters.publish(3))
        refused = deployments.until(served, "FAILED")
    with machine.full_disk(while_staging=True) as fill:
        deployments.deploy(served, large)
        fill()
        broken = deployments.until(served, "FAILED")
    for failed in (refused, broken):
        assert failed.rollout.error.code == "resource_exhausted", failed.rollout.error
        assert "No room" in failed.rollout.error.message
        assert str(machine.system.layout.state_dir) not in failed.rollout.error.message
        assert (failed.version, failed.etag) == (before.version, before.etag)
    assert not list(machine.cache_dir.glob(".*"))
    assert say(machine.system.client(), served)
    deployments.served(served, adapters.publish(3))
