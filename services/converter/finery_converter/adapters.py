"""Adapters made of adapters: one scaled, or several combined into one, as PEFT's files again.

Owns which adapters go together, the configuration of what comes out, and every tensor's place in it. The arithmetic of combining is PEFT's
own (`peft.utils.merge_utils`), applied as its `add_weighted_adapter` applies it, module by module: no base model is needed, and no more
than one module's matrices are in memory. Leaves merging into a base to `merge`.

Letters: R rank, I input features, O output features.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.lora import (
    ADAPTER_FILE,
    CONFIG_FILE,
    adapter_config,
    adapter_tensors,
    not_finite,
    scale_of,
    split_key,
)
from finery_converter.tensorfiles import StoredTensor, TensorSpec, TensorWriter

Method = Literal["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_DENSITY_METHODS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_HALVES = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_SHOWN = 3


@dataclass(frozen=True)
class _Adapter:
    """One of those that are combined."""

    name: str
    weight: float
    config: Mapping[str, object]
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]]
    """Key of the A to A [R, I] and B [O, R]."""

    def factor(self, key: str) -> float:
        """What this module's b @ a counts for: the weight times the adapter's own scale."""
        return self.weight * scale_of(self.config, split_key(key)[0])[1]


def scaled(adapter_dir: Path, output_dir: Path, *, scale: float) -> None:
    """Writes the adapter whose update is `scale` times as large into the empty `output_dir`.

    `lora_alpha` (and what alpha_pattern says) is multiplied, the tensors stay as they are, byte for byte: alpha / rank is taken in float64
    wherever the adapter is used, while scaled tensors would have been rounded once more, in 16 bits if that is what they are in.

    Raises UnimplementedError where alpha does not say how large the whole update is: DoRA, trained biases and whole modules;
    InvalidArgumentError for a scale that is no number or a broken adapter.
    """
    if not math.isfinite(scale):
        raise InvalidArgumentError(f"scale: got {scale}, wanted a number", param="scale")
    config = adapter_config(adapter_dir)
    _check_only_pairs(adapter_dir, config, what="scaled")
    alphas = config.get("alpha_pattern") or {}
    assert isinstance(alphas, dict)
    config["alpha_pattern"] = {pattern: _times(alpha, scale) for pattern, alpha in alphas.items()}
    config["lora_alpha"] = _times(config["lora_alpha"], scale)
    for file in sorted(adapter_dir.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name != CONFIG_FILE:
            shutil.copyfile(file, output_dir / file.name)
    _write_config(config, output_dir)


def _times(alpha: object, scale: float) -> float | int:
    product = float(str(alpha)) * scale
    return int(product) if product.is_integer() else product


def combined(
    adapters: Sequence[tuple[Path, float]], output_dir: Path, *, method: Method = "linear", density: float | None = None, seed: int = 0
) -> None:
    """Writes one adapter made of `adapters`, each with its weight, into the empty `output_dir`; tensors are float32.

    linear, ties, dare_linear, dare_ties and magnitude_prune combine the A and the B of a module apart, as PEFT does; of two adapters linear
    gives (A1 + A2, B1 + B2) with roots of weights, whose product has mixed terms. cat stacks them: the exact sum of the updates, of as many
    ranks as all have together. The average of n adapters is cat with weights of 1 / n. `density` is the share of values that ties, dare and
    pruning keep; `seed` chooses which ones dare drops. Where PEFT's `use_rslora` is set, PEFT itself would apply the result too strongly
    (alpha = rank means 1 only without it); here it is cleared.

    Raises InvalidArgumentError for adapters of other base models, modules or shapes, unequal ranks where the method wants equal ones, NaN
    or Inf, and a density that is missing or has no place; UnimplementedError for DoRA, trained biases and whole modules.
    """
    _check_density(method, density)
    if not adapters:
        raise InvalidArgumentError("adapters: got none, wanted one or more", param="adapters")
    members = [_member(folder, weight) for folder, weight in adapters]
    for other in members[1:]:
        _check_alike(members[0], other, equal_ranks=method != "cat")
    combine = _combination(method, density)
    shapes = {key: _combined_shapes([member.pairs[key] for member in members], method) for key in members[0].pairs}
    specs: list[TensorSpec] = []
    for key, (a, b) in members[0].pairs.items():
        specs += [(a.name, torch.float32, shapes[key][0]), (b.name, torch.float32, shapes[key][1])]
    with torch.random.fork_rng(devices=[]), TensorWriter(output_dir / ADAPTER_FILE, tensors=specs) as writer:
        torch.manual_seed(seed)
        for key, (a, b) in members[0].pairs.items():
            new_a, new_b = combine([_load(member, key) for member in members])
            writer.append(a.name, new_a.contiguous())
            writer.append(b.name, new_b.contiguous())
    ranks = {split_key(key)[0]: a_shape[0] for key, (a_shape, _) in shapes.items()}
    _write_config(_combined_config(members[0].config, ranks), output_dir)


@dataclass(frozen=True)
class _Pair:
    """One member's matrices of one module, float32, and what their product counts for."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    factor: float


def _load(member: _Adapter, key: str) -> _Pair:
    a, b = (stored.read().to(torch.float32) for stored in member.pairs[key])
    for stored, values in zip(member.pairs[key], (a, b), strict=True):
        if not values.isfinite().all():
            raise not_finite(stored.name, of=f"adapter {member.name}")
    return _Pair(a, b, member.factor(key))


Combine = Callable[[list[_Pair]], tuple[torch.Tensor, torch.Tensor]]


