"""Training steps, engine beside engine on one GPU.

    python3 kernels/benchmarks/train.py make-model DIR [--tokenizer DIR]
    python3 kernels/benchmarks/train.py bench --model DIR --rows "qlora 2x2048x4,lora 1x8192,qlora 2x2048x4 equal-memory"
    python3 kernels/benchmarks/train.py profile --model DIR --rows "qlora 2x2048x4" --out kernels.txt
    python3 kernels/benchmarks/train.py table [FILE]
    python3 kernels/benchmarks/train.py merge FILE

with the source roots on PYTHONPATH (`protos/gen:services/common:services/trainer:kernels`) where Finery is not installed.

Owns the command, the order of engines and the time they share. Each engine runs in a process of its own (`worker`), one after the
other; rows go into `baselines/<card>.json` under one run id. `README.md` beside this file says what the workloads are.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from benchmarks import baselines
from benchmarks.baselines import CHECKOUT, OURS, PEERS, Row
from benchmarks.worker import PREFIX
from benchmarks.workloads import Workload, parse_all

ROOTS = ("kernels", "protos/gen", "services/common", "services/trainer")
KILL_GRACE_S = 5.0


@dataclass(frozen=True)
class Job:
    """What one process measures: workloads of one method, which share a loaded model."""

    engine: str
    workloads: tuple[Workload, ...]

    @property
    def is_search(self) -> bool:
        """Whether it looks for the longest contexts."""
        return self.workloads[0].kind == "context"


@dataclass
class Output:
    """What a worker has printed: rows, and the rest."""

    rows: list[Row] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """A search gives a row for each success: the last one counts, unless it is a failure."""
        earlier = [one for one in self.rows if one.workload == row.workload]
        if row.error is None or not earlier:
            self.rows = [one for one in self.rows if one.workload != row.workload] + [row]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; answers its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def plan(engines: Sequence[str], workloads: Sequence[Workload]) -> list[Job]:
    """The processes to run: by engine, then by method and what wants a process of its own; contexts last, since a search takes what time
    there is."""
    jobs: list[Job] = []
    for engine in engines:
        groups: dict[tuple[str, str], list[Workload]] = {}
        for workload in _of_engine(engine, workloads):
            groups.setdefault((workload.method, workload.process), []).append(workload)
        jobs += [Job(engine, tuple(sorted(group, key=lambda workload: workload.kind == "short"))) for group in groups.values()]
    return sorted(jobs, key=lambda job: job.is_search)


def bench(options: argparse.Namespace) -> int:
    """Measures, prints the table and merges the rows; answers 1 where a row is missing."""
    stop_s = time.monotonic() + options.limit_s
    stamp = {"run_id": secrets.token_hex(4), "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": options.commit or checkout_commit()}
    stamp["command"] = command_of(options.rows, options.engines)
    rows: list[Row] = []
    is_whole = True
    jobs = plan(options.engines, options.rows)
    for index, job in enumerate(jobs):
        remaining_s = stop_s - time.monotonic()
        measured = _run_job(job, options, remaining_s / (len(jobs) - index) if job.is_search else remaining_s)
        rows += [replace(row, **stamp) for row in measured]
        wanted = {workload.name for workload in job.workloads}
        is_whole &= wanted == {row.workload for row in measured if _is_result(row)}
    print(f"\nrun {stamp['run_id']}, {stamp['date']}, commit {stamp['commit']}{_host(rows)}\n{baselines.table(rows)}", flush=True)
    kept = [row for row in rows if _is_result(row)]
    if kept and not options.dry_run:
        _merge(kept, options.out or baselines.file_of(kept[0].gpu))
    return 0 if is_whole else 1


def profile(options: argparse.Namespace) -> int:
    """Writes the table of kernels by time for each row and engine to `--out`, and prints its head."""
    options.out.unlink(missing_ok=True)
    stop_s = time.monotonic() + options.limit_s
    for job in plan(options.engines, [workload for workload in options.rows if workload.kind == "fixed" and not workload.num_gpus]):
        _run_job(job, options, stop_s - time.monotonic(), "--profile", str(options.out.resolve()))
    if not options.out.exists():
        return 1
    print("\n".join(options.out.read_text().splitlines()[:45]))
    return 0


def make_model(options: argparse.Namespace) -> int:
    """Writes a checkpoint of random weights."""
    from benchmarks import random_model

    random_model.make(options.folder, shape=options.shape, tokenizer_dir=options.tokenizer)
    return 0


def show(options: argparse.Namespace) -> int:
    """Prints the table of a file of rows."""
    print(baselines.table(baselines.load(options.file)))
    return 0


def merge(options: argparse.Namespace) -> int:
    """Merges rows that were measured elsewhere into the card's file."""
    rows = baselines.load(options.file)
    if not rows:
        raise ValueError(f"{options.file}: there are no rows in it.")
    _merge(rows, options.out or baselines.file_of(rows[0].gpu))
    return 0


