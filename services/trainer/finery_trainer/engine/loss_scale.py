"""Dynamic loss scaling for float16, whose range gradients do not fit: the loss is multiplied by a power of two, gradients are divided by it
again before anything reads them (Micikevicius et al., arXiv:1710.03740).

Owns the factor and how it moves. Unlike a GradScaler's, a step whose gradients overflow is not skipped: it is computed again.
"""

from __future__ import annotations

import torch

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
STEPS_TO_RISE = 2000
"""Without an overflow, after which the factor doubles."""


class LossScale:
    """The factor: `value`, and on the device `factor_1` [1] in float32, where CUDA graphs read what it is at the time."""

    def __init__(self, device: torch.device, *, value: float | None = None) -> None:
        self.value = FIRST if value is None else value
        self.factor_1 = torch.full((1,), self.value, dtype=torch.float32, device=device)
        self._num_steps = 0

    def lower(self) -> bool:
        """Halves it after an overflow; False where it can not fall further."""
        if self.value <= LEAST:
            return False
        self._set(self.value / 2, num_steps=0)
        return True

    def stepped(self) -> None:
        """Notes a step without overflow."""
        if self._num_steps + 1 < STEPS_TO_RISE:
            self._num_steps += 1
        else:
            self._set(min(2 * self.value, MOST), num_steps=0)

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"loss_scale": self.value, "loss_scale_steps": float(self._num_steps)}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes over what `state` has answered. Raises KeyError where it is not in it."""
        self._set(state["loss_scale"], num_steps=int(state["loss_scale_steps"]))

    def _set(self, value: float, *, num_steps: int) -> None:
        self.value, self._num_steps = value, num_steps
        self.factor_1.fill_(value)


def loss_scale_of(dtype: torch.dtype, device: torch.device) -> LossScale | None:
    """The scale of a run whose arithmetic has `dtype`; None where gradients fit that."""
    return LossScale(device) if dtype == torch.float16 else None
