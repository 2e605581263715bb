"""Whether a converted model says what it was made from: base + adapter, applied and not merged.

Owns what is compared, the budgets that it is held to, and the report that goes into the manifest. Leaves passes to `streamed`, sums to
`differences`, single weights to `weight_check` and texts to `calibration`.

**16 and 32 bits.** A merge into a narrower type has to differ from base + adapter: each weight is rounded once. How far that moves
logits depends on the model, the type and the adapter, and no bound through a whole network is of use (each layer may multiply the
errors of those before it; the worst case is larger than the logits). So it is measured. The *yardstick* is the plain implementation: W
+ scale * B A in float32, rounded once to the type, computed block by block as a pass reads the base. A merge passes if its largest and
its root-mean-square logit difference from base + adapter are at most `ALLOWANCE` = 2 times the yardstick's own. A right merge makes the
very same roundings but for near ties that float32 arithmetic decides otherwise (about one weight in ten thousand, by one unit in the
last place), so it lands within a few percent of 1; what is wrong with a merge comes on top. The yardstick shares no code with the
merge, nor the reading of the adapter. What it shares with the reference (the scale, which tensor is whose) the reference uses in
another way, W x + scale * B (A x): a fault there sets the two apart, and `CEILINGS` make that an error and not a wide budget.

**Every weight.** Logits sum over everything: an adapter of little effect, or a single tensor of it, drowns in the rounding of a hundred
others. So each merged number is compared as well with W + scale * B A: not further than half a unit in the last place of its type,
which is what rounding to the nearest means, and float32's own error. That wants no statistics, and finds a single missing tensor as
soon as it changes a single stored number.

**Quantized folders** (NF4, FP8) go through the same: the yardstick quantizes the exact merge plainly, a tensor at a time, and of the
numbers that were written nearly all have to be the yardstick's, none further off than those are.

**What a type may cost** is another question than whether it was written rightly. `LOSSY` answers it for quantized types, those of GGUF
as well: mean KL divergence and top-1 agreement.

**Cost.** A walk reads every weight of a model once. `check_conversion` makes one each for base, base + adapter, yardstick and converted
model, up to `MAX_GREEDY_WALKS` of few tokens for greedy continuations, and reads base and converted model once more for the weights. An
8B model is 16 GB a walk and, with 400 tokens, 6 TFLOP: about 900 seconds of one core in all, by what its head and one of its layers take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from finery_common.errors import FailedPreconditionError
from finery_converter.continuations import Continuation, continue_greedily
from finery_converter.differences import NO_TOKEN, Difference, Measured, measure, next_tokens
from finery_converter.plain_forms import RoundedWeights, form_of
from finery_converter.streamed import StreamedModel
from finery_converter.weight_check import WeightCheck, check_weights
from finery_converter.weights import Weights, folder_weights

ALLOWANCE = 2.0
"""Times the yardstick's difference that a right merge stays below."""
CEILINGS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.35}
"""Of the yardstick's rms difference as a share of the logits' spread."""
_ARITHMETIC = 1e-5
"""Share of the spread that two float32 passes may differ by whatever their weights."""
GREEDY_PROMPTS = 4
GREEDY_PROMPT_TOKENS = 8
GREEDY_TOKENS = 8
MAX_GREEDY_WALKS = 8
_SMALL_SHARE = 0.1
_CANDIDATE, _YARDSTICK = 1, 2
_SHOWN = 3

Sequences = Sequence[Sequence[int]]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class LossyBudget:
    """What a type may cost against the 16-bit model: KL in nats a token."""

    max_mean_kl: float
    min_top1: float

    def failures(self, *, mean_kl: float, top1: float) -> tuple[str, ...]:
        """What is past the budget, in words; NaN is.

        Top-1 agreement counts where the divergence is more than `_SMALL_SHARE` of its budget: a model without preferences, all of whose
        tokens are about as likely, changes its mind at no cost.
        """
        failures: list[str] = []
        if not mean_kl <= self.max_mean_kl:
            failures.append(f"the KL divergence is {mean_kl:.3g} nats, the budget is {self.max_mean_kl:g}")
        if not top1 >= self.min_top1 and not mean_kl <= _SMALL_SHARE * self.max_mean_kl:
            failures.append(f"{top1:.1%} of most probable tokens agree, the budget is {self.min_top1:.0%}")
        return tuple(failures)


