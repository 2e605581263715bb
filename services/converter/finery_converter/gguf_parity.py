"""What GGUF models say next, side by side: how far a smaller file is from the 16-bit one, or a file from logits that torch computed.

Owns running GGUF models over token ids with llama.cpp and the statistics of what comes out. It does so in a process of its own, whose
program this module is as well. Weights are mapped, not copied, and logits are kept a chunk at a time. Leaves the verdict (which divergence
is too much) and the token ids to the caller.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from finery_common.errors import InternalError, InvalidArgumentError, UnimplementedError
from finery_converter import engine_process
from finery_converter.engine_process import Progress
from finery_converter.libllama import Batch, ContextParams, Library, ModelParams

# Logits that are held of each model at a time.
_CHUNK_BYTES = 64 * 1024 * 1024
_MOST_TOKENS_AT_ONCE = 512
# Of which distributions are made at a time, in float64.
_BLOCK_ELEMENTS = 2 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """A GGUF file (the first part where it has several), with a GGUF adapter on top where `lora` names one, scaled by `lora_scale`."""

    file: Path
    lora: Path | None = None
    lora_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Next-token distributions of a candidate against a reference over `num_positions` places; divergences are KL(reference ‖ candidate)
    in nats. Perplexities are over the sequences' own next tokens.
    """

    num_positions: int
    mean_kl: float
    max_kl: float
    p99_kl: float
    top1_agreement: float
    reference_perplexity: float
    candidate_perplexity: float


def compare(
    reference: GgufModel, candidate: GgufModel, sequences: Sequence[Sequence[int]], *, on_progress: Progress, num_threads: int | None = None
) -> Comparison:
    """Runs both over the token ids `sequences` (each at least two long). Start it from the main thread.

    Raises InvalidArgumentError for ids that the models lack or vocabularies that differ, UnimplementedError for files of another
    architecture than llama.cpp knows.
    """
    request = _request(sequences, num_threads) | {"work": "compare", "reference": _plain(reference), "candidate": _plain(candidate)}
    return Comparison(**cast("dict[str, float]", engine_process.run(__name__, request, on_progress=on_progress)))  # pyright: ignore[reportArgumentType]


def compare_with_logits(
    reference_logits: Path,
    candidate: GgufModel,
    sequences: Sequence[Sequence[int]],
    *,
    on_progress: Progress,
    num_threads: int | None = None,
) -> Comparison:
    """As `compare`, with a reference that was computed elsewhere: a .npy file (tokens of all sequences one after the other, vocabulary).

    Rows may be wider than the candidate's vocabulary (padding); what is beyond is left out.
    """
    request = _request(sequences, num_threads) | {"work": "compare", "logits": str(reference_logits), "candidate": _plain(candidate)}
    return Comparison(**cast("dict[str, float]", engine_process.run(__name__, request, on_progress=on_progress)))  # pyright: ignore[reportArgumentType]


def write_logits(
    model: GgufModel, sequences: Sequence[Sequence[int]], output_file: Path, *, on_progress: Progress, num_threads: int | None = None
) -> None:
    """Writes what `model` says as `output_file`, .npy, float32 (tokens of all sequences one after the other, vocabulary)."""
    request = _request(sequences, num_threads) | {"work": "logits", "candidate": _plain(model), "output_file": str(output_file)}
    engine_process.run(__name__, request, on_progress=on_progress)


def greedy(
    model: GgufModel, prompts: Sequence[Sequence[int]], *, num_tokens: int, on_progress: Progress, num_threads: int | None = None
) -> list[list[int]]:
    """The `num_tokens` likeliest ids, one after the other, that follow each of `prompts`; ends are not looked for."""
    request = _request(prompts, num_threads) | {"work": "greedy", "candidate": _plain(model), "num_tokens": num_tokens}
    return cast("list[list[int]]", engine_process.run(__name__, request, on_progress=on_progress)["continuations"])


def _request(sequences: Sequence[Sequence[int]], num_threads: int | None) -> dict[str, object]:
    if not sequences or any(not sequence for sequence in sequences):
        raise InvalidArgumentError("There are no token ids to run the model on; give at least one in every sequence.")
    return {"sequences": [list(map(int, sequence)) for sequence in sequences], "num_threads": num_threads or os.cpu_count() or 1}


def _plain(model: GgufModel) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(model).items()}


# Below: the child's side.


