"""CUDA graphs of whole forward and backward passes, for packs so small that launching kernels takes longer than running them.

Packs are padded to few shapes; a shape that keeps coming is captured, and replayed from then on. Owns the shapes, the static
inputs and the graphs; the pass itself is the stack's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finery_trainer.engine.packing import SMALL_TOKENS, PackedBatch, replaced

if TYPE_CHECKING:
    from finery_trainer.engine.stack import TrainingStack

_Shape = tuple[int, int, int, int, int | None]

_MAX_GRAPHS = 64
_SEEN_BEFORE = 1
"""A shape is captured when it comes after as many times as this: never first, when kernels may still have to be compiled."""
_SHORT = 512
"""Longest sequences up to this count as so long: blocks that no sequence reaches cost attention less than another graph would."""


def in_buckets(batch: PackedBatch) -> PackedBatch:
    """The batch with its number of sequences and its longest one rounded up, as graphs want it: only bounds change, no result.

    Tokens and labels are padded by `packing.pack`.
    """
    sequences = len(batch.cu_seqlens) - 1
    wanted = -(-sequences // 16) * 16
    ends = batch.cu_seqlens[-1:].expand(wanted - sequences)
    longest = max(_SHORT, 1 << (batch.max_seqlen - 1).bit_length())
    if batch.lengths_equal is not None:
        return batch
    return replaced(batch, {"cu_seqlens": torch.cat([batch.cu_seqlens, ends]), "max_seqlen": longest})


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    num_labels: torch.Tensor
    loss: torch.Tensor


class GraphedPasses:
    """`forward_backward` of a stack, by graphs where a shape repeats."""

    def __init__(self, stack: TrainingStack) -> None:
        self._stack = stack
        self._seen: Counter[_Shape] = Counter()
        self._captured: dict[_Shape, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forward_backward(self, batch: PackedBatch, *, num_labels: int) -> torch.Tensor:
        """As the stack's. `batch` may be in pinned host memory; the answer is valid until the next call."""
        shape = _shape_of(batch)
        if shape not in self._captured:
            if not self._is_worth_it(shape):
                self._seen[shape] += 1
                return self._stack.forward_backward(batch.to(self._stack.device), num_labels=num_labels)
            self._captured[shape] = self._capture(batch, num_labels)
        captured = self._captured[shape]
        given = batch.tensors()
        for name, static in captured.batch.tensors().items():
            static.copy_(given[name], non_blocking=True)
        captured.num_labels.fill_(num_labels)
        captured.graph.replay()
        return captured.loss

    def _is_worth_it(self, shape: _Shape) -> bool:
        return shape[0] <= SMALL_TOKENS and len(self._captured) < _MAX_GRAPHS and self._seen[shape] >= _SEEN_BEFORE

    def _capture(self, batch: PackedBatch, num_labels: int) -> _Captured:
        static = batch.to(self._stack.device)
        static_labels = torch.full((1,), num_labels, dtype=torch.int64, device=self._stack.device)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Captured kernels do not run: gradients stay as they are.
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._stack.forward_backward(static, num_labels=static_labels)
        return _Captured(graph, static, static_labels, loss)


def _shape_of(batch: PackedBatch) -> _Shape:
    return len(batch.input_ids_T), len(batch.cu_seqlens), len(batch.rows_L), batch.max_seqlen, batch.lengths_equal