LOSSY: dict[str, LossyBudget] = {
    "fp8": LossyBudget(0.12, 0.72),
    "fp8_block": LossyBudget(0.12, 0.72),
    "nf4": LossyBudget(1.30, 0.40),
    "q8_0": LossyBudget(0.03, 0.86),
    "q6_k": LossyBudget(0.08, 0.80),
    "q5_k_m": LossyBudget(0.30, 0.68),
    "q5_k_s": LossyBudget(0.35, 0.66),
    "q4_k_m": LossyBudget(0.30, 0.68),
    "q4_k_s": LossyBudget(0.30, 0.68),
    "q4_0": LossyBudget(1.20, 0.46),
    "iq4_nl": LossyBudget(0.80, 0.50),
    "iq4_xs": LossyBudget(0.80, 0.52),
    "q3_k_l": LossyBudget(0.60, 0.60),
    "q3_k_m": LossyBudget(0.60, 0.60),
    "iq3_m": LossyBudget(0.80, 0.55),
    "iq3_s": LossyBudget(0.80, 0.55),
    "iq3_xxs": LossyBudget(0.80, 0.55),
    "q2_k": LossyBudget(1.60, 0.40),
    "iq2_m": LossyBudget(1.10, 0.54),
    "iq2_s": LossyBudget(1.30, 0.44),
    "iq2_xs": LossyBudget(1.50, 0.40),
    "iq2_xxs": LossyBudget(2.10, 0.34),
    "iq1_m": LossyBudget(2.60, 0.32),
    "iq1_s": LossyBudget(3.30, 0.24),
}
"""The smallest models lose most to a narrow type. These are about twice what SmolLM2-135M loses on the passages, iq types with their
matrix, and 13 points of agreement less; its widths make most types wider than they are called, and wide ones worse than they could be."""