def _combination(method: Method, density: float | None) -> Combine:
    from peft.utils import merge_utils

    def cat(pairs: list[_Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([pair.a_RI * pair.factor for pair in pairs]), torch.cat([pair.b_OR for pair in pairs], dim=1)

    def apart(pairs: list[_Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        # The sign of a negative factor goes to one side only.
        roots = [math.sqrt(abs(pair.factor)) for pair in pairs]
        signed = [root if pair.factor >= 0 else -root for root, pair in zip(roots, pairs, strict=True)]
        with warnings.catch_warnings():
            # PEFT warns that a density of 1 prunes nothing, which is what was asked for.
            warnings.simplefilter("ignore")
            new_a = one_side([pair.a_RI for pair in pairs], torch.tensor(signed))
            return new_a, one_side([pair.b_OR for pair in pairs], torch.tensor(roots))

    def one_side(tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        if density is None:
            return merge_utils.task_arithmetic(tensors, weights)
        by_name = {
            "ties": merge_utils.ties,
            "dare_linear": merge_utils.dare_linear,
            "dare_ties": merge_utils.dare_ties,
            "magnitude_prune": merge_utils.magnitude_prune,
        }
        return by_name[method](tensors, weights, density)

    return cat if method == "cat" else apart


def _combined_shapes(pairs: list[tuple[StoredTensor, StoredTensor]], method: Method) -> tuple[tuple[int, int], tuple[int, int]]:
    (rank, num_in), (num_out, _) = pairs[0][0].shape, pairs[0][1].shape
    if method == "cat":
        rank = sum(a.shape[0] for a, _ in pairs)
    return (rank, num_in), (num_out, rank)


def _combined_config(first: Mapping[str, object], ranks: Mapping[str, int]) -> dict[str, object]:
    """The first one's configuration with ranks as they are now, and alphas that make every scale 1."""
    rank = max(ranks.values())
    others = {module: found for module, found in ranks.items() if found != rank}
    changed = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    return {**first, **changed, "init_lora_weights": True, "inference_mode": True}


def _member(folder: Path, weight: float) -> _Adapter:
    if not math.isfinite(weight):
        raise InvalidArgumentError(f"adapters: got weight {weight} for {folder.name}, wanted a number", param="adapters")
    config = adapter_config(folder)
    stored = _check_only_pairs(folder, config, what="combined")
    pairs = dict(_pairs(folder, config, stored))
    return _Adapter(folder.name, weight, config, pairs)


def _pairs(
    folder: Path, config: Mapping[str, object], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, tuple[StoredTensor, StoredTensor]]]:
    used: set[str] = set()
    for key, a in stored.items():
        module, kind = split_key(key)
        if kind not in _HALVES:
            continue
        other_key = f"{key.removesuffix(kind)}{_HALVES[kind]}"
        b = stored.get(other_key)
        rank, _ = scale_of(config, module)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InvalidArgumentError(
                f"{folder.name}: got {module} with A {list(a.shape)} and {'no B' if b is None else f'B {list(b.shape)}'}, "
                f"wanted rank {rank}.",
                code="adapter_shape_mismatch",
            )
        used |= {key, other_key}
        yield key, (a, b)
    if lone := set(stored) - used:
        raise InvalidArgumentError(f"{folder.name}: {min(lone)} has no lora_A beside it.", code="unmatched_adapter_tensor")


def _check_only_pairs(folder: Path, config: Mapping[str, object], *, what: str) -> dict[str, StoredTensor]:
    """The adapter's tensors. Raises where some are not A or B of a pair."""
    stored = adapter_tensors(folder)
    others = [key for key in stored if split_key(key)[1] not in (*_HALVES, *_HALVES.values())]
    if config.get("use_dora") or others:
        found = "use_dora" if config.get("use_dora") else ", ".join(sorted(others)[:_SHOWN])
        raise UnimplementedError(
            f"The adapter {folder.name} cannot be {what}: it has {found}, and only low-rank pairs can be; merge it as it is."
        )
    return stored


def _check_density(method: Method, density: float | None) -> None:
    if method in _DENSITY_METHODS and (density is None or not 0 < density <= 1):
        raise InvalidArgumentError(f"density: got {density} with {method}, wanted more than 0 and at most 1", param="density")
    if method not in _DENSITY_METHODS and density is not None:
        raise InvalidArgumentError(f"density: got {density} with {method}, which keeps all; leave it out", param="density")


def _check_alike(first: _Adapter, other: _Adapter, *, equal_ranks: bool) -> None:
    bases = [str(member.config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2] for member in (first, other)]
    if all(bases) and bases[0] != bases[1]:
        raise InvalidArgumentError(
            f"adapters: got {first.name} for base model {bases[0]} and {other.name} for {bases[1]}, wanted one base model for all",
            param="adapters",
            code="adapters_do_not_match",
        )
    if unlike := set(first.pairs) ^ set(other.pairs):
        shown = ", ".join(split_key(key)[0] for key in sorted(unlike)[:_SHOWN])
        raise InvalidArgumentError(
            f"adapters: {first.name} and {other.name} differ in {len(unlike)} modules, such as {shown}; wanted the same targets in all",
            param="adapters",
            code="adapters_do_not_match",
        )
    for key, (a, b) in first.pairs.items():
        other_a, other_b = other.pairs[key]
        same_module = a.shape[1] == other_a.shape[1] and b.shape[0] == other_b.shape[0]
        if not same_module or (equal_ranks and a.shape[0] != other_a.shape[0]):
            raise InvalidArgumentError(
                f"adapters: {split_key(key)[0]} has A {list(a.shape)} and B {list(b.shape)} in {first.name}, A {list(other_a.shape)} and "
                f"B {list(other_b.shape)} in {other.name}; wanted the same"
                + (", for only cat combines unequal ranks" if same_module else " base model for all"),
                param="adapters",
                code="adapters_do_not_match",
            )


def _write_config(config: Mapping[str, object], output_dir: Path) -> None:
    (output_dir / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
