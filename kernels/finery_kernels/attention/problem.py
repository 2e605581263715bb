"""What one attention call computes besides its three tensors: the sequences, who sees whom, and the scale.

Owns the record that the backends and the reference share, nothing else; `api` makes it from validated arguments.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Attention within each sequence of a pack of T rows; queries and keys of one sequence have the same positions.

    cu_seqlens_S: int32 [S+1], where sequences start, and the pack's end; None only where `length` is set.
    max_seqlen: no sequence is longer; a bound suffices.
    length: the common length of all sequences, or None where they differ (or may differ).
    window: how many keys a query sees on a side, itself included; None is no limit.
    softcap: scores become softcap * tanh(score / softcap); None leaves them.
    """

    cu_seqlens_S: torch.Tensor | None
    max_seqlen: int
    length: int | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    deterministic: bool = False
