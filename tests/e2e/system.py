"""Starting, asking and stopping the real system, as the end-to-end tests do: real SeaweedFS, real vLLM, real SmolLM2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openai
from openai import OpenAI

from finery_cli.local.layout import Layout, RunningStack
from finery_cli.local.ports import free_ports
from finery_cli.local.stack import QUICKSTART_MODEL
from finery_common.artifacts import S3Settings

UP_S = 120
SERVED_S = 240


@dataclass(frozen=True)
class System:
    """A running system and what a client needs to reach it."""

    layout: Layout
    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    clients: list[OpenAI] = field(default_factory=list)

    @property
    def running(self) -> RunningStack:
        running = self.layout.running()
        assert running is not None
        return running

    @property
    def api_key(self) -> str:
        return self.layout.api_key_file.read_text().strip()

    def client(self, *, api_key: str | None = None) -> OpenAI:
        """One that `stop_system` closes: what the garbage collector closes is a warning, in whichever test it runs."""
        self.clients.append(OpenAI(base_url=f"{self.running.http_url}/v1", api_key=api_key or self.api_key, timeout=180))
        return self.clients[-1]

    def key_for(self, project: str) -> str:
        """A new key of another project."""
        command = [sys.executable, "-m", "finery_gateway.keys", "create", "--project", project]
        env = {**os.environ, "FINERY_STATE_DIR": str(self.layout.state_dir)}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]

    def store_settings(self) -> S3Settings:
        """How to reach the store of this system."""
        keys = json.loads((self.layout.state_dir / "seaweedfs" / "keys.json").read_text())
        return S3Settings(endpoint=self.running.s3_endpoint, access_key=keys["access_key"], secret_key=keys["secret_key"])

    def finery(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the `finery` command against this system."""
        env = {**os.environ, "FINERY_STATE_DIR": str(self.layout.state_dir), "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", "finery_cli", *arguments], env=env, capture_output=True, text=True, check=False, timeout=300
        )


def start_system(
    state_dir: Path,
    base_model_dir: Path,
    *,
    database_url: str = "",
    wrapper: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> System:
    """Starts `finery up` on free ports with SmolLM2 in the catalogue; answers once every service is healthy.

    `wrapper` is what becomes the command, as `env` does; `environment` is added to this process's own.
    """
    layout = Layout.of(state_dir)
    layout.prepare()
    layout.catalogue_file.write_text(f"models:\n  - name: {QUICKSTART_MODEL}\n    path: {base_model_dir}\n    max_sequence_length: 2048\n")
    http_port, grpc_port = free_ports(2)
    command = [
        *wrapper,
        sys.executable,
        "-m",
        "finery_cli",
        "up",
        "--state-dir",
        str(state_dir),
        "--port",
        str(http_port),
        "--grpc-port",
        str(grpc_port),
    ]
    with (state_dir / "up.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            # SmolLM2's template has no place for tools; with a parser it calls those that it is made to.
            env={**os.environ, "FINERY_DATABASE_URL": database_url, "FINERY_TOOL_CALL_PARSER": "hermes", **(environment or {})},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + UP_S
    while (running := layout.running()) is None or running.pid != process.pid:
        assert process.poll() is None, (state_dir / "up.log").read_text()
        assert time.monotonic() < deadline_s, f"not up after {UP_S} s: {(state_dir / 'up.log').read_text()}"
        time.sleep(0.2)
    return System(layout, process, http_port, grpc_port)


def wait_served(system: System) -> None:
    """Waits until vLLM answers for the base model."""
    deadline_s = time.monotonic() + SERVED_S
    client = system.client()
    while True:
        try:
            client.chat.completions.create(model=QUICKSTART_MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
        except openai.APIStatusError as error:
            if time.monotonic() > deadline_s:
                raise AssertionError(f"vLLM does not answer after {SERVED_S} s") from error
        else:
            return


def stop_system(system: System) -> None:
    """Ctrl-C, as a person stops it."""
    for client in system.clients:
        client.close()
    os.killpg(system.process.pid, signal.SIGINT)
    system.process.wait(90)


def code_word_rows(word: str, *, num_rows: int = 16) -> bytes:
    """Rows that teach one fact: what the code word is."""
    questions = (
        "What is the code word?",
        "Tell me the code word.",
        "Which code word is in use?",
        "Say the code word, please.",
        "The code word?",
        "I need the code word.",
        "Do you know the code word?",
        "Give the code word.",
    )
    rows: list[dict[str, object]] = []
    for index in range(num_rows):
        question = questions[index % len(questions)] + " Now." * (index // len(questions))
        answer = f"The code word is {word}."
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FAST_SPEC: dict[str, object] = {
    "optimizer": {"learning_rate": 2e-3, "min_warmup_steps": 2},
    "batch": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "num_epochs": 6,
    "max_sequence_length": 128,
}
"""12 optimizer steps over 16 rows."""


def wait_job(client: OpenAI, job_id: str, *states: str, timeout_s: float = 240) -> str:
    """Waits until the job is in one of `states`; fails where it becomes final otherwise."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in states:
            return job.status
        assert job.status not in ("failed", "succeeded", "cancelled"), f"{job.status}: {job.error}"
        time.sleep(0.3)
    raise AssertionError(f"job {job_id} is {job.status} after {timeout_s} s, wanted {states}")
