"""vLLM's process: command, environment, failed starts, leftovers. The real vLLM is in test_serving_vllm."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from prometheus_client import REGISTRY

from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_serving.__main__ import base_entry, vllm_config
from finery_serving.follower import follower_command
from finery_serving.settings import ServingSettings
from finery_serving.tool_calls import tool_call_parser
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_endpoint import UnixEndpoint
from finery_serving.vllm_process import (
    Runtime,
    VllmConfig,
    VllmProcess,
    kill_leftover,
    lora_slots,
    make_runtime,
    start_ticks,
    vllm_command,
    vllm_environment,
    vllm_version,
)


@pytest.fixture
def config(tmp_path):
    return VllmConfig(
        python=tmp_path / "python",
        base_model="base",
        base_model_dir=tmp_path / "base",
        device="cpu",
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=16,
        max_model_len=512,
        kv_cache_gib=1,
        start_timeout_s=30,
        private_paths=("/state",),
    )


@pytest.fixture
def runtime(tmp_path):
    (tmp_path / "run").mkdir()
    return Runtime(tmp_path / "run", "r", "replica-secret", "admin-secret")


def python_that(config: VllmConfig, script: str) -> None:
    config.python.write_text(f"#!/bin/sh\n{script}\n")
    config.python.chmod(0o755)


@pytest.fixture
async def process(config, runtime, tmp_path):
    client = VllmClient(runtime.endpoint, replica_token="", admin_token="")
    yield VllmProcess(config, runtime=runtime, state_dir=tmp_path / "state", environment=os.environ, client=client)
    await client.close()


def test_tools_are_on_where_a_parser_is_set(config):
    assert "--enable-auto-tool-choice" not in vllm_command(config, endpoint=UnixEndpoint(Path("/s")))
    command = vllm_command(replace(config, tool_call_parser="hermes"), endpoint=UnixEndpoint(Path("/s")))
    assert command[command.index("--enable-auto-tool-choice") :][:3] == ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@pytest.mark.parametrize(
    ("setting", "template", "parser"),
    [
        ("auto", "{% for m in messages %}{{ m.content }}{% endfor %}", ""),
        ("auto", "{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("auto", "{% if tools %}<tool_call>\n<function=name>{% endif %}", "qwen3_coder"),
        ("auto", "{% if tools %}Environment: ipython{% endif %}", "llama3_json"),
        ("auto", "{% if tools %}something else{% endif %}", ""),
        ("auto", [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{{ tools }}[TOOL_CALLS]"}], "mistral"),
        ("auto", None, ""),
        ("off", "{% if tools %}<tool_call>{% endif %}", ""),
        ("pythonic", "x", "pythonic"),
    ],
)
def test_the_parser_of_tool_calls_goes_by_the_chat_template(tmp_path, setting, template, parser):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert tool_call_parser(setting, base_model_dir=tmp_path) == parser


def test_a_chat_template_in_its_own_file_goes_first(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (tmp_path / "chat_template.jinja").write_text("{{ tools }}<tool_call>")
    assert tool_call_parser("auto", base_model_dir=tmp_path) == "hermes"


def test_no_secret_and_no_module_of_ours_reaches_vllm(config):
    inherited = {
        "PATH": "/bin",
        "FINERY_S3_SECRET_KEY": "s",
        "FINERY_TOKEN_SECRET_FILE": "f",
        "PYTHONPATH": "/ours",
        "PYTHONSAFEPATH": "",
        "HOME": "/h",
        # Adapters that vLLM finds by itself, and a key that the agent does not have.
        "VLLM_LORA_RESOLVER_CACHE_DIR": "/anything",
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "any/thing",
        "VLLM_API_KEY": "k",
    }
    made = vllm_environment(inherited, config=config, middleware_config=Path("/run/m.json"))
    assert [key for key in made if key.startswith(("VLLM_LORA_RESOLVER", "VLLM_API_KEY"))] == []
    assert {key for key in made if key.startswith("FINERY_")} == {"FINERY_MIDDLEWARE_CONFIG"}
    assert [path.name for path in Path(made["PYTHONPATH"]).glob("*.py")] in (
        ["__init__.py", "finery_vllm_middleware.py"],
        ["finery_vllm_middleware.py", "__init__.py"],
    )
    assert (made["PATH"], made["HOME"], made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], made["HF_HUB_OFFLINE"]) == ("/bin", "/h", "True", "1")


def test_the_command_carries_no_secret_and_is_eager_on_a_cpu_only(config):
    command = vllm_command(config, endpoint=UnixEndpoint(Path("/run/vllm.sock")))
    assert command[command.index("--uds") + 1] == "/run/vllm.sock"
    assert command[command.index("--middleware") + 1] == "finery_vllm_middleware.FineryMiddleware"
    assert "--enforce-eager" in command
    assert "--enforce-eager" not in vllm_command(VllmConfig(**{**config.__dict__, "device": "cuda"}), endpoint=UnixEndpoint(Path("/s")))


def test_gpus_and_their_memory_are_vllms_to_share_out_as_the_settings_say(config):
    plain = vllm_command(config, endpoint=UnixEndpoint(Path("/s")))
    assert not any(name in plain for name in ("--tensor-parallel-size", "--gpu-memory-utilization", "--nnodes"))
    command = vllm_command(replace(config, tensor_parallel_size=4, gpu_memory_utilization=0.45), endpoint=UnixEndpoint(Path("/s")))
    assert command[command.index("--tensor-parallel-size") + 1] == "4"
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.45"


def test_all_machines_of_a_vllm_are_told_the_same_but_for_their_rank(config):
    group = replace(config, device="cuda", tensor_parallel_size=8, nodes=2, master_address="leader")
    leader, follower = vllm_command(group, endpoint=UnixEndpoint(Path("/s"))), follower_command(group, node_rank=1)
    assert (leader[leader.index("--node-rank") + 1], follower[follower.index("--node-rank") + 1]) == ("0", "1")
    assert "--headless" in follower
    assert not {"--uds", "--middleware", "--api-server-count"} & set(follower)
    for name in ("--nnodes", "--master-addr", "--pipeline-parallel-size", "--tensor-parallel-size", "--max-lora-rank", "--max-loras"):
        assert leader[leader.index(name) + 1] == follower[follower.index(name) + 1]


def test_a_follower_becomes_vllm(tmp_path):
    model, python, told = tmp_path / "base", tmp_path / "python", tmp_path / "told"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "catalogue.yaml").write_text("models: [{name: base, path: base, max_sequence_length: 64}]")
    python.write_text(f'#!/bin/sh\n{{ echo "$@"; env; }} > {told}\n')
    python.chmod(0o755)
    environment = {
        **os.environ,
        "FINERY_CATALOGUE": str(tmp_path / "catalogue.yaml"),
        "FINERY_VLLM_PYTHON": str(python),
        "FINERY_VLLM_NODES": "2",
        "FINERY_VLLM_MASTER_ADDRESS": "leader",
    }
    command = [sys.executable, "-m", "finery_serving.follower"]
    subprocess.run(command, env=environment | {"FINERY_VLLM_NODE_RANK": "1"}, check=True, timeout=60)
    text = told.read_text()
    assert text.startswith(f"-m vllm.entrypoints.cli.main serve {model} --headless --enable-lora")
    assert "FINERY_CATALOGUE" not in text
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, refused.stderr) == (
        1, "finery_serving-follower: FINERY_VLLM_NODE_RANK: got 0, wanted 1 to FINERY_VLLM_NODES - 1 (1)\n"
    )  # fmt: skip


def test_the_middleware_needs_the_standard_library_only():
    folder = Path(vllm_environment({}, config=VllmConfig(*[Path()] * 11), middleware_config=Path())["PYTHONPATH"])  # pyright: ignore[reportArgumentType]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import finery_vllm_middleware"]
    subprocess.run(command, check=True)


def test_the_runtime_folder_is_private_and_short(tmp_path):
    made = make_runtime(tmp_path / "new", xdg_runtime_dir=None)
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert made.endpoint.address == f"unix://{made.folder}/vllm.sock"
    with pytest.raises(FailedPreconditionError, match="FINERY_RUNTIME_DIR"):
        make_runtime(tmp_path / ("x" * 100), xdg_runtime_dir=None)
    # A long XDG_RUNTIME_DIR is passed over.
    long = tmp_path / ("y" * 100)
    long.mkdir()
    other = make_runtime(None, xdg_runtime_dir=str(long))
    assert len(str(other.socket)) <= 107
    other.remove()


async def test_a_failed_start_shows_the_last_lines_and_is_tried_again(config, process):
    python_that(config, "echo one; echo 'No module named vllm' >&2; exit 3")
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(20):
        while len(list((process.runtime.folder.parent / "state" / "logs").glob("vllm-*.log"))) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert process.last_failure.splitlines() == ["one", "No module named vllm"]
    assert (process.ready, process.generation) == (False, 0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_vllm_on_several_machines_is_not_started_again_without_them(config, process):
    python_that(config, "exit 3")
    process.config = replace(config, nodes=2, master_address="leader")
    async with asyncio.timeout(20):
        with pytest.raises(UnavailableError, match="runs on 2 machines"):
            await process.run()
    assert len(list((process.runtime.folder.parent / "state" / "logs").glob("vllm-*.log"))) == 1
    assert process.pid is None


def test_the_agent_ends_with_a_vllm_on_several_machines(config, tmp_path, base_model_dir, object_store):
    python_that(config, "exit 3")
    (tmp_path / "catalogue.yaml").write_text(f"models: [{{name: m, path: {base_model_dir}, max_sequence_length: 64}}]")
    (tmp_path / "secret").write_text("s" * 40)
    s3 = object_store.settings
    settings = {
        "VLLM_PYTHON": config.python,
        "VLLM_NODES": 2,
        "VLLM_MASTER_ADDRESS": "leader",
        "STATE_DIR": tmp_path / "state",
        "GRPC_ADDRESS": "127.0.0.1:0",
        "METRICS_PORT": 0,
        "S3_ENDPOINT": s3.endpoint,
        "S3_ACCESS_KEY": s3.access_key,
        "S3_SECRET_KEY": s3.secret_key,
        "S3_BUCKET": s3.bucket,
        "TOKEN_SECRET_FILE": tmp_path / "secret",
        "CATALOGUE": tmp_path / "catalogue.yaml",
    }
    environment = {**os.environ, **{f"FINERY_{name}": str(value) for name, value in settings.items()}}
    command = [sys.executable, "-m", "finery_serving"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "finery_serving: vLLM ended, which runs on 2 machines; the agent ends as well, so that all of them begin anew."
    ), done.stderr  # fmt: skip


async def test_a_stop_ends_the_whole_group(config, process, tmp_path):
    python_that(config, f"sleep 600 & echo $! > {tmp_path}/child; wait")
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(20):
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    assert (process.runtime.folder / "middleware.json").stat().st_mode & 0o777 == 0o600
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert psutil.wait_procs([child], timeout=5)[1] == []


_ANSWERS = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\nconnection: close\\r\\n\\r\\n")
socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


async def test_a_vllm_that_hangs_is_started_again(config, process):
    python_that(config, f"exec {sys.executable} -c '{_ANSWERS}' \"$@\"")
    process.config = replace(config, hang_timeout_s=2.0)
    running = asyncio.create_task(process.run())
    async with asyncio.timeout(60):
        while (shown := REGISTRY.get_sample_value("finery_serving_vllm_ready", {"replica": "r", "base_model": "base"})) is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert shown == 0
    async with asyncio.timeout(60):
        while not process.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        while process.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while not process.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert process.generation == 2
    assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_full_disk_ends_nothing_and_is_tried_again(config, process, monkeypatch):
    monkeypatch.setattr("finery_serving.vllm_process._FIRST_BACKOFF_S", 0.05)
    python_that(config, "exec sleep 600")
    write, fulls = Path.write_text, iter(range(2))

    def write_text(path, *args, **kwargs):
        if path.name == "vllm.json" and next(fulls, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    running = asyncio.create_task(process.run())
    noted = process.runtime.folder.parent / "state" / "run" / "vllm.json"
    async with asyncio.timeout(20):
        while not noted.exists() or not noted.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert "No space left" in process.last_failure
    assert not running.done()
    # The vLLMs whose start could not be noted are gone.
    assert [child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE and "600" in child.cmdline()] in (
        [],
        [process.pid],
    )
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_vllm_ends_with_a_killed_agent(config, runtime, tmp_path):
    python_that(config, "exec sleep 600")
    program = """
