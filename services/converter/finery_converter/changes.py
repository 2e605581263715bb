"""What an adapter changes in a model: its tensors read, found their places, and applied to weights as these are read.

Read apart from `merge` on purpose: a comparison that shared the merge's reading would share its mistakes. Owns the meaning of PEFT's files
for plain LoRA; a tensor without a place is an error. Leaves applying pairs to activations to `streamed`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.tensorfiles import StoredTensor, read_header
from finery_converter.weights import Weights, in_float32, stored_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finery_converter.parameters import Parameters

_PREFIX = "base_model.model."
_UNSUPPORTED = ("layer_replication", "trainable_token_indices", "target_parameters", "lora_bias")
_HALVES = ("lora_A", "lora_B")
_EMBEDDING_HALVES = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_SHOWN = 3


@dataclass(frozen=True)
class LoraPair:
    """`scale` * B A is added to a matrix."""

    a: StoredTensor
    """(R, I)"""
    b: StoredTensor
    """(O, R)"""
    scale: float
    is_transposed: bool = False
    """The matrix is stored as (I, O): embeddings, and the convolutions that stand for linear layers in old models."""
    magnitude: StoredTensor | None = None
    """DoRA: the norm (O) that every row has in the end."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix as it is stored."""
        num_out, num_in = self.b.shape[0], self.a.shape[-1]
        return (num_in, num_out) if self.is_transposed else (num_out, num_in)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, R) and (R, columns) in float32, whose product is what is added to the matrix as it is stored."""
        a_RI, b_OR = in_float32(self.a.read()), in_float32(self.b.read()) * self.scale
        return (a_RI.t(), b_OR.t()) if self.is_transposed else (b_OR, a_RI)

    def norms(self) -> torch.Tensor | None:
        """DoRA's (O) in float32."""
        return None if self.magnitude is None else in_float32(self.magnitude.read()).reshape(-1)


@dataclass(frozen=True)
class Changes:
    """What an adapter does to tensors, by the name that its files give them: modules for `pairs`, parameters for `replaced`."""

    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, StoredTensor]


def read_adapter(folder: Path) -> Changes:
    """The changes in a folder of PEFT's files.

    Raises UnimplementedError for adapters that are more than LoRA and DoRA, InvalidArgumentError where half of a pair is missing.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or used:
        found = ", ".join(used) or config.get("peft_type")
        raise UnimplementedError(f"adapter_config.json: {found} cannot be compared with a merged model here; wanted plain LoRA.")
    parts: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    for key, tensor in read_header(folder / "adapter_model.safetensors").items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in (*_HALVES, *_EMBEDDING_HALVES, _MAGNITUDE):
            parts.setdefault(module, {})[part] = tensor
        else:
            replaced[name] = tensor
    return Changes({module: _pair(module, found, config) for module, found in parts.items()}, replaced)


def _pair(module: str, found: Mapping[str, StoredTensor], config: Mapping[str, object]) -> LoraPair:
    is_embedding = any(name in found for name in _EMBEDDING_HALVES)
    a, b = (found.get(name) for name in (_EMBEDDING_HALVES if is_embedding else _HALVES))
    magnitude = found.get(_MAGNITUDE)
    if a is None or b is None or bool(magnitude) != bool(config.get("use_dora")):
        raise InvalidArgumentError(f"The adapter has only {', '.join(sorted(found))} for {module}.", code="unmatched_adapter_tensor")
    if a.shape[0] != b.shape[1]:
        raise InvalidArgumentError(
            f"The adapter's A {list(a.shape)} and B {list(b.shape)} for {module} have different ranks.", code="adapter_shape_mismatch"
        )
    return LoraPair(a, b, _scale(config, module, rank=a.shape[0]), is_embedding, magnitude)


def _scale(config: Mapping[str, object], module: str, *, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    assert isinstance(patterns, dict)
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(str(alpha)) / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True)
class PlacedChanges:
    """Changes by what they change. Every tensor of the adapter is in `pairs` or in `replaced`."""

    pairs: Mapping[str, LoraPair]
    """By the checkpoint tensor that the product is added to."""
    replaced: Mapping[str, StoredTensor]
    """By the checkpoint tensor that it stands for."""
    linears: Mapping[str, str]
    """Of `pairs`, those of a linear layer: checkpoint tensor to the layer's name in the model."""


def place(changes: Changes, model: PreTrainedModel, parameters: Parameters) -> PlacedChanges:
    """Finds what each change is for, by the model's names for its parts or the checkpoint's.

    Raises InvalidArgumentError (code `unmatched_adapter_tensor`) for a change that has no place.
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    known = parameters.weights.shapes
    pairs: dict[str, LoraPair] = {}
    for name, pair in changes.pairs.items():
        stored_across = pair.is_transposed or isinstance(modules.get(name), Conv1D)
        pairs[parameters.direct.get(f"{name}.weight", f"{name}.weight")] = replace(pair, is_transposed=stored_across)
    replaced = {parameters.direct.get(name, name): tensor for name, tensor in changes.replaced.items()}
    if unmatched := sorted(name for name in (*pairs, *replaced) if name not in known):
        raise InvalidArgumentError(
            f"{len(unmatched)} changes of the adapter match nothing in the base model, such as {', '.join(unmatched[:_SHOWN])}; "
            "was the adapter trained for another model?",
            code="unmatched_adapter_tensor",
        )
    linears: dict[str, str] = {}
    for parameter, name in parameters.direct.items():
        module = parameter.removesuffix(".weight")
        # A tied head shares its tensor with the embedding, which comes first and is no linear layer.
        if name in pairs and isinstance(modules.get(module), nn.Linear):
            linears[name] = module
    return PlacedChanges(pairs, replaced, linears)


class AdaptedWeights:
    """`weights` after the changes of an adapter, in float32: what an exact merge holds."""

    def __init__(self, weights: Weights, *, pairs: Mapping[str, LoraPair], replaced: Mapping[str, StoredTensor]) -> None:
        """Both by the names of the tensors that they change. Raises InvalidArgumentError where a shape does not fit."""
        self._weights = weights
        self._pairs = pairs
        self._replaced = replaced
        self.shapes = weights.shapes
        for name, change in (*pairs.items(), *replaced.items()):
            if change.shape != tuple(weights.shapes[name]):
                raise InvalidArgumentError(
                    f"The adapter's change of {name} has the shape {list(change.shape)}, wanted {list(weights.shapes[name])}.",
                    code="adapter_shape_mismatch",
                )

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        blocks = stored_blocks(self._replaced[name]) if name in self._replaced else self._weights.blocks(name)
        if name not in self._pairs:
            yield from blocks
            return
        left, right = self._pairs[name].factors()
        norms_O = self._pairs[name].norms()
        row = 0
        for block in blocks:
            rows = slice(row, row + len(block))
            yield _changed(block, left[rows] @ right, None if norms_O is None else norms_O[rows])
            row += len(block)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        rows = in_float32(self._replaced[name].read())[indices] if name in self._replaced else self._weights.rows(name, indices)
        if name not in self._pairs:
            return rows
        left, right = self._pairs[name].factors()
        norms_O = self._pairs[name].norms()
        return _changed(rows, left[indices] @ right, None if norms_O is None else norms_O[indices])


def _changed(rows: torch.Tensor, product: torch.Tensor, norms_O: torch.Tensor | None) -> torch.Tensor:
    changed = rows + product
    return changed if norms_O is None else changed * (norms_O / torch.linalg.vector_norm(changed, dim=1)).unsqueeze(1)