def command_of(workloads: Sequence[Workload], engines: Sequence[str]) -> str:
    """The command that measures these rows again."""
    rows = ",".join(workload.name for workload in workloads)
    return f'make bench-train ROWS="{rows}" ENGINES={",".join(engines)} MODEL=…'


def read_rows(lines: Iterable[str], output: Output, log: IO[str]) -> None:
    """Sorts a worker's lines into rows, which are also printed, and the log."""
    for line in lines:
        if line.startswith(PREFIX):
            row = Row(**json.loads(line.removeprefix(PREFIX)))
            output.add(row)
            unit = " tok/s" if row.tok_s and not row.context_tokens else ""
            print(f"  {row.workload}: {baselines.said(row)}{unit}", flush=True)
        else:
            output.log.append(line)
            log.write(line)
            log.flush()


def worker_environment() -> dict[str, str]:
    """The worker's: our packages first, nothing downloaded or reported, and an allocator that fragments little, for every engine alike."""
    paths = [str(CHECKOUT / root) for root in ROOTS] + [path for path in [os.environ.get("PYTHONPATH")] if path]
    defaults = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def checkout_commit() -> str:
    """The checkout's commit, with `-dirty` where files differ; `unknown` where there is no git."""
    found = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found


def _of_engine(engine: str, workloads: Sequence[Workload]) -> list[Workload]:
    """What `engine` runs of `workloads`, each once.

    Ours on several GPUs comes with the same on one. Peers know no variants: they run the base. Packs of several rows are for engines
    that keep the rows apart.
    """
    if engine == OURS:
        mine = [one for workload in workloads for one in ([workload.on_one_gpu, workload] if workload.num_gpus else [workload])]
    else:
        mine = [workload.base for workload in workloads if not workload.num_gpus and (engine == "unsloth" or not workload.is_packed)]
    return list(dict.fromkeys(mine))


def _run_job(job: Job, options: argparse.Namespace, seconds: float, *more: str) -> list[Row]:
    names = ", ".join(workload.name for workload in job.workloads)
    if seconds < 1:
        print(f"{job.engine}: no time is left for {names}", flush=True)
        return []
    print(f"{job.engine}: {names}", flush=True)
    command = [sys.executable, "-P", "-m", "benchmarks.worker", "--engine", job.engine, "--model", str(options.model.resolve())]
    command += ["--workloads", ",".join(workload.name for workload in job.workloads), "--seconds", f"{seconds - KILL_GRACE_S:.0f}", *more]
    if options.steps:
        command += ["--steps", *map(str, options.steps)]
    with _log_file(options.logs, "-".join(filter(None, (job.engine, job.workloads[0].method, job.workloads[0].process)))) as log:
        return _run_worker(command, seconds=seconds, log=log)


