"""Frozen input embeddings that stay in host memory: `spec.memory.offload_embeddings`.

Owns the table there and the looking up of rows, which go to the GPU with the batch they belong to. Which models it is for is `passes`'s.

Shapes: V vocabulary, D hidden, T tokens of a batch.
"""

from __future__ import annotations

import torch
from torch import nn

from finery_common.errors import FailedPreconditionError


class HostEmbedding:
    """The frozen table of `embedding`, whose weight moves to the host: its own `forward` then takes token ids there."""

    def __init__(self, embedding: nn.Embedding) -> None:
        assert not embedding.weight.requires_grad
        embedding.to("cpu")
        self._weight_VD = embedding.weight.data

    def rows(self, input_ids_T: torch.Tensor, *, is_pinned: bool) -> torch.Tensor:
        """The embeddings [T, D] of token ids on the host, in page-locked memory where `is_pinned`."""
        shape = len(input_ids_T), self._weight_VD.shape[1]
        out_TD = torch.empty(shape, dtype=self._weight_VD.dtype, pin_memory=is_pinned)
        return torch.index_select(self._weight_VD, 0, input_ids_T, out=out_TD)


def not_offloaded(reason: str) -> FailedPreconditionError:
    """The error of a run whose embeddings cannot stay in host memory."""
    return FailedPreconditionError(f"memory.offload_embeddings: got true, but {reason}; leave it out.", param="memory.offload_embeddings")
