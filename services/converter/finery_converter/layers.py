"""Which of a model's weights are those of linear layers: what bitsandbytes quantizes on load, and what quantized formats hold.

Owns that question and nothing else. It is answered by the model itself, made without memory, since names alone do not tell a linear layer
from an expert, a router or a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layers:
    """Names of modules."""

    linear: frozenset[str]
    """Exactly torch's Linear, without the head and whatever transformers keeps from quantizing."""
    conv1d: frozenset[str]
    """transformers' Conv1D: linear layers whose weights are stored transposed."""
    kept: frozenset[str]
    """torch's Linear that is not among `linear`, the head first of all."""
    share: float
    """Of the parameters that are neither embeddings nor head, how many are weights of `linear`."""

    @classmethod
    def none(cls) -> Layers:
        """What there is to know where nobody asks."""
        return cls(frozenset(), frozenset(), frozenset(), 0.0)


def layers_of(base_dir: Path) -> Layers:
    """Of the model in `base_dir`; only its config.json is read.

    Raises UnimplementedError where transformers makes no causal language model of it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from finery_converter.parameters import skeleton

    model = skeleton(base_dir)
    kept = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    every = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    linear = {name: module for name, module in every.items() if should_convert_module(name, kept)}
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if isinstance(end, nn.Module)}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends and parameter.dim() > 1)
    quantized = sum(module.weight.numel() for module in linear.values())
    return Layers(
        linear=frozenset(linear),
        conv1d=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        kept=frozenset(every) - frozenset(linear),
        share=quantized / max(1, others),
    )