def _run_worker(command: Sequence[str], *, seconds: float, log: IO[str]) -> list[Row]:
    """The rows of one worker, as many as it had when it ended or its time was over. Says so, with the log's end, where it failed."""
    output = Output()
    started_s = time.monotonic()
    log.write(shlex.join(command) + "\n")
    process = subprocess.Popen(
        command,
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=tempfile.gettempdir(),
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read_all, args=(process.stdout, output, log), daemon=True)
    reader.start()
    try:
        status: int | str = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        process.kill()
        process.wait()
        reader.join(KILL_GRACE_S)
    print(f"  {time.monotonic() - started_s:.0f} s", flush=True)
    if status != 0 or any(not _is_result(row) for row in output.rows):
        print(f"  ended with {status}; the log ends with\n" + "".join(f"    {line}" for line in output.log[-25:]), flush=True)
    return output.rows


def _read_all(pipe: IO[str], output: Output, log: IO[str]) -> None:
    with pipe:
        read_rows(pipe, output, log)


def _is_result(row: Row) -> bool:
    """Whether the row says something about the engine: a figure, or that memory did not suffice."""
    return row.error in (None, "out of memory")


def _merge(rows: Sequence[Row], path: Path) -> None:
    merged = baselines.merge(baselines.load(path), rows)
    baselines.save(path, merged)
    print(f"{len(rows)} rows merged into {path.name}, which has {len(merged)}", flush=True)


def _host(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return f", {rows[0].gpu}, torch {rows[0].torch}, triton {rows[0].triton}, transformers {rows[0].transformers}"


@contextmanager
def _log_file(folder: Path | None, name: str) -> Iterator[IO[str]]:
    if folder is None:
        with tempfile.TemporaryFile("w+") as file:
            yield file
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.log").open("a") as file:
            yield file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Training steps, engine beside engine on one GPU.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("bench", help="measure workloads with every engine and merge the rows")
    _add_measuring(command, engines=(OURS, *PEERS), limit_s=570)
    command.add_argument("--out", type=Path, help="file of rows to merge into (default: the card's, in baselines/)")
    command.add_argument("--dry-run", action="store_true", help="print the table, write no rows")
    command.add_argument("--commit", help="commit to note in the rows, where there is no git")
    command.set_defaults(run=bench)
    command = commands.add_parser("profile", help="write kernels by time, from torch.profiler")
    _add_measuring(command, engines=(OURS,), limit_s=300)
    command.add_argument("--out", type=Path, required=True, help="text file to write")
    command.set_defaults(run=profile)
    command = commands.add_parser("make-model", help="write a checkpoint of random weights")
    command.add_argument("folder", type=Path)
    command.add_argument("--tokenizer", type=Path, help="folder whose tokenizer goes along (short workloads need one)")
    command.add_argument("--shape", choices=("llama-8b", "tiny"), default="llama-8b")
    command.set_defaults(run=make_model)
    command = commands.add_parser("table", help="print the table of a file of rows")
    command.add_argument("file", type=Path, nargs="?", default=baselines.file_of("NVIDIA H200"))
    command.set_defaults(run=show)
    command = commands.add_parser("merge", help="merge a file of rows into the card's")
    command.add_argument("file", type=Path)
    command.add_argument("--out", type=Path)
    command.set_defaults(run=merge)
    return parser


def _add_measuring(command: argparse.ArgumentParser, *, engines: Sequence[str], limit_s: float) -> None:
    command.add_argument("--rows", type=_workloads, required=True, help="workloads, comma-separated")
    command.add_argument("--engines", type=_engines, default=list(engines), help=f"comma-separated (default: {','.join(engines)})")
    command.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    command.add_argument("--limit-s", type=float, default=limit_s, help=f"seconds for everything (default: {limit_s:.0f})")
    command.add_argument("--steps", type=int, nargs=2, metavar=("WARMUP", "MEASURED"), help="in place of the workload's own")
    command.add_argument("--logs", type=Path, help="folder for what the engines print")


def _workloads(text: str) -> list[Workload]:
    try:
        return parse_all(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _engines(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(names) - {OURS, *PEERS}:
        raise argparse.ArgumentTypeError(f"engines: got {sorted(unknown)}; wanted some of {', '.join((OURS, *PEERS))}.")
    return names


if __name__ == "__main__":
    sys.exit(main())
