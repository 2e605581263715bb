"""A real vLLM straight and through the gateway, in turns: output tokens a second, first-token latency, and their ratios.

    make bench-serving MODEL=DIR [BENCH_ARGS="--streams 64 256 --rounds 2"]

`--dummy` gives the model random weights, so that a folder with `config.json` and a tokenizer is enough. "Straight" speaks to vLLM's
socket, our middleware inside it included. Prompts are random tokens, another for every request, so that no cache helps. Starts are spread
over the length of an answer and each request waits up to 50 ms, as in a running system, where nobody comes in step with the engine;
--burst starts all at once. Every stream asks `--repeats` times. A round is one run each way, in an order that changes from round to round,
for the tokens a second, and one in which each request goes either way by lot: what the gateway adds to the first token is measured there,
where both ways meet the same engine at the same time. Two runs differ by more than that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import Gateways, Streams, Target, run_streams, through

from finery_common.leash import leashed
from finery_gateway.resources import Route, RouteReplica, RouteTarget
from finery_serving.vllm_client import VllmClient
from finery_serving.vllm_process import Runtime, VllmConfig, make_runtime, vllm_command, vllm_environment

MODEL = "bench"
PATH = "/v1/completions"
_START_S = 900.0
_POLL_S = 0.5
_MAX_LORA_RANK = 16
_PAUSE_S = 0.05
"""Longer than a step of the engine."""


@contextlib.contextmanager
def _vllm(arguments: argparse.Namespace) -> Iterator[Runtime]:
    """A vLLM that answers, started as serving starts it."""
    config = VllmConfig(
        python=arguments.vllm_python,
        base_model=MODEL,
        base_model_dir=arguments.model,
        device=arguments.device,
        max_loras=1,
        max_cpu_loras=1,
        max_lora_rank=_MAX_LORA_RANK,
        max_model_len=arguments.max_model_len,
        kv_cache_gib=arguments.kv_cache_gib,
        start_timeout_s=_START_S,
        private_paths=(),
    )
    runtime = make_runtime(None, xdg_runtime_dir=os.environ.get("XDG_RUNTIME_DIR"))
    tokens = {"replica_token": runtime.replica_token, "admin_token": runtime.admin_token}
    middleware = runtime.folder / "middleware.json"
    middleware.touch(mode=0o600)
    middleware.write_text(json.dumps({**tokens, "base_model": MODEL, "tools": False, "private_paths": []}))
    command = vllm_command(config, endpoint=runtime.endpoint) + (["--load-format", "dummy"] if arguments.dummy else [])
    command += shlex.split(arguments.vllm_args)
    environment = vllm_environment(os.environ, config=config, middleware_config=middleware)
    log_file = runtime.folder / "vllm.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            leashed(command, number=signal.SIGTERM), env=environment, cwd=runtime.folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        asyncio.run(_until_healthy(runtime, process, log_file))
        yield runtime
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        runtime.remove()


async def _until_healthy(runtime: Runtime, process: subprocess.Popen[bytes], log_file: Path) -> None:
    client = VllmClient(runtime.endpoint, replica_token=runtime.replica_token, admin_token=runtime.admin_token)
    deadline_s = time.monotonic() + _START_S
    try:
        while not await client.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline_s:
                text = await asyncio.to_thread(log_file.read_text, errors="replace")
                raise SystemExit("vLLM did not start:\n" + "\n".join(text.splitlines()[-30:]))
            await asyncio.sleep(_POLL_S)
    finally:
        await client.close()


def _bodies(arguments: argparse.Namespace, numbers: random.Random, *, num_streams: int, model: str = MODEL) -> list[list[bytes]]:
    def body() -> bytes:
        # Small ids are in every vocabulary; the first hundred or so may be special.
        prompt = [numbers.randrange(200, 20_000) for _ in range(arguments.prompt)]
        fields = {"model": model, "prompt": prompt, "max_tokens": arguments.output, "ignore_eos": True, "temperature": 0, "stream": True}
        return json.dumps(fields).encode()

    return [[body() for _ in range(arguments.repeats)] for _ in range(num_streams)]


def compare(arguments: argparse.Namespace, targets: Sequence[Target], *, num_streams: int, model: str = MODEL) -> dict[str, object]:
    """What came of `num_streams` streams at `targets`, straight and through the gateway. Of `arguments`: prompt, output, repeats, rounds,
    burst."""
    numbers = random.Random(num_streams)

    def run(targets: Sequence[Target], *, repeats: int, spread_s: float) -> dict[str, Streams]:
        bodies = [row[:repeats] for row in _bodies(arguments, numbers, num_streams=num_streams, model=model)]
        pause_s, seed = 0.0 if arguments.burst else _PAUSE_S, numbers.randrange(1 << 30)
        return asyncio.run(run_streams(targets, PATH, bodies, spread_s=spread_s, pause_s=pause_s, seed=seed))

    # How long an answer takes beside so many others.
    spread_s = 0.0 if arguments.burst else run(targets[:1], repeats=1, spread_s=0.0)[targets[0].name].wall_s
    alone: dict[str, list[Streams]] = {target.name: [] for target in targets}
    beside: dict[str, list[Streams]] = {target.name: [] for target in targets}
    for number in range(arguments.rounds):
        for target in targets if number % 2 == 0 else targets[::-1]:
            alone[target.name].append(run([target], repeats=arguments.repeats, spread_s=spread_s)[target.name])
        for name, streams in run(targets, repeats=arguments.repeats, spread_s=spread_s).items():
            beside[name].append(streams)
    tokens_per_s = {name: _tokens_per_s(runs, num_tokens=arguments.output) for name, runs in alone.items()}
    straight, gateway = _first_ms(beside["straight"]), _first_ms(beside["gateway"])
    return {
        "streams": num_streams,
        "prompt_tokens": arguments.prompt,
        "output_tokens": arguments.output,
        "spread_s": round(spread_s, 2),
        "requests_each": num_streams * arguments.repeats * arguments.rounds,
        "output_tokens_per_s": tokens_per_s,
        "throughput_ratio": round(tokens_per_s["gateway"] / tokens_per_s["straight"], 4),
        "throughput_ratios": [
            round(straight.wall_s / gateway.wall_s, 4) for straight, gateway in zip(alone["straight"], alone["gateway"], strict=True)
        ],
        "first_token_ms_alone": {name: _first_ms(runs) for name, runs in alone.items()},
        "first_token_ms": {"straight": straight, "gateway": gateway},
        "first_token_added_ms": {name: round(gateway[name] - straight[name], 2) for name in straight},
    }


def _tokens_per_s(runs: Sequence[Streams], *, num_tokens: int) -> float:
    """All rounds as one. `ignore_eos` makes every request's tokens known, however many an event has."""
    return round(sum(len(run.first_s) for run in runs) * num_tokens / sum(run.wall_s for run in runs), 1)


