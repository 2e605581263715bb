"""LoRA projections as PEFT computes them: one linear layer after the other, the update added to its output.

Shapes: T rows, K inputs, N outputs of a member, R its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def lora_projection(
    x_TK: torch.Tensor,
    weights_NK: Sequence[torch.Tensor],
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None],
    biases_N: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` of every member, side by side. `adapters` are (A [R, K], B [N, R], scaling)."""
    outputs: list[torch.Tensor] = []
    for weight_NK, adapter, bias_N in zip(weights_NK, adapters, biases_N, strict=True):
        y_TN = torch.nn.functional.linear(x_TK, weight_NK, bias_N)
        if adapter is not None:
            a_RK, b_NR, scaling = adapter
            y_TN = y_TN + ((x_TK @ a_RK.to(x_TK.dtype).T) @ b_NR.to(x_TK.dtype).T) * scaling
        outputs.append(y_TN)
    return torch.cat(outputs, dim=-1)
