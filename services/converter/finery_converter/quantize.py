"""16-bit GGUF files made smaller by llama.cpp's own quantization.

Owns the types on offer, what each needs, and saying which tensors came out as another type than asked. The work is done in a process of
its own by every core; this module is that process's program as well. Leaves the importance matrix to `importance`, writing the 16-bit
file to `gguf`.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from finery_common.errors import (
    FailedPreconditionError,
    FineryError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnimplementedError,
)
from finery_converter import engine_process, ggufparts
from finery_converter.engine_process import Progress
from finery_converter.libllama import ImportanceEntry, Library, QuantizeParams

SOURCE_TYPES = ("f32", "f16", "bf16")
_SPARE_BYTES = 64 * 1024 * 1024
_TENSOR = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-")
_FALLBACK = re.compile(r"^warning: (\S+)\s+- ncols.*\(required for type\s+(\S+)\).*-> falling back to\s+(\S+)")
_UNKNOWN_ARCHITECTURE = re.compile(r"unknown model architecture: '([^']*)'")


@dataclass(frozen=True, kw_only=True)
class QuantizationType:
    """A file type of llama.cpp: its number there, the type of its output tensor (all have an opinion of their own on that one)."""

    ftype: int
    output_type: str = "q6_k"
    needs_importance: bool = False


TYPES: Mapping[str, QuantizationType] = {
    "q8_0": QuantizationType(ftype=7, output_type="q8_0"),
    "q6_k": QuantizationType(ftype=18),
    "q5_k_m": QuantizationType(ftype=17),
    "q5_k_s": QuantizationType(ftype=16),
    "q4_k_m": QuantizationType(ftype=15),
    "q4_k_s": QuantizationType(ftype=14),
    "q4_0": QuantizationType(ftype=2),
    "q3_k_l": QuantizationType(ftype=13),
    "q3_k_m": QuantizationType(ftype=12),
    "q2_k": QuantizationType(ftype=10),
    "iq4_nl": QuantizationType(ftype=25),
    "iq4_xs": QuantizationType(ftype=30),
    "iq3_m": QuantizationType(ftype=27),
    "iq3_s": QuantizationType(ftype=26),
    "iq3_xxs": QuantizationType(ftype=23, output_type="q5_k", needs_importance=True),
    "iq2_m": QuantizationType(ftype=29, output_type="q5_k", needs_importance=True),
    "iq2_s": QuantizationType(ftype=28, output_type="q5_k", needs_importance=True),
    "iq2_xs": QuantizationType(ftype=20, output_type="q5_k", needs_importance=True),
    "iq2_xxs": QuantizationType(ftype=19, output_type="q5_k", needs_importance=True),
    "iq1_m": QuantizationType(ftype=31, output_type="q5_k", needs_importance=True),
    "iq1_s": QuantizationType(ftype=24, output_type="q5_k", needs_importance=True),
}


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A tensor that is not of the type that its file type has for it, because its width is no multiple of that type's block."""

    tensor: str
    wanted: str
    got: str


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written: the files in order, every tensor of another type than asked, how many tensors have each type."""

    files: tuple[Path, ...]
    fallbacks: tuple[Fallback, ...]
    type_counts: Mapping[str, int]
    without_importance: tuple[str, ...]


def quantize(
    source: Path,
    output_file: Path,
    *,
    type_: str,
    on_progress: Progress,
    importance: Path | None = None,
    max_part_bytes: int | None = None,
    num_threads: int | None = None,
) -> Quantized:
    """Writes `source`, a 16- or 32-bit GGUF file (the first part where it has several), as `output_file` of `type_` (a key of `TYPES`).

    `importance` is a file of `importance`; `max_part_bytes` splits the output as `ggufparts.split` does; `num_threads` is by default the
    number of this machine's cores. Start it from the main thread. Raises InvalidArgumentError for an unknown type,
    FailedPreconditionError for a missing matrix or library, ResourceExhaustedError for a full disk (said before, with the bytes needed).
    """
    kind = checked_type(type_, has_importance=importance is not None)
    request: dict[str, object] = {
        "source": str(source),
        "output_file": str(output_file),
        "ftype": kind.ftype,
        "importance": str(importance) if importance else None,
        "num_threads": num_threads or os.cpu_count() or 1,
    }
    share = 1.0 if max_part_bytes is None else 0.9
    try:
        answer = engine_process.run(__name__, request, on_progress=lambda done: on_progress(done * share))
        written = ggufparts.read_header(output_file).tensors
        files = (output_file,)
        if max_part_bytes is not None:
            files = ggufparts.split(
                output_file, max_part_bytes=max_part_bytes, on_progress=lambda done: on_progress(share + done * (1 - share))
            )
    except BaseException:
        output_file.unlink(missing_ok=True)
        raise
    fallbacks = [Fallback(**item) for item in cast("list[dict[str, str]]", answer["fallbacks"])]
    return Quantized(
        files=files,
        fallbacks=(*fallbacks, *_silent_fallbacks(written, kind, told={item.tensor for item in fallbacks})),
        type_counts=ggufparts.type_counts(written),
        without_importance=_without_importance(written, cast("list[str]", answer["importance_of"])),
    )


def checked_type(type_: str, *, has_importance: bool) -> QuantizationType:
    """The type of that name. Raises InvalidArgumentError for an unknown one, FailedPreconditionError where a matrix is missing."""
    kind = TYPES.get(type_)
    if kind is None:
        raise InvalidArgumentError(
            f"There is no GGUF type {type_!r}. Known are f32, f16, bf16 and {', '.join(TYPES)}.", code="gguf_unknown_type", param="type"
        )
    if kind.needs_importance and not has_importance:
        free = ", ".join(name for name, item in TYPES.items() if not item.needs_importance)
        raise FailedPreconditionError(
            f"{type_} needs an importance matrix, or its output would be noise: give a calibration set, or take one of {free}.",
            code="importance_missing",
            param="type",
        )
    return kind


def _silent_fallbacks(written: Mapping[str, ggufparts.TensorFacts], kind: QuantizationType, *, told: set[str]) -> list[Fallback]:
    """What llama.cpp does to the output tensor (the embeddings, where they are tied) without a word: q8_0 where the width does not fit."""
    name = "output.weight" if "output.weight" in written else "token_embd.weight"
    fact = written.get(name)
    if fact is None or name in told or fact.type_ != "q8_0" or kind.output_type == "q8_0" or fact.shape[0] % 256 == 0:
        return []
    return [Fallback(tensor=name, wanted=kind.output_type, got=fact.type_)]


def _without_importance(written: Mapping[str, ggufparts.TensorFacts], importance_of: Sequence[str]) -> tuple[str, ...]:
    if not importance_of:
        return ()
    quantized = {name for name, fact in written.items() if fact.type_ not in SOURCE_TYPES}
    return tuple(sorted(quantized - {*importance_of, "output.weight", "token_embd.weight"}))


# Below: the child's side.


class _Log:
    """Follows llama.cpp's log, which comes in pieces of lines."""

    def __init__(self, num_elements: Mapping[str, int], on_progress: Progress) -> None:
        self._num_elements, self._on_progress = num_elements, on_progress
        self._total, self._done, self._line, self._current = max(1, sum(num_elements.values())), 0, "", ""
        self.fallbacks: list[Fallback] = []
        self.errors: list[str] = []

    def __call__(self, level: int, text: str) -> None:
        if level == _LOG_ERROR:
            self.errors.append(text.strip())
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)
        named = _TENSOR.match(self._line)
        if named and named[1] != self._current:
            # The line is finished once its tensor is; the one before is done.
            self._done += self._num_elements.get(self._current, 0)
            self._current = named[1]
            self._on_progress(self._done / self._total)

    def _take(self, line: str) -> None:
        fell_back = _FALLBACK.match(line)
        if fell_back:
            self.fallbacks.append(Fallback(tensor=fell_back[1], wanted=fell_back[2].lower(), got=fell_back[3].lower()))


