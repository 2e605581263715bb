"""Swaps under streams, Zipf traffic over many adapters, and what the hop costs, through the real gateway, serving service and vLLM.

    make bench-serving FORM=swaps MODEL=DIR [BENCH_ARGS="--streams 64 --swaps 1000"]
    make bench-serving FORM=zipf MODEL=DIR [BENCH_ARGS="--streams 64 --adapters 64 --seconds 60"]
    make bench-serving FORM=hop MODEL=DIR [BENCH_ARGS="--num-streams 64 256"]
    make bench-serving FORM="hop swaps zipf" MODEL=DIR

The model's folder needs weights, trained or random (`kernels/benchmarks/train.py make-model`), and a tokenizer.
FINERY_VLLM_PYTHON names the vLLM. Prints one JSON object for each form; several share a vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from load.client import Client
from load.fingerprints import BaseFolder
from load.installation import Installation
from load.stack import Stack, running_stack
from load.swaps import first_version, measure_bare, measure_margins, publish_versions, streaming, summary, swap
from load.zipf import run_zipf

ALIAS = "swapped"


async def _swaps(options: argparse.Namespace, stack: Stack, folder: Path) -> dict[str, object]:
    installation, client = Installation(stack.place), Client(stack.place.http_url, api_key=stack.place.api_key)
    async with installation.watching():
        base = BaseFolder(options.model)
        words = min(options.words, options.swaps + 1)
        versions = publish_versions(installation, base, folder, count=words, num_words=words, everywhere=True)
        swaps = await first_version(installation, ALIAS, versions, num_tokens=options.tokens)
        margins = await measure_margins(
            client, base_model=stack.place.base_model, aliases=[ALIAS], num_tokens=8, num_beside=options.streams
        )
        async with streaming(client, ALIAS, swaps, num_streams=options.streams):
            ends_s = time.monotonic() + options.limit_s
            for number in range(1, options.swaps + 1):
                if time.monotonic() > ends_s:
                    break
                await swap(installation, ALIAS, versions[number % words], swaps)
            bare = await measure_bare(installation, versions[0].folder, count=options.bare)
        await installation.drained(ALIAS)
    client.close()
    return summary(swaps, bare, margins)


async def _zipf(options: argparse.Namespace, stack: Stack, folder: Path) -> dict[str, object]:
    installation, client = Installation(stack.place), Client(stack.place.http_url, api_key=stack.place.api_key)
    async with installation.watching():
        count = options.adapters
        versions = publish_versions(installation, BaseFolder(options.model), folder, count=count, num_words=count, everywhere=True)
        found = await run_zipf(
            installation,
            client,
            versions,
            metrics_url=stack.metrics_url,
            num_streams=options.streams,
            num_tokens=options.tokens,
            duration_s=options.seconds,
        )
    client.close()
    return found


async def _hop(options: argparse.Namespace, stack: Stack, _folder: Path) -> dict[str, object]:
    """As `serving.py` measures it, with adapters possible beside: nobody asks for one."""
    # Beside the benchmarks, which are no package.
    from harness import Target
    from serving import compare

    installation, place = Installation(stack.place), stack.place
    straight = Target("straight", *installation.straight(place.base_model))
    gateway = Target("gateway", urllib.parse.urlsplit(place.http_url).port or 80, {"authorization": f"Bearer {place.api_key}"})
    sizes = argparse.Namespace(prompt=256, output=options.tokens, repeats=options.repeats, rounds=options.rounds, burst=False)

    def run(num_streams: int) -> dict[str, object]:
        return compare(sizes, [straight, gateway], num_streams=num_streams, model=place.base_model)

    return {"runs": [await asyncio.to_thread(run, number) for number in options.num_streams]}


def main() -> None:
    """Runs the forms and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="+", choices=("swaps", "zipf", "hop"))
    parser.add_argument("--model", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="no swap begins after so many seconds")
    parser.add_argument("--words", type=int, default=24, help="versions that take turns")
    parser.add_argument("--bare", type=int, default=20, help="loads past the agent")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[64, 256], help="of the hop")
    parser.add_argument("--rounds", type=int, default=2, help="of the hop")
    parser.add_argument("--repeats", type=int, default=4, help="of the hop: questions of a stream in a round")
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args()
    python = Path(os.environ.get("FINERY_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()
    serving: dict[str, object] = {"MAX_LORAS": 8, "MAX_CPU_LORAS": 16, "MAX_LORA_RANK": 16}
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder) / "adapters"
        with running_stack(
            Path(folder), model=options.model, vllm_python=python, max_model_len=options.max_model_len, serving=serving
        ) as stack:
            for form in options.forms:
                run = {"swaps": _swaps, "zipf": _zipf, "hop": _hop}[form]
                sys.stdout.write(json.dumps({"form": form, **asyncio.run(run(options, stack, adapters / form))}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
