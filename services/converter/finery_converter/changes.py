"""What an adapter changes in a model: its tensors read, found their places, and applied to weights as these are read.

Read apart from `merge` on purpose: a comparison that shared the merge's reading would share its mistakes. Owns the meaning of PEFT's files
for plain LoRA; a tensor without a place is an error. Leaves applying pairs to activations to `streamed`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.tensorfiles import StoredTensor, read_header
from finery_converter.weights import BLOCK_BYTES, Weights, in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finery_converter.parameters import Parameters

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "target_parameters")
_SHOWN = 3


@dataclass(frozen=True)
class LoraPair:
    """`scale` * B A is added to a matrix."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) times `scale`, in float32."""
        return in_float32(self.a.read()), in_float32(self.b.read()) * self.scale


@dataclass(frozen=True)
class Changes:
    """What an adapter does to tensors, by the name that its files give them: modules for `pairs`, parameters for `replaced`."""

    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, StoredTensor]


def read_adapter(folder: Path) -> Changes:
    """The changes in a folder of PEFT's files.

    Raises UnimplementedError for adapters that are more than LoRA, InvalidArgumentError where half of a pair is missing.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or used:
        raise UnimplementedError(
            f"adapter_config.json: {', '.join(used) or config.get('peft_type')} cannot be compared; wanted plain LoRA."
        )
    halves: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    for key, tensor in read_header(folder / "adapter_model.safetensors").items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if half in ("lora_A", "lora_B"):
            halves.setdefault(module, {})[half] = tensor
        else:
            replaced[name] = tensor
    pairs: dict[str, LoraPair] = {}
    for module, both in halves.items():
        if len(both) != len(("lora_A", "lora_B")):
            raise InvalidArgumentError(f"The adapter has only one of lora_A and lora_B for {module}.", code="unmatched_adapter_tensor")
        pairs[module] = LoraPair(both["lora_A"], both["lora_B"], _scale(config, module, rank=both["lora_A"].shape[0]))
    return Changes(pairs, replaced)


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
    modules = dict(model.named_modules())
    known = parameters.weights.shapes
    pairs = {parameters.direct.get(f"{name}.weight", f"{name}.weight"): pair for name, pair in changes.pairs.items()}
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
    """`weights` after `changes`, both by checkpoint names: W + scale * B A, and replaced tensors, in float32."""

    def __init__(self, weights: Weights, *, pairs: Mapping[str, LoraPair], replaced: Mapping[str, StoredTensor]) -> None:
        """`pairs` by the names of the tensors that they change. Raises InvalidArgumentError where a shape does not fit."""
        self._weights = weights
        self._pairs = pairs
        self._replaced = replaced
        self.shapes = weights.shapes
        for name, pair in pairs.items():
            num_out, num_in = weights.shapes[name] if len(weights.shapes[name]) == 2 else (-1, -1)
            if pair.a.shape[1:] != (num_in,) or pair.b.shape[:1] != (num_out,) or pair.a.shape[0] != pair.b.shape[1]:
                raise InvalidArgumentError(
                    f"The adapter's A {list(pair.a.shape)} and B {list(pair.b.shape)} do not fit {name} {list(weights.shapes[name])}.",
                    code="adapter_shape_mismatch",
                )
        for name, tensor in replaced.items():
            if tensor.shape != weights.shapes[name]:
                raise InvalidArgumentError(
                    f"The adapter's {name} has shape {list(tensor.shape)}, wanted {list(weights.shapes[name])}.",
                    code="adapter_shape_mismatch",
                )

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        if name in self._replaced:
            yield from (in_float32(block) for block in self._replaced[name].blocks(BLOCK_BYTES))
            return
        if name not in self._pairs:
            yield from self._weights.blocks(name)
            return
        a_RI, b_OR = self._pairs[name].factors()
        row = 0
        for block in self._weights.blocks(name):
            yield block + b_OR[row : row + len(block)] @ a_RI
            row += len(block)

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        if name in self._replaced:
            return in_float32(self._replaced[name].read())[indices]
        rows = self._weights.rows(name, indices)
        if name in self._pairs:
            a_RI, b_OR = self._pairs[name].factors()
            rows = rows + b_OR[indices] @ a_RI
        return rows