import asyncio, os, sys
from pathlib import Path
from finery_serving.tool_calls import tool_call_parser
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_endpoint import UnixEndpoint
from finery_serving.vllm_process import Runtime, VllmConfig, VllmProcess

async def main():
    folder = Path(sys.argv[1])
    config = VllmConfig(folder / "python", "base", folder, "cpu", 2, 4, 16, 512, 1, 30, ())
    client = VllmClient(UnixEndpoint(folder / "s"), replica_token="", admin_token="")
    runtime = Runtime(folder / "run", "r", "", "")
    process = VllmProcess(config, runtime=runtime, state_dir=folder / "state", environment=os.environ, client=client)
    running = asyncio.create_task(process.run())
    while process.pid is None or "sleep" not in Path(f"/proc/{process.pid}/comm").read_text():
        await asyncio.sleep(0.05)
    print(process.pid, file=sys.stderr, flush=True)
    await running

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        vllm = psutil.Process(int(agent.stderr.readline()))
        agent.kill()
    deadline_s = time.monotonic() + 10
    while vllm.is_running() and vllm.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_the_rest_of_a_dead_leaders_group_is_ended(tmp_path):
    (tmp_path / "runtime").mkdir()
    leader = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], cwd=tmp_path / "runtime", start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout is not None
    rest = psutil.Process(int(leader.stdout.readline()))
    leader.stdout.close()
    leader.wait()
    file = tmp_path / "vllm.json"
    file.write_text(json.dumps({"pid": leader.pid, "start_ticks": start_ticks(rest.pid), "runtime": str(tmp_path / "elsewhere")}))
    kill_leftover(file)
    assert rest.status() != psutil.STATUS_ZOMBIE
    file.write_text(json.dumps({"pid": leader.pid, "start_ticks": start_ticks(rest.pid), "runtime": str(tmp_path / "runtime")}))
    kill_leftover(file)
    deadline_s = time.monotonic() + 10
    while rest.is_running() and rest.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_leftover_is_ended_and_another_process_of_that_id_is_not(tmp_path):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    file = tmp_path / "vllm.json"
    started = start_ticks(child.pid)
    file.write_text(json.dumps({"pid": child.pid, "start_ticks": started - 100}))
    kill_leftover(file)
    assert child.poll() is None
    (tmp_path / "runtime").mkdir()
    file.write_text(json.dumps({"pid": child.pid, "start_ticks": started, "runtime": str(tmp_path / "runtime")}))
    kill_leftover(file)
    assert not (tmp_path / "runtime").exists()
    assert child.wait(timeout=5) == -9
    assert not file.exists()
    kill_leftover(file)


