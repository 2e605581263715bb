"""Shards of a dataset: how tokens lie in the store, and the statistics over them.

Owns the format. A shard is a safetensors file of int32 `input_ids` (its rows, concatenated), uint8 `label_mask` of the same length (1
where that token is a label) and int64 `row_offsets` (number of rows + 1). No row is split between two shards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from finery_common.artifacts import ArtifactWriter

SHARD_BYTES = 64 * 1024 * 1024
_TOKEN_BYTES = 5


@dataclass(frozen=True)
class Statistics:
    """Numbers of a dataset; row lengths in tokens."""

    num_rows: int
    num_tokens: int
    num_label_tokens: int
    min_row_tokens: int
    median_row_tokens: int
    max_row_tokens: int


class ShardWriter:
    """Collects rows and stores a shard whenever one is full; memory holds one shard. Its calls block while they store."""

    def __init__(self, writer: ArtifactWriter, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._writer = writer
        self._shard_bytes = shard_bytes
        self._num_shards = 0
        self._num_label_tokens = 0
        self._rows_by_length: Counter[int] = Counter()
        self._clear()

    def add(self, row_lengths: Sequence[int], *, input_ids: NDArray[np.int32], label_mask: NDArray[np.uint8]) -> None:
        """Appends rows, given concatenated."""
        self._rows_by_length.update(row_lengths)
        self._num_label_tokens += int(label_mask.sum())
        start = 0
        for length in row_lengths:
            self._input_ids += input_ids[start : start + length].tobytes()
            self._label_mask += label_mask[start : start + length].tobytes()
            start += length
            self._row_offsets.append(len(self._label_mask))
            if len(self._label_mask) * _TOKEN_BYTES >= self._shard_bytes:
                self._store()

    def finish(self) -> Statistics:
        """Stores what is left and `statistics.json`. There must have been rows."""
        if len(self._row_offsets) > 1:
            self._store()
        statistics = self._statistics()
        self._writer.put_bytes("statistics.json", data=json.dumps(asdict(statistics), indent=2).encode())
        return statistics

    def _store(self) -> None:
        tensors = {
            "input_ids": np.frombuffer(self._input_ids, dtype=np.int32),
            "label_mask": np.frombuffer(self._label_mask, dtype=np.uint8),
            "row_offsets": np.array(self._row_offsets, dtype=np.int64),
        }
        self._writer.put_bytes(f"shard-{self._num_shards:05}.safetensors", data=safetensors.numpy.save(tensors))
        self._num_shards += 1
        self._clear()

    def _clear(self) -> None:
        self._input_ids = bytearray()
        self._label_mask = bytearray()
        self._row_offsets = [0]

    def _statistics(self) -> Statistics:
        lengths = sorted(self._rows_by_length)
        num_rows = self._rows_by_length.total()
        return Statistics(
            num_rows=num_rows,
            num_tokens=sum(length * count for length, count in self._rows_by_length.items()),
            num_label_tokens=self._num_label_tokens,
            min_row_tokens=lengths[0],
            median_row_tokens=self._median(lengths, (num_rows - 1) // 2),
            max_row_tokens=lengths[-1],
        )

    def _median(self, lengths: Sequence[int], rank: int) -> int:
        """The length of the row at `rank`, from 0, in the order of length: the lower of the two middle ones."""
        seen = 0
        for length in lengths:
            seen += self._rows_by_length[length]
            if seen > rank:
                return length
        raise AssertionError("rank is below the number of rows")
