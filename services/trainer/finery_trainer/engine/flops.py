"""Model FLOPs utilization: the arithmetic that a step needs, over what the card could do in the step's time.

Owns the count and the table of cards. What is needed is counted, not what is done: recomputing activations to save memory costs time
and counts nothing. Frozen weights need no gradient of their own, so a run of adapters needs two thirds of what a full run does.

L is the length of a row, H the number of heads, D a head's width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Dense, 16-bit, summed in 32, from the makers' data sheets; the first pattern that is found in the card's name counts.
_PEAK_TERAFLOPS = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"H200|GH200", 989.4),
    (r"H100 NVL", 835.5),
    (r"H100 PCIe", 756.5),
    (r"H100", 989.4),
    (r"H20\b", 148.0),
    (r"A100|A800", 312.0),
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10\b", 125.0),
    (r"L40S", 362.1),
    (r"L40\b", 181.1),
    (r"L4\b", 121.0),
    (r"V100", 125.0),
    (r"T4\b", 65.0),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
)
_SLICES = 7
"""Compute slices of a card that MIG divides."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations, forward and backward: a token's through the weights, and a row's attention by its length squared."""

    per_token: float
    per_squared_length: float

    def of_rows(self, lengths: Iterable[int]) -> float:
        """What rows of these lengths need, each attending to itself alone."""
        return sum(self.per_token * length + self.per_squared_length * length * length for length in lengths)


def model_flops(model: PeftModel | PreTrainedModel) -> ModelFlops | None:
    """None for a mixture of experts, of which a token passes through a part that varies.

    A weight of N values takes 2N forward, 2N for the gradient of what goes in and, where it trains, 2N for its own. Causal attention
    takes 2·H·D·L² forward and twice that backward. Sliding windows are counted as if they were as long as the row.
    """
    config = cast("Any", model.config).get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    # 4-bit weights are stored packed: the module's widths say how many they are.
    per_token = sum((6.0 if module.weight.requires_grad else 4.0) * module.in_features * module.out_features for module in linear)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelFlops(per_token, 6.0 * config.num_hidden_layers * config.num_attention_heads * head_width)


def peak_flops(device: torch.device) -> float | None:
    """What the card could do in a second; None on a CPU and for a card that the table does not have."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(card: str) -> float | None:
    """As `peak_flops`, by the name that the driver gives the card, such as `NVIDIA H100 80GB HBM3 MIG 2g.20gb`."""
    peak = next((teraflops * 1e12 for pattern, teraflops in _PEAK_TERAFLOPS if re.search(pattern, card)), None)
    mig = re.search(r"MIG (\d)g", card)
    return peak * int(mig[1]) / _SLICES if peak is not None and mig else peak
