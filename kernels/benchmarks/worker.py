"""One engine in one process: loads it once, measures its workloads, and prints each row as a line of JSON behind `ROW `.

`train` starts it, reads those lines and keeps everything else as a log. Engines of one process each cannot disturb one another's
allocator, patches or compiled code.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.baselines import OURS, Row, finery_version
from benchmarks.workloads import Workload, parse_all

if TYPE_CHECKING:
    from benchmarks.finery_engine import FineryEngine
    from benchmarks.peer_engines import PeerEngine

PREFIX = "ROW "


@dataclass(frozen=True)
class Options:
    """What the worker is to do. `deadline_s` is on the monotonic clock."""

    engine: str
    model_dir: Path
    workloads: list[Workload]
    deadline_s: float
    num_steps: tuple[int, int] | None
    profile: Path | None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measures one engine; started by train.py.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workloads", type=parse_all, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--steps", type=int, nargs=2, metavar=("WARMUP", "MEASURED"))
    parser.add_argument("--profile", type=Path)
    given = parser.parse_args(arguments)
    steps = (int(given.steps[0]), int(given.steps[1])) if given.steps else None
    run(Options(given.engine, given.model, given.workloads, time.monotonic() + given.seconds, steps, given.profile))


def run(options: Options) -> None:
    """Measures every workload in turn; one that fails gives a row that says so."""
    if options.engine == "unsloth":
        importlib.import_module("unsloth")  # It replaces parts of transformers and TRL, and wants to come before them.
    from benchmarks.random_model import with_positions

    num_positions = max(workload.sequence_length * (2 if workload.kind == "context" else 1) for workload in options.workloads)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = with_positions(options.model_dir, num_positions=num_positions, folder=Path(folder))
        _measure_all(options, model_dir, num_positions)


def _measure_all(options: Options, model_dir: Path, num_positions: int) -> None:
    first = options.workloads[0]
    if first.kind == "load":
        from benchmarks import loading

        _print_each(options, lambda workload: loading.measured(options.engine, workload, model_dir))
        return
    started_s = time.perf_counter()
    if first.num_gpus:
        from benchmarks.own_loop import OwnLoop

        loop = OwnLoop(first, model_dir)
        load_s = time.perf_counter() - started_s
        _print_each(options, lambda workload: loop.measured(workload, num_steps=options.num_steps or workload.num_steps), load_s=load_s)
        return
    engine = _engine(options, model_dir, num_positions)
    load_s = time.perf_counter() - started_s
    _print_each(options, lambda workload: _measured(engine, workload, options), load_s=load_s, release=engine.release)


def _print_each(
    options: Options, measured: Callable[[Workload], Row], *, load_s: float | None = None, release: Callable[[], None] = lambda: None
) -> None:
    """Prints the row of every workload; a failure is a row too."""
    from benchmarks import measure

    for workload in options.workloads:
        measure.reset_peaks()
        try:
            row = measured(workload)
        except Exception as error:  # noqa: BLE001  # a row that fails must not take the rows after it along
            traceback.print_exc()
            reason = "out of memory" if measure.is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            row = Row(workload=workload.name, engine=options.engine, error=" ".join(reason.split())[:200])
        _print(row, load_s)
        with suppress(RuntimeError):
            release()


def _print(row: Row, load_s: float | None) -> None:
    # A progress bar may have left its line open.
    print(f"\n{PREFIX}{json.dumps(asdict(_stamped(row, load_s)))}", flush=True)


def _measured(engine: FineryEngine | PeerEngine, workload: Workload, options: Options) -> Row:
    """The row of `workload`, with what we estimated beforehand where the engine is ours."""
    if options.engine != OURS or workload.kind == "context":
        return _run(engine, workload, options)
    from benchmarks.finery_engine import estimate_gib

    estimated = estimate_gib(workload, engine.model_dir)
    return replace(_run(engine, workload, options), estimate_gib=estimated)


def _search(engine: FineryEngine | PeerEngine, workload: Workload, options: Options) -> Row:
    """A context's row; each success on the way is printed. Searches that are yet to come have their share of the time."""
    from benchmarks import measure

    def estimated(row: Row) -> Row:
        if options.engine != OURS or row.context_tokens is None:
            return row
        from benchmarks.finery_engine import estimate_gib

        return replace(row, estimate_gib=estimate_gib(replace(workload, sequence_length=row.context_tokens), engine.model_dir))

    num_left = len(options.workloads) - options.workloads.index(workload)
    budget_s = (options.deadline_s - time.monotonic()) / num_left
    return estimated(measure.context(engine, workload, budget_s=budget_s, report=lambda row: _print(estimated(row), None)))


def _run(engine: FineryEngine | PeerEngine, workload: Workload, options: Options) -> Row:
    from benchmarks import kernel_profile, measure, trl_samples
    from benchmarks.peer_engines import PeerEngine

    num_steps = options.num_steps or workload.num_steps
    if workload.kind == "context":
        return _search(engine, workload, options)
    if workload.kind == "short":
        if isinstance(engine, PeerEngine):
            return trl_samples.short_by_trl(engine, workload, num_steps=num_steps)
        return trl_samples.short(engine, workload, num_steps=num_steps)
    row = measure.fixed(engine, workload, num_steps=num_steps)
    if options.profile is not None:
        with options.profile.open("a") as file:
            file.write(kernel_profile.profile(engine, workload, num_warmup=num_steps[0]))
    return row


def _engine(options: Options, model_dir: Path, max_sequence_length: int) -> FineryEngine | PeerEngine:
    method = options.workloads[0].method
    assert all(workload.method == method for workload in options.workloads)
    if options.engine == OURS:
        from benchmarks.finery_engine import FineryEngine

        return FineryEngine(options.workloads[0], model_dir)
    from benchmarks.peer_engines import PeerEngine

    return PeerEngine(options.engine, method, model_dir, max_sequence_length=max_sequence_length)


def _stamped(row: Row, load_s: float | None) -> Row:
    """`row` with what it was measured on, and the seconds that its process took to load the model, unless the row is about them."""
    import torch

    from benchmarks import peer_engines

    return replace(
        row,
        load_s=row.load_s if load_s is None else round(load_s, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        torch=torch.__version__,
        triton=importlib.metadata.version("triton"),
        transformers=importlib.metadata.version("transformers"),
        engine_version=finery_version() if row.engine == OURS else peer_engines.version_of(row.engine),
    )


if __name__ == "__main__":
    main()
