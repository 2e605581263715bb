"""Numbers that tell how far models' logits are from one another, taken a few positions at a time.

Owns the walk over positions that several models' logits share, and the sums: largest, mean and root-mean-square difference, KL divergence,
top-1 agreement, perplexity. Holds the last hidden states of every position and logits of a few. Leaves what is allowed to `parity`.

Letters: N positions, H hidden size, V vocabulary, M models, the first of which is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finery_converter.streamed import StreamedModel

NO_TOKEN = -1
_LOGIT_BYTES = 96 * 1024 * 1024
_TALLY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Difference:
    """Of a model's logits from the reference's, over all positions. KL in nats."""

    num_positions: int
    max_abs: float
    mean_abs: float
    rms: float
    max_kl: float
    mean_kl: float
    top1: float
    """Share of positions with the same most probable token."""
    is_finite: bool


@dataclass(frozen=True)
class Choices:
    """At positions where a token is expected of the models, in order."""

    expected_N: torch.Tensor
    best_MN: torch.Tensor
    gap_N: torch.Tensor
    """Between the reference's two largest logits."""


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    differences: tuple[Difference, ...]
    """Of every model but the reference."""
    perplexities: tuple[float, ...]
    spread: float
    """Standard deviation of the reference's logits at a position, root mean square over positions."""
    choices: Choices


def measure(
    models: Sequence[StreamedModel], states: Sequence[Sequence[torch.Tensor]], *, targets: Sequence[int], expected: Sequence[int]
) -> Measured:
    """Compares models at all positions of all sequences, whose last hidden states (N, H) `states` has by model.

    `targets` are the tokens that perplexity is taken of, `expected` those that models are asked to choose, by position; NO_TOKEN for none.
    """
    all_states_NH = [torch.cat(list(sequences)) for sequences in states]
    tallies = [_Tally() for _ in models[1:]]
    surprises = [_Surprise() for _ in models]
    variance_sum, choices = 0.0, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for rows, logits_MNV in _logits(models, all_states_NH):
        wanted_N, expected_N = torch.tensor(targets[rows]), torch.tensor(expected[rows])
        if (expected_N != NO_TOKEN).any():
            choices.append(_choices(logits_MNV, expected_N))
        step = max(1, _TALLY_BYTES // (8 * logits_MNV[0].shape[1]))
        for start in range(0, len(wanted_N), step):
            few = [logits_NV[start : start + step].double() for logits_NV in logits_MNV]
            logs = [values.log_softmax(-1) for values in few]
            variance_sum += few[0].var(-1, correction=0).sum().item()
            for tally, values, log in zip(tallies, few[1:], logs[1:], strict=True):
                tally.add(few[0], values, reference_log=logs[0], log=log)
            for surprise, log in zip(surprises, logs, strict=True):
                surprise.add(log, wanted_N[start : start + step])
    return Measured(
        differences=tuple(tally.result() for tally in tallies),
        perplexities=tuple(surprise.perplexity() for surprise in surprises),
        spread=math.sqrt(variance_sum / max(1, len(targets))),
        choices=_joined(choices, num_models=len(models)),
    )


def _logits(models: Sequence[StreamedModel], states_MNH: Sequence[torch.Tensor]) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """The logits of all models, so many positions at a time that one model's fill `_LOGIT_BYTES`; a head is read once for each time."""
    step = max(1, _LOGIT_BYTES // (4 * models[0].vocab_size))
    for start in range(0, len(states_MNH[0]), step):
        rows = slice(start, start + step)
        yield rows, [model.logits(states_NH[rows]) for model, states_NH in zip(models, states_MNH, strict=True)]


def _choices(logits_MNV: Sequence[torch.Tensor], expected_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    asked = expected_N != NO_TOKEN
    two = logits_MNV[0][asked].topk(2, dim=-1).values
    return expected_N[asked], torch.stack([values[asked].argmax(-1) for values in logits_MNV]), two[:, 0] - two[:, 1]


def _joined(choices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], *, num_models: int) -> Choices:
    if not choices:
        return Choices(torch.empty(0, dtype=torch.int64), torch.empty(num_models, 0, dtype=torch.int64), torch.empty(0))
    expected, best, gap = zip(*choices, strict=True)
    return Choices(torch.cat(expected), torch.cat(best, dim=1), torch.cat(gap))


class _Tally:
    """Sums over positions of what two models' logits differ by."""

    def __init__(self) -> None:
        self._num_positions = self._num_logits = self._num_agreeing = 0
        self._sum_abs = self._sum_squares = self._sum_kl = self._max_abs = self._max_kl = 0.0
        self._is_finite = True

    def add(self, reference_NV: torch.Tensor, other_NV: torch.Tensor, *, reference_log: torch.Tensor, log: torch.Tensor) -> None:
        """Logits and their log-probabilities, fp64."""
        difference = other_NV - reference_NV
        kl_N = (reference_log.exp() * (reference_log - log)).sum(-1)
        # A comparison with NaN is false, and a maximum may lose it.
        self._is_finite = self._is_finite and bool(difference.isfinite().all())
        self._num_positions += len(difference)
        self._num_logits += difference.numel()
        self._num_agreeing += int((reference_NV.argmax(-1) == other_NV.argmax(-1)).sum())
        self._sum_squares += difference.square().sum().item()
        absolute = difference.abs_()
        self._sum_abs += absolute.sum().item()
        self._max_abs = max(self._max_abs, absolute.max().item())
        self._sum_kl += kl_N.sum().item()
        self._max_kl = max(self._max_kl, kl_N.max().item())

    def result(self) -> Difference:
        return Difference(
            num_positions=self._num_positions,
            max_abs=self._max_abs,
            mean_abs=self._sum_abs / max(1, self._num_logits),
            rms=math.sqrt(self._sum_squares / max(1, self._num_logits)) if self._is_finite else math.nan,
            max_kl=self._max_kl,
            mean_kl=self._sum_kl / max(1, self._num_positions),
            top1=self._num_agreeing / max(1, self._num_positions),
            is_finite=self._is_finite,
        )


class _Surprise:
    """What texts cost a model."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._num_tokens = 0

    def add(self, log_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        asked = targets_N != NO_TOKEN
        self._nats -= log_NV[asked].gather(1, targets_N[asked].unsqueeze(1)).sum().item()
        self._num_tokens += int(asked.sum())

    def perplexity(self) -> float:
        mean = self._nats / max(1, self._num_tokens)
        # Past this a float has no room, and a model no use.
        return math.exp(mean) if mean < 700 else math.inf


def next_tokens(sequences: Sequence[Sequence[int]]) -> list[int]:
    """By position of all sequences, the token that comes after it; NO_TOKEN at an end."""
    return [token for sequence in sequences for token in (*sequence[1:], NO_TOKEN)]