class NotTheSameModelError(FailedPreconditionError):
    """A conversion whose output does not say what base + adapter say. `report` has the numbers."""

    default_code = "parity_failed"

    def __init__(self, message: str, *, report: ParityReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Greedy:
    """Continuations that the reference chose token by token, and how many of these the candidate would not have chosen."""

    num_prompts: int
    num_tokens: int
    num_ties: int
    """Of `num_tokens`, those where rounding itself makes another choice, or nearly."""
    num_different: int
    """Tokens that differ and are no tie."""


@dataclass(frozen=True)
class ParityReport:
    """What was measured, and the budgets that it is held to. Differences of logits are in logits."""

    type: str
    num_sequences: int
    spread: float
    """Standard deviation of the reference's logits at a position, root mean square over positions."""
    difference: Difference
    greedy: Greedy
    perplexity: dict[str, float]
    """By model: `base`, `adapter` (base + adapter) and `converted`, over the same texts."""
    yardstick: Difference | None = None
    budget_max_abs: float | None = None
    budget_rms: float | None = None
    ceiling_rms: float | None = None
    lossy_budget: LossyBudget | None = None
    weights: WeightCheck | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """What is past its budget, in words; nothing for a model that is the same."""
        return tuple(text for text in (self._finite(), self._weights(), self._ceiling(), *self._logits(), *self._lossy()) if text)

    def to_metadata(self) -> dict[str, object]:
        """For the manifest: six digits, nothing that was not measured."""
        metadata = _rounded(asdict(self))
        assert isinstance(metadata, dict)
        return metadata

    def check(self) -> ParityReport:
        """Itself. Raises NotTheSameModelError where something is past its budget."""
        if self.failures:
            raise NotTheSameModelError(
                f"The converted model ({self.type}) does not say what its base and adapter say, and is not published: "
                f"{'; '.join(self.failures)}.",
                report=self,
            )
        return self

    def _finite(self) -> str | None:
        is_finite = self.difference.is_finite and (self.yardstick is None or self.yardstick.is_finite)
        return None if is_finite else "there are NaN or Inf among the logits"

    def _weights(self) -> str | None:
        if self.weights is None or not self.weights.wrong_tensors:
            return None
        names = self.weights.wrong_tensors
        return (
            f"{self.weights.num_wrong:,} of {self.weights.num_weights:,} weights are not those of base and adapter rounded to {self.type}, "
            f"in {len(names)} tensors such as {', '.join(names[:_SHOWN])}"
        )

    def _ceiling(self) -> str | None:
        if self.ceiling_rms is None or self.yardstick is None or self.yardstick.rms <= self.ceiling_rms:
            return None
        return (
            f"rounding to {self.type} alone moves logits by {self.yardstick.rms:.3g}, more than {self.ceiling_rms:.3g}; "
            "convert to a type with more digits"
        )

    def _logits(self) -> list[str]:
        failures: list[str] = []
        for what, got, budget in (
            ("at most", self.difference.max_abs, self.budget_max_abs),
            ("in the mean (rms)", self.difference.rms, self.budget_rms),
        ):
            if budget is not None and not got <= budget:
                failures.append(f"logits differ {what} by {got:.3g}, the budget of {self.type} is {budget:.3g}")
        if self.budget_rms is not None and self.greedy.num_different:
            failures.append(f"{self.greedy.num_different} of {self.greedy.num_tokens} tokens of greedy continuations differ")
        return failures

    def _lossy(self) -> tuple[str, ...]:
        if self.lossy_budget is None:
            return ()
        return self.lossy_budget.failures(mean_kl=self.difference.mean_kl, top1=self.difference.top1)


def check_conversion(
    base_dir: Path,
    converted_dir: Path,
    *,
    adapter_dir: Path | None,
    type_: str,
    dtype: torch.dtype,
    sequences: Sequences,
    base_weights: Weights | None = None,
    on_progress: Progress | None = None,
) -> ParityReport:
    """The gate of a converted folder: every weight, every logit of `sequences`, greedy continuations, perplexities before and after.

    `dtype` is that of its floating-point tensors, but for those that `type_` (nf4, fp8, fp8_block) quantizes. `base_weights` stand for the
    base's own where the adapter was merged onto others (`TensorWeights` of the merge's plan). Without an adapter the base was converted.

    Raises NotTheSameModelError past a budget, and as `StreamedModel` and `folder_weights` do.
    """
    reference = StreamedModel(base_dir, weights=base_weights, adapter_dir=adapter_dir)
    exact, converted = reference.adapted_weights, folder_weights(converted_dir)
    plain = RoundedWeights(exact, dtype=dtype, quantized=converted.quantized, form=form_of(type_, dtype=dtype))
    weights = check_weights(
        exact, converted, plain=plain, dtype=dtype, quantized=converted.quantized, on_progress=_part(on_progress, 0.0, 0.1)
    )
    before = perplexity(StreamedModel(base_dir, weights=base_weights), sequences, on_progress=_part(on_progress, 0.1, 0.25))
    report = compare(
        reference,
        StreamedModel(converted_dir, weights=converted),
        type_=type_,
        sequences=sequences,
        yardstick=StreamedModel(base_dir, weights=plain),
        ceiling=None if type_ in LOSSY else CEILINGS[dtype],
        on_progress=_part(on_progress, 0.25, 1.0),
    )
    return replace(report, weights=weights, perplexity={"base": before, **report.perplexity}).check()


def compare(
    reference: StreamedModel,
    candidate: StreamedModel,
    *,
    type_: str,
    sequences: Sequences,
    yardstick: StreamedModel | None = None,
    ceiling: float | None = None,
    on_progress: Progress | None = None,
) -> ParityReport:
    """How far `candidate` is from `reference` on `sequences`, token ids of texts, and on the reference's own greedy continuations.

    `yardstick`, the plain conversion, gives the budget by its own difference, and must not be further off than `ceiling` as a share of the
    spread; without it `LOSSY[type_]` does, where it has one. Judges nothing by itself: see `ParityReport.failures`.
    """
    continuations = continue_greedily(
        reference,
        sequences,
        num_prompts=GREEDY_PROMPTS,
        num_prompt_tokens=GREEDY_PROMPT_TOKENS,
        num_tokens=GREEDY_TOKENS,
        max_walks=MAX_GREEDY_WALKS,
        on_progress=_part(on_progress, 0.0, 0.3),
    )
    everything = [*sequences, *(item.token_ids for item in continuations)]
    models = [reference, candidate, *([yardstick] if yardstick else [])]
    ends = [0.3 + 0.6 * place / len(models) for place in range(len(models) + 1)]
    states = [
        model.states(everything, on_progress=_part(on_progress, start, end))
        for model, start, end in zip(models, ends, ends[1:], strict=False)
    ]
    num_own = sum(map(len, sequences))
    targets = next_tokens(everything)
    found = measure(
        models,
        states,
        targets=targets[:num_own] + [NO_TOKEN] * (len(targets) - num_own),
        expected=[NO_TOKEN] * num_own + [token for item in continuations for token in _chosen(item)],
    )
    return _report(found, type_=type_, num_sequences=len(everything), num_prompts=len(continuations), ceiling=ceiling)


def perplexity(model: StreamedModel, sequences: Sequences, *, on_progress: Progress | None = None) -> float:
    """Of `model` over token ids, each sequence on its own: e to the mean negative log-probability of all tokens but the first ones."""
    states = model.states(sequences, on_progress=on_progress)
    targets = next_tokens(sequences)
    return measure([model], [states], targets=targets, expected=[NO_TOKEN] * len(targets)).perplexities[0]


def _chosen(continuation: Continuation) -> list[int]:
    """By position, the token that the model chose after it; NO_TOKEN within the prompt and at the end."""
    first = continuation.num_prompt
    return [NO_TOKEN] * (first - 1) + [*continuation.token_ids[first:], NO_TOKEN]


def _report(found: Measured, *, type_: str, num_sequences: int, num_prompts: int, ceiling: float | None) -> ParityReport:
    difference, *others = found.differences
    report = ParityReport(
        type=type_,
        num_sequences=num_sequences,
        spread=found.spread,
        difference=difference,
        greedy=_greedy(found, num_prompts=num_prompts),
        perplexity={"adapter": found.perplexities[0], "converted": found.perplexities[1]},
        lossy_budget=LOSSY.get(type_),
    )
    if not others:
        return report
    floor = _ARITHMETIC * found.spread
    return replace(
        report,
        yardstick=others[0],
        budget_max_abs=ALLOWANCE * others[0].max_abs + floor,
        budget_rms=ALLOWANCE * others[0].rms + floor,
        ceiling_rms=None if ceiling is None else ceiling * found.spread,
        greedy=_greedy(found, num_prompts=num_prompts, tie=others[0].rms + floor),
    )


def _greedy(found: Measured, *, num_prompts: int, tie: float = 0.0) -> Greedy:
    """A token is a tie where the reference's two best are no more than `tie` apart, or the yardstick itself chooses another one."""
    choices = found.choices
    tied_N = choices.gap_N <= tie
    if len(choices.best_MN) > _YARDSTICK:
        tied_N = tied_N | (choices.best_MN[_YARDSTICK] != choices.expected_N)
    different_N = choices.best_MN[_CANDIDATE] != choices.expected_N
    return Greedy(
        num_prompts=num_prompts,
        num_tokens=len(choices.expected_N),
        num_ties=int(tied_N.sum()),
        num_different=int((different_N & ~tied_N).sum()),
    )


def _rounded(value: object) -> object:
    """`value` with six significant digits in every float, and no entry that was not measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _part(on_progress: Progress | None, start: float, end: float) -> Progress | None:
    """What a step that takes the whole from `start` to `end` reports to."""
    if on_progress is None:
        return None
    return lambda share: on_progress(start + (end - start) * share)