@pytest.mark.parametrize(
    ("catalogue", "chosen", "expected"),
    [("a", "", "a"), ("a b", "b", "b"), ("a b", "", FailedPreconditionError), ("", "", FailedPreconditionError)],
)
def test_the_base_model_is_the_only_one_or_the_named_one(tmp_path, catalogue, chosen, expected):
    file = tmp_path / "catalogue.yaml"
    models = [{"name": name, "path": str(tmp_path), "max_sequence_length": 64} for name in catalogue.split()]
    file.write_text(json.dumps({"models": models}))
    settings = ServingSettings(catalogue=file, serving_base_model=chosen)
    if isinstance(expected, str):
        assert base_entry(settings).name == expected
        return
    with pytest.raises(expected, match="FINERY_SERVING_BASE_MODEL"):
        base_entry(settings)


def test_a_missing_vllm_is_named(tmp_path):
    file = tmp_path / "catalogue.yaml"
    file.write_text(json.dumps({"models": [{"name": "a", "path": str(tmp_path), "max_sequence_length": 64}]}))
    settings = ServingSettings(catalogue=file, vllm_python=tmp_path / "none", max_loras=9, max_cpu_loras=2)
    with pytest.raises(FailedPreconditionError, match="FINERY_VLLM_PYTHON"):
        vllm_config(settings, entry=base_entry(settings), base_dir=tmp_path)
    made = vllm_config(settings.model_copy(update={"vllm_python": Path(sys.executable)}), entry=base_entry(settings), base_dir=tmp_path)
    assert (made.max_model_len, made.max_loras, made.max_cpu_loras) == (64, 9, 9)