def _first_ms(runs: Sequence[Streams]) -> dict[str, float]:
    whole = Streams(0.0, [first for run in runs for first in run.first_s], 0)
    return {f"p{percent}": whole.first_ms(percent) for percent in (50, 99)}


def _folder(text: str) -> Path:
    folder = Path(text).resolve()
    if not (folder / "config.json").exists():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a model's folder, with config.json in it")
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=_folder, required=True, help="the model's folder")
    parser.add_argument("--vllm-python", type=Path, default=Path(os.environ.get("FINERY_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute())
    parser.add_argument("--dummy", action="store_true", help="random weights instead of the folder's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="on a CPU")
    parser.add_argument("--vllm-args", default="", help="more options of vLLM, as one string")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--burst", action="store_true", help="all streams start at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)))
    return parser.parse_args()


def main() -> None:
    """Prints one JSON object for the set-up and one for each number of streams."""
    arguments = _arguments()
    with _vllm(arguments) as runtime, tempfile.TemporaryDirectory() as folder:
        replica = RouteReplica(address=runtime.endpoint.address, token=runtime.replica_token)
        route = Route(targets=(RouteTarget(version=MODEL, weight=100, replicas=(replica,)),))
        gateways = Gateways(route, num_workers=arguments.workers, folder=Path(folder))
        headers = {"x-finery-replica-token": runtime.replica_token, "x-finery-version": MODEL, "x-finery-alias": MODEL}
        targets = [Target("straight", str(runtime.socket), headers), through(gateways)]
        try:
            warm_up = _bodies(arguments, random.Random(0), num_streams=2)
            for target in targets:
                asyncio.run(run_streams([target], PATH, warm_up, spread_s=0))
            about = {"device": arguments.device, "cores": os.cpu_count(), "workers": arguments.workers, "dummy": arguments.dummy}
            sys.stdout.write(json.dumps({**about, "model": arguments.model.name, "load": os.getloadavg()[0]}) + "\n")
            for num_streams in arguments.streams:
                sys.stdout.write(json.dumps(compare(arguments, targets, num_streams=num_streams)) + "\n")
                sys.stdout.flush()
        finally:
            gateways.close()


if __name__ == "__main__":
    main()
