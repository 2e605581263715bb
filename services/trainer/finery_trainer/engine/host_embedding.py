"""Frozen input embeddings that stay in host memory: `spec.memory.offload_embeddings`.

Owns the table there and the looking up of rows, which go to the GPU with the batch they belong to, and why some models cannot.

Shapes: V vocabulary, D hidden, T tokens of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError
from finery_trainer.engine.architecture import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TIED = "this model's head is the same matrix as its embeddings, and multiplies with it on the GPU"
GENERIC = "the model trains by transformers' own modules, which look embeddings up on the GPU"


class HostEmbedding:
    """The frozen embeddings of `model`, which it moves to the host: `model.forward` then does not work on a GPU, batches bring rows along.

    Raises FailedPreconditionError where the head is the same matrix.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        base = base_of(model)
        embedding, head = cast("nn.Embedding", base.get_input_embeddings()), cast("nn.Linear", base.get_output_embeddings())
        if head.weight is embedding.weight:
            raise not_offloaded(TIED)
        assert not embedding.weight.requires_grad
        embedding.to("cpu")
        self._weight_VD = embedding.weight.detach()

    def rows(self, input_ids_T: torch.Tensor, *, is_pinned: bool) -> torch.Tensor:
        """The embeddings [T, D] of token ids on the host, in page-locked memory where `is_pinned`."""
        rows_TD = torch.empty(len(input_ids_T), self._weight_VD.shape[1], dtype=self._weight_VD.dtype, pin_memory=is_pinned)
        return torch.index_select(self._weight_VD, 0, input_ids_T, out=rows_TD)


def not_offloaded(reason: str) -> FailedPreconditionError:
    """The error of a run whose embeddings cannot stay in host memory."""
    return FailedPreconditionError(f"memory.offload_embeddings: got true, but {reason}; leave it out.", param="memory.offload_embeddings")