_LOG_ERROR = 4


def _work(request: dict[str, object], on_progress: Progress) -> dict[str, object]:
    source, output_file = Path(cast("str", request["source"])), Path(cast("str", request["output_file"]))
    facts = _source_tensors(source)
    log = _Log({name: fact.num_elements for name, fact in facts.items()}, on_progress)
    library = Library(log, with_kernels=False)
    params: QuantizeParams = library.functions.llama_model_quantize_default_params()
    params.ftype, params.nthread = cast("int", request["ftype"]), cast("int", request["num_threads"])
    matrix = _importance(request["importance"], facts)
    # The array ends with an entry without a name.
    entries = (ImportanceEntry * (len(matrix) + 1))(*[_entry(name, values) for name, values in matrix.items()])
    if matrix:
        params.imatrix = entries
    _check_room(source, facts, output_file, cast("int", request["ftype"]))
    if library.functions.llama_model_quantize(os.fsencode(source), os.fsencode(output_file), ctypes.byref(params)) != 0:
        raise _failure(log.errors, output_file)
    on_progress(1.0)
    return {"fallbacks": [asdict(item) for item in log.fallbacks], "importance_of": list(matrix)}


def _source_tensors(source: Path) -> dict[str, ggufparts.TensorFacts]:
    """All of them, also where the source has parts. Raises InvalidArgumentError for one that is quantized already."""
    found: dict[str, ggufparts.TensorFacts] = {}
    for part in ggufparts.parts_of(source):
        found |= ggufparts.read_header(part).tensors
    lossy = next((name for name, fact in found.items() if fact.type_ not in (*SOURCE_TYPES, "i32", "i8", "i16", "i64", "f64")), None)
    if lossy:
        raise InvalidArgumentError(
            f"{source.name} is quantized already ({lossy} is {found[lossy].type_}); quantize a file of {', '.join(SOURCE_TYPES)}.",
            code="gguf_quantized_twice",
        )
    return found


