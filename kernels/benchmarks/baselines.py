"""Measured rows: the JSON files in `baselines/`, how new rows replace old ones, and the ratios between engines.

A ratio is taken within one run id only: one call, one machine, one after the other. So rows of one run that belong to one shape go
together: they leave the file when a later run has measured all of them again.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.workloads import DETERMINISTIC, Workload, parse

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "baselines"
OURS = "finery"
PEERS = ("unsloth", "liger", "hf")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine on one workload. `tok_s` counts tokens trained a second over the median step; None where it ran out of memory."""

    workload: str
    engine: str
    tok_s: float | None = None
    step_s: float | None = None
    num_steps: int = 0
    num_warmup_steps: int = 0
    peak_alloc_gib: float | None = None
    peak_reserved_gib: float | None = None
    budget_gib: float | None = None
    """What the engine was told to stay within."""
    loss: float | None = None
    """Of the last measured step; of a CPU's epoch, the mean."""
    first_loss: float | None = None
    """Of the first warm-up step. Short rows have none, see `losses`."""
    context_tokens: int | None = None
    """The longest row that trained, of a context workload."""
    is_lower_bound: bool | None = None
    """Whether the search for `context_tokens` ended for lack of time: longer ones may train."""
    is_probe: bool | None = None
    """Whether the search ran passes only as far as their peak of memory: `step_s` is that of one."""
    estimate_gib: float | None = None
    """What Finery said beforehand that `peak_alloc_gib` would be."""
    losses: list[float] | None = None
    """Means of five steps each from the first on, of short rows."""
    load_s: float | None = None
    error: str | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    engine_version: str = ""
    run_id: str = ""
    date: str = ""
    commit: str = ""
    command: str = ""


@dataclass(frozen=True)
class Ratio:
    """How many times better our figure is than the other's, within the run `run_id`. `of` names the figure; `peer` may be ourselves."""

    workload: str
    peer: str
    value: float
    of: str
    run_id: str


def file_of(gpu: str) -> Path:
    """The file for rows of that card: `h200.json` for an NVIDIA H200."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    return FOLDER / f"{name or 'unknown'}.json"


def finery_version() -> str:
    """Finery's own version."""
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]


def load(path: Path) -> list[Row]:
    """The rows of a file, none where it is missing. Raises ValueError for a file of another form."""
    if not path.exists():
        return []
    known = {field.name for field in fields(Row)}
    try:
        found = json.loads(path.read_text())["rows"]
        return [Row(**{str(key): value for key, value in row.items() if key in known}) for row in found]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: got {error!r}; wanted {{'rows': [{{'workload': …, 'engine': …}}, …]}}.") from error


def save(path: Path, rows: Iterable[Row]) -> None:
    """Writes `rows` in the order of their workloads, leaving out what is not known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
    path.write_text(json.dumps({"rows": plain}, indent=1) + "\n")


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`old` with the rows of newer runs. What a run measured of a shape is dropped where a newer one measured all of it again."""
    groups = _groups([*old, *new])
    fresh = {key: groups[key] for key in _groups(new)}
    kept = [
        row
        for key, rows in groups.items()
        if key in fresh or not any(key[0] == other[0] and _covers(by, rows) for other, by in fresh.items())
        for row in rows
    ]
    return sorted(kept, key=lambda row: (shape_of(row), row.date, row.run_id, row.workload, row.engine))


def shape_of(row: Row) -> str:
    """The name of the row's work as peers do it; rows of one shape are compared."""
    workload = _workload_of(row)
    return row.workload if workload is None else workload.base.name


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Ours against what it is compared with in the same run: peers' rows of its shape, or our own of the same work done otherwise.

    Contexts are compared by length, where the other's is known to be its longest; loading by seconds; everything else by speed.
    """
    found: list[Ratio] = []
    for ours in rows:
        for other in rows:
            if ours.engine != OURS or ours.run_id != other.run_id or not _are_compared(ours, other):
                continue
            of = _compared_figure(ours)
            mine, theirs = getattr(ours, of), getattr(other, of)
            if mine and theirs and not other.is_lower_bound:
                found.append(Ratio(ours.workload, other.engine, theirs / mine if of == "load_s" else mine / theirs, of, ours.run_id))
    return found


def table(rows: Sequence[Row]) -> str:
    """`rows` as a Markdown table; ratios stand in our rows."""
    by_row: dict[tuple[str, str], list[str]] = {}
    for ratio in ratios(rows):
        by_row.setdefault((ratio.workload, ratio.run_id), []).append(f"{ratio.value:.2f} x {ratio.peer}")
    header = ("workload", "engine", "tok/s", "step s", "alloc GiB", "estimate GiB", "reserved GiB", "loss", "ratio", "run")
    lines = [header, tuple("---" for _ in header)]
    for row in rows:
        mine = by_row.get((row.workload, row.run_id), []) if row.engine == OURS else []
        lines.append((row.workload, row.engine, *_figures(row), ", ".join(mine), row.run_id))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def said(row: Row) -> str:
    """The row's figure, or why there is none."""
    if row.error:
        return row.error
    if row.context_tokens:
        how = "in passes to their peak" if row.is_probe else f"at {_speed(row)}"
        return f"{'≥ ' if row.is_lower_bound else ''}{row.context_tokens:,} tokens {how}"
    return f"loaded in {row.load_s:.1f} s" if _is_loading(row) and row.load_s is not None else _speed(row)


def _speed(row: Row) -> str:
    return f"{row.tok_s:,.0f}" if row.tok_s else "–"


def _workload_of(row: Row) -> Workload | None:
    """None where no workload has that name."""
    try:
        return parse(row.workload)
    except ValueError:
        return None


def _is_loading(row: Row) -> bool:
    return row.workload.startswith("load ")


def _compared_figure(row: Row) -> str:
    return "context_tokens" if row.workload.startswith("context ") else "load_s" if _is_loading(row) else "tok_s"


def _are_compared(ours: Row, other: Row) -> bool:
    """Peers' rows with ours of their shape on one GPU; ours on several with ours on one, ours in deterministic mode with ours without."""
    workload = _workload_of(ours)
    if workload is not None and workload.num_gpus:
        return other.engine == OURS and workload.num_gpus > 1 and other.workload == workload.on_one_gpu.name
    if other.engine == OURS:
        return workload is not None and workload.variant == DETERMINISTIC and other.workload == workload.base.name
    return shape_of(ours) == other.workload


def _figures(row: Row) -> tuple[str, str, str, str, str, str]:
    allocated = _number(row.peak_alloc_gib, 2)
    if row.budget_gib is not None and row.peak_alloc_gib is not None:
        allocated += f" {'>' if row.peak_alloc_gib > row.budget_gib else '≤'} {row.budget_gib:g}"
    estimate = _number(row.estimate_gib, 2)
    if row.estimate_gib is not None and row.peak_alloc_gib:
        estimate += f" ({row.estimate_gib / row.peak_alloc_gib - 1:+.1%})"
    return said(row)[:48], _number(row.step_s, 4), allocated, estimate, _number(row.peak_reserved_gib, 2), _number(row.loss, 3)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """By shape and run; a later row of one workload and engine takes the place of an earlier one."""
    groups: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        groups.setdefault((shape_of(row), row.run_id), {})[row.workload, row.engine] = row
    return {key: list(group.values()) for key, group in groups.items()}


def _covers(newer: Iterable[Row], older: Iterable[Row]) -> bool:
    return {(row.workload, row.engine) for row in older} <= {(row.workload, row.engine) for row in newer}