class _Runner:
    """One model in llama.cpp, its context as long as the longest sequence."""

    def __init__(self, library: Library, model: Mapping[str, object], *, num_tokens: int, num_threads: int, errors: list[str]) -> None:
        self._api, self._errors = library.functions, errors
        file = cast("str", model["file"])
        params: ModelParams = self._api.llama_model_default_params()
        # Repacked weights would be a copy in memory; mapped ones the kernel can drop.
        params.n_gpu_layers, params.use_extra_bufts = 0, False
        self._model = self._api.llama_model_load_from_file(os.fsencode(file), params)
        if not self._model:
            raise self._refused(file)
        self.vocabulary_size: int = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self.chunk = max(1, min(_MOST_TOKENS_AT_ONCE, _CHUNK_BYTES // (4 * self.vocabulary_size), num_tokens))
        self._context = self._new_context(num_tokens, num_threads)
        self._batch: Batch = self._api.llama_batch_init(self.chunk, 0, 1)
        if model.get("lora"):
            self._put_on(cast("str", model["lora"]), cast("float", model["lora_scale"]))

    def _new_context(self, num_tokens: int, num_threads: int) -> object:
        params: ContextParams = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_tokens, self.chunk, self.chunk
        params.n_outputs_max = self.chunk
        params.n_threads = params.n_threads_batch = num_threads
        # Keys and values in full, and plain attention: the comparison is of weights.
        params.type_k = params.type_v = 0
        params.flash_attn_type, params.no_perf = 0, True
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise InternalError(f"llama.cpp gave no context for {num_tokens} tokens: {self._said()}")
        return context

    def _put_on(self, lora: str, scale: float) -> None:
        adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(lora))
        if not adapter:
            raise InvalidArgumentError(
                f"The GGUF adapter {Path(lora).name} does not fit its base: {self._said()}", code="gguf_adapter_unsupported"
            )
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(scale)
        if self._api.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise InternalError(f"llama.cpp did not put {Path(lora).name} on its base: {self._said()}")

    def _refused(self, file: str) -> Exception:
        name, text = Path(file).name, self._said()
        if "unknown model architecture" in text:
            return UnimplementedError(f"llama.cpp does not know the architecture of {name}.", code="gguf_unsupported_architecture")
        return InvalidArgumentError(f"llama.cpp does not open {name}: {text}", code="gguf_unreadable")

    def _said(self) -> str:
        return " ".join(self._errors)[-500:]

    def restart(self) -> None:
        """Forgets the sequence."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def logits(self, ids: Sequence[int], *, start: int) -> np.ndarray:
        """What follows each of `ids`, which stand from place `start` on: float32 (ids, vocabulary), valid until the next call."""
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary_size), None)
        if wrong is not None:
            raise InvalidArgumentError(f"The token id {wrong} is not one of the model's {self.vocabulary_size}.", code="token_unknown")
        self._batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            self._batch.token[index], self._batch.pos[index], self._batch.n_seq_id[index] = token, start + index, 1
            self._batch.seq_id[index][0], self._batch.logits[index] = 0, 1
        status = self._api.llama_decode(self._context, self._batch)
        if status != 0:
            raise InternalError(f"llama.cpp did not compute {len(ids)} tokens (status {status}): {self._said()}")
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(len(ids), self.vocabulary_size))


@dataclass
class _Statistics:
    """Sums over positions, in float64."""

    kls: list[np.ndarray] = field(default_factory=list[np.ndarray])
    num_same: int = 0
    reference_loss: float = 0.0
    candidate_loss: float = 0.0
    num_next: int = 0

    def add(self, reference: np.ndarray, candidate: np.ndarray, next_ids: np.ndarray) -> None:
        """Logits of one chunk (positions, vocabulary); `next_ids` may be one shorter, at a sequence's end."""
        step = max(1, _BLOCK_ELEMENTS // reference.shape[1])
        for start in range(0, len(reference), step):
            block = slice(start, start + step)
            self._add_block(reference[block], candidate[block], next_ids[block])

    def _add_block(self, reference: np.ndarray, candidate: np.ndarray, next_ids: np.ndarray) -> None:
        log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
        places = np.arange(len(next_ids))
        self.reference_loss -= float(log_p[places, next_ids].sum())
        self.candidate_loss -= float(log_q[places, next_ids].sum())
        self.num_next += len(next_ids)
        self.num_same += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        log_q -= log_p
        self.kls.append(-(np.exp(log_p) * log_q).sum(axis=1))

    def result(self) -> Comparison:
        kl = np.concatenate(self.kls)
        num_next = max(1, self.num_next)
        return Comparison(
            num_positions=len(kl),
            mean_kl=_not_negative(float(kl.mean())),
            max_kl=_not_negative(float(kl.max())),
            p99_kl=_not_negative(float(np.quantile(kl, 0.99))),
            top1_agreement=self.num_same / len(kl),
            reference_perplexity=float(np.exp(self.reference_loss / num_next)),
            candidate_perplexity=float(np.exp(self.candidate_loss / num_next)),
        )


def _not_negative(value: float) -> float:
    """Rounding leaves sums of nothing a little below it. NaN, of logits that are none, stays NaN, which no budget lets pass."""
    return value if math.isnan(value) else max(0.0, value)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _work(request: dict[str, object], on_progress: Progress) -> Mapping[str, object]:
    sequences = cast("list[list[int]]", request["sequences"])
    errors: list[str] = []
    library = Library(lambda level, text: errors.append(text.strip()) if level == _LOG_ERROR else None, with_kernels=True)
    num_tokens = max(map(len, sequences)) + cast("int", request.get("num_tokens", 0))

    def runner(name: str) -> _Runner:
        model = cast("Mapping[str, object]", request[name])
        return _Runner(library, model, num_tokens=num_tokens, num_threads=cast("int", request["num_threads"]), errors=errors)

    candidate = runner("candidate")
    if request["work"] == "greedy":
        return {"continuations": list(_continuations(candidate, sequences, cast("int", request["num_tokens"]), on_progress))}
    if request["work"] == "logits":
        _write(candidate, sequences, Path(cast("str", request["output_file"])), on_progress)
        return {}
    reference = runner("reference") if "reference" in request else _Stored(Path(cast("str", request["logits"])), sequences, candidate)
    return asdict(_compared(reference, candidate, sequences, on_progress))


_LOG_ERROR = 4


class _Stored:
    """A reference's logits out of a file, in the order in which they are asked for."""

    def __init__(self, file: Path, sequences: Sequence[Sequence[int]], candidate: _Runner) -> None:
        self._rows, self._next = np.load(file, mmap_mode="r"), 0
        self.vocabulary_size = candidate.vocabulary_size
        wanted = sum(map(len, sequences))
        if self._rows.ndim != 2 or len(self._rows) != wanted or self._rows.shape[1] < self.vocabulary_size:
            raise InvalidArgumentError(
                f"The reference logits in {file.name} have the shape {self._rows.shape}; wanted are {wanted} rows of at least "
                f"{self.vocabulary_size}.",
                code="logits_of_another_model",
            )

    def restart(self) -> None:
        """The next sequence follows in the file."""

    def logits(self, ids: Sequence[int], *, start: int) -> np.ndarray:
        """The next rows."""
        rows = self._rows[self._next : self._next + len(ids), : self.vocabulary_size]
        self._next += len(ids)
        return rows


def _chunks(
    runners: Sequence[_Runner | _Stored], sequences: Sequence[Sequence[int]], chunk: int
) -> Iterator[tuple[Sequence[int], int, int]]:
    """Each sequence's pieces (sequence, start, end), every runner restarted before a sequence."""
    for sequence in sequences:
        for runner in runners:
            runner.restart()
        for start in range(0, len(sequence), chunk):
            yield sequence, start, min(start + chunk, len(sequence))


def _compared(reference: _Runner | _Stored, candidate: _Runner, sequences: Sequence[Sequence[int]], on_progress: Progress) -> Comparison:
    if reference.vocabulary_size != candidate.vocabulary_size:
        raise InvalidArgumentError(
            f"The models have vocabularies of {reference.vocabulary_size} and {candidate.vocabulary_size}; compare files of one model.",
            code="vocabularies_differ",
        )
    statistics, total, done = _Statistics(), sum(map(len, sequences)), 0
    for sequence, start, end in _chunks([reference, candidate], sequences, candidate.chunk):
        ids = sequence[start:end]
        rows = candidate.logits(ids, start=start)
        statistics.add(reference.logits(ids, start=start), rows, np.asarray(sequence[start + 1 : end + 1], dtype=np.int64))
        done += len(ids)
        on_progress(done / total)
    return statistics.result()


def _write(runner: _Runner, sequences: Sequence[Sequence[int]], output_file: Path, on_progress: Progress) -> None:
    total, done = sum(map(len, sequences)), 0
    rows = np.lib.format.open_memmap(output_file, mode="w+", dtype=np.float32, shape=(total, runner.vocabulary_size))
    for sequence, start, end in _chunks([runner], sequences, runner.chunk):
        rows[done : done + end - start] = runner.logits(sequence[start:end], start=start)
        done += end - start
        on_progress(done / total)
    rows.flush()


def _continuations(runner: _Runner, prompts: Sequence[Sequence[int]], num_tokens: int, on_progress: Progress) -> Iterator[list[int]]:
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        likeliest = 0
        for _, start, end in _chunks([runner], [prompt], runner.chunk):
            likeliest = int(runner.logits(prompt[start:end], start=start)[-1].argmax())
        while len(ids) < len(prompt) + num_tokens:
            ids.append(likeliest)
            likeliest = int(runner.logits(ids[-1:], start=len(ids) - 1)[-1].argmax())
        on_progress((index + 1) / len(prompts))
        yield ids[len(prompt) :]


if __name__ == "__main__":
    sys.exit(engine_process.child_main(_work))