def _importance(file: object, facts: Mapping[str, ggufparts.TensorFacts]) -> dict[str, np.ndarray]:
    """Mean squares by tensor, checked against the source's shapes before hours are spent."""
    if file is None:
        return {}
    from finery_converter.importance import load

    matrix = load(Path(cast("str", file)))
    for name, values in matrix.items():
        shape = facts[name].shape if name in facts else ()
        wanted = shape[0] * (shape[2] if len(shape) > 2 else 1) if shape else 0
        if values.size != wanted:
            raise InvalidArgumentError(
                f"The importance matrix has {values.size} values for {name}, and the model's tensor wants {wanted}; it is another model's.",
                code="importance_of_another_model",
            )
    return matrix


def _entry(name: str, values: np.ndarray) -> ImportanceEntry:
    return ImportanceEntry(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)


def _check_room(source: Path, facts: Mapping[str, ggufparts.TensorFacts], output_file: Path, ftype: int) -> None:
    """Wants room for the widest form that a tensor may take, q8_0, or what the source has already."""
    bits = 8.5 if ftype == TYPES["q8_0"].ftype else 6.5625
    weights_bytes = sum(min(fact.size_bytes, int(fact.num_elements * bits / 8)) for fact in facts.values())
    header_bytes = max(0, source.stat().st_size - sum(fact.size_bytes for fact in facts.values()))
    needed_bytes, free_bytes = weights_bytes + header_bytes + _SPARE_BYTES, ggufparts.free_bytes(output_file.parent)
    if needed_bytes > free_bytes:
        raise ResourceExhaustedError(
            f"Quantizing needs up to {needed_bytes:,} bytes of disk and {free_bytes:,} are free at {output_file.parent}; free space there.",
            code="disk_full",
        )


def _failure(errors: Sequence[str], output_file: Path) -> FineryError:
    text = " ".join(filter(None, errors))
    unknown = _UNKNOWN_ARCHITECTURE.search(text)
    if unknown:
        return UnimplementedError(
            f"llama.cpp does not know the architecture {unknown[1]!r} of this GGUF file.", code="gguf_unsupported_architecture"
        )
    missing = re.search(r"Missing importance matrix for tensor (\S+)", text)
    if missing:
        return FailedPreconditionError(
            f"The importance matrix has nothing for {missing[1]}, which this type needs; take a type that needs no matrix.",
            code="importance_missing",
        )
    if "basic_ios::clear" in text or "iostream error" in text:
        # The only stream it has is the output.
        return engine_process.disk_full(output_file)
    return InternalError(f"llama.cpp did not quantize: {text[-500:] or 'it said nothing'}", code="gguf_quantization_failed")


if __name__ == "__main__":
    sys.exit(engine_process.child_main(_work))
