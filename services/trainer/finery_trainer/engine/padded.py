"""Passes of a model that the engine's own layers do not take: transformers' modules and autograd on padded micro-batches.

Owns the loss of a padded micro-batch and how gradients add up over a step. The head and its loss are the engine's where the model has a
plain head: logits of labelled positions only, in tiles, in float32.

Shapes: B rows of a micro-batch, T tokens of its longest row, D hidden, V vocabulary, L labelled positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from finery_common.spec import TrainingSpec
from finery_kernels.linear_cross_entropy import linear_cross_entropy
from finery_trainer.engine.optim import Stepper, build_optimizer, rate_factors
from finery_trainer.engine.packing import IGNORE, Row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finery_trainer.engine.data import TokenDataset


class PaddedPasses:
    """Forward and backward passes through the model's own `forward`."""

    def __init__(self, model: PeftModel | PreTrainedModel, spec: TrainingSpec) -> None:
        self._model, self._spec = model, spec

    def stepper(self, num_steps: int) -> Stepper:
        """The optimizer of what is trained."""
        factors = rate_factors(self._model, self._spec)
        return build_optimizer(self._spec.optimizer, self._model.parameters(), num_steps, factors=factors)

    def prepare(self, rows: Sequence[Row]) -> None:
        """Nothing to get ready."""

    def gradients(self, rows: Sequence[Row]) -> torch.Tensor:
        """Adds the gradients of the mean loss over the labels of `rows`, and answers it: float32, 0-dim, on the device.

        However the same rows are split into micro-batches, loss and gradient are the same up to rounding.
        """
        num_labels = sum(int((targets != IGNORE).sum()) for _, targets in rows)
        total = torch.zeros((), device=self._model.device)
        for part in self._micro_batches(rows):
            loss = self.summed_loss(part) / num_labels
            loss.backward()
            total += loss.detach()
        return total

    def mean_loss(self, data: TokenDataset) -> float:
        """The loss over all labels of `data`, without dropout."""
        self._model.eval()
        rows = sorted(range(data.num_rows), key=lambda row: int(data.row_lengths[row]))
        size = self._spec.batch.micro_batch_size
        with torch.no_grad():
            parts = [self.summed_loss([data.training_row(row) for row in rows[i : i + size]]) for i in range(0, len(rows), size)]
        self._model.train()
        return float(torch.stack(parts).double().sum()) / int(data.row_labels.sum())

    def refresh(self) -> None:
        """The model's own parameters are read."""

    def summed_loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """Cross-entropy summed over the labels of `rows` in one padded micro-batch, in float32; a scalar.

        There is no attention mask: padding stands to the right of every label, where causal attention does not look.
        """
        device = self._model.device
        input_ids_BT, targets_BT = (torch.from_numpy(part).to(device) for part in _padded(rows))
        base = cast("PreTrainedModel", self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model)
        head = _plain_head(base)
        with _precision(base):
            if head is None:
                logits_LV = self._model(input_ids=input_ids_BT).logits[targets_BT != IGNORE]
                return nn.functional.cross_entropy(logits_LV.float(), targets_BT[targets_BT != IGNORE], reduction="sum")
            hidden_BTD = base.get_decoder()(input_ids=input_ids_BT).last_hidden_state
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1).to(head.weight.dtype),
            head.weight,
            targets_BT.flatten(),
            softcap=getattr(base.config, "final_logit_softcapping", None),
            scale=1.0 / float(getattr(base.config, "logits_scaling", 1.0)),
            reduction="sum",
            ignore_index=IGNORE,
        )

    def _micro_batches(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Neighbours in length together, so that little is padding."""
        by_length = sorted(rows, key=lambda row: -len(row[0]))
        size = self._spec.batch.micro_batch_size
        yield from (by_length[start : start + size] for start in range(0, len(by_length), size))


def _padded(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, targets) [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    input_ids_BT = np.zeros((len(rows), width), dtype=np.int64)
    targets_BT = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for position, (ids, targets) in enumerate(rows):
        input_ids_BT[position, : len(ids)], targets_BT[position, : len(ids)] = ids, targets
    return input_ids_BT, targets_BT


def _plain_head(base: PreTrainedModel) -> nn.Linear | None:
    """The head, where it is nothing but a matrix that turns the decoder's last hidden states into logits as the engine computes them."""
    head = base.get_output_embeddings()
    is_known = type(base).__name__.endswith("ForCausalLM") and base.config.model_type in _PLAIN_HEADS
    return head if is_known and type(head) is nn.Linear and head.bias is None else None


_PLAIN_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2", "mixtral", "qwen2_moe"}
)
"""Families whose logits are the head's product, scaled or softly capped as their configuration says."""


def _precision(base: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Adapters are float32 even on 16-bit weights; autocast makes their products 16-bit, as the rest."""
    if base.dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(base.device.type, dtype=base.dtype)