@pytest.mark.parametrize(("version", "wanted"), [((0, 26), 2), ((1, 0), 2), ((0, 25), 8), ((0, 24), 8), (None, 8)])
def test_a_vllm_that_gives_places_away_gets_one_for_each_adapter(version, wanted):
    assert lora_slots(2, 8, version=version) == wanted


def test_the_version_of_vllm_is_that_of_its_environment(tmp_path):
    vllm_python = Path(os.environ.get("FINERY_VLLM_PYTHON", Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"))
    said = subprocess.run([vllm_python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True).stdout
    assert vllm_version(vllm_python) == tuple(int(part) for part in said.strip().splitlines()[-1].split(".")[:2])
    assert vllm_version(tmp_path / "none") is None
    assert vllm_version(Path(sys.executable)) is None, "this environment has none"


def test_a_process_without_settings_says_what_is_missing_in_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FINERY_")} | {"FINERY_STATE_DIR": str(tmp_path)}
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "finery_serving"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines()[-1].startswith("finery_serving: FINERY_TOKEN_SECRET")
    assert time.monotonic() - started_s < 30


def test_a_tls_port_wants_its_certificate_and_where_it_is_reached(tmp_path, vllm_certificate):
    certificate, key = vllm_certificate
    assert ServingSettings().tls() is None
    with pytest.raises(FailedPreconditionError, match="FINERY_VLLM_ADVERTISE_ADDRESS"):
        ServingSettings(vllm_listen_address="0.0.0.0:8443").tls()
    given = {"vllm_listen_address": "[::]:8443", "vllm_advertise_address": "10.0.0.7:8443", "vllm_tls_cert_file": certificate}
    given |= {"vllm_tls_key_file": key, "vllm_ca_file": certificate}
    with pytest.raises(FailedPreconditionError, match="there is no file"):
        ServingSettings(**given | {"vllm_tls_key_file": tmp_path / "none"}).tls()
    endpoint = ServingSettings(**given).tls()
    assert endpoint is not None
    assert endpoint.address == "https://10.0.0.7:8443"
    assert endpoint.options[:4] == ["--host", "::", "--port", "8443"]
    runtime = make_runtime(tmp_path, xdg_runtime_dir=None, tls=endpoint)
    assert runtime.endpoint.address == endpoint.address
    assert runtime.endpoint.options[5::2][:2] == [str(runtime.folder / "vllm-tls.crt"), str(runtime.folder / "vllm-tls.key")]
    with pytest.raises(ValueError, match="vllm_listen_address"):
        ServingSettings(vllm_listen_address="8443")
