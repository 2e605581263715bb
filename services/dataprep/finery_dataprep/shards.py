"""Shards of a dataset: how tokens lie in the store, and the statistics over them.

Owns the format. A shard is a safetensors file of int32 `input_ids` (its rows, concatenated), uint8 `label_mask` of the same length (1
where that token is a label) and int64 `row_offsets` (number of rows + 1). A shard of preference pairs has the three twice, as
`chosen_input_ids` and so on and as `rejected_input_ids` and so on, with as many rows each. No row and no pair is split between two shards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from finery_common.artifacts import ArtifactWriter
from finery_common.spec import DatasetType

SHARD_BYTES = 64 * 1024 * 1024
PREFIXES = {DatasetType.SUPERVISED: ("",), DatasetType.PREFERENCE: ("chosen_", "rejected_")}
"""What the names of a shard's tensors begin with, once for each row of an item."""
_TOKEN_BYTES = 5


@dataclass
class _Column:
    """Rows of a shard that is being filled."""

    input_ids: bytearray = field(default_factory=bytearray)
    label_mask: bytearray = field(default_factory=bytearray)
    row_offsets: list[int] = field(default_factory=lambda: [0])

    def add(self, input_ids: NDArray[np.int32], label_mask: NDArray[np.uint8]) -> None:
        self.input_ids += input_ids.tobytes()
        self.label_mask += label_mask.tobytes()
        self.row_offsets.append(len(self.label_mask))


@dataclass(frozen=True)
class Statistics:
    """Numbers of a dataset; row lengths in tokens. A pair is one row, as long as the longer of its two."""

    num_rows: int
    num_tokens: int
    num_label_tokens: int
    min_row_tokens: int
    median_row_tokens: int
    max_row_tokens: int


class ShardWriter:
    """Collects rows and stores a shard whenever one is full; memory holds one shard. Its calls block while they store."""

    def __init__(
        self, writer: ArtifactWriter, *, dataset_type: DatasetType = DatasetType.SUPERVISED, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._writer = writer
        self._prefixes = PREFIXES[dataset_type]
        self._shard_bytes = shard_bytes
        self._num_shards = 0
        self._num_tokens = 0
        self._num_label_tokens = 0
        self._rows_by_length: Counter[int] = Counter()
        self._clear()

    def add(self, row_lengths: Sequence[int], *, input_ids: NDArray[np.int32], label_mask: NDArray[np.uint8]) -> None:
        """Appends rows, given concatenated; of pairs, the chosen and the rejected row by turns."""
        self._num_tokens += len(input_ids)
        self._num_label_tokens += int(label_mask.sum())
        width, start = len(self._columns), 0
        assert len(row_lengths) % width == 0
        for first in range(0, len(row_lengths), width):
            lengths = row_lengths[first : first + width]
            self._rows_by_length[max(lengths)] += 1
            for column, length in zip(self._columns, lengths, strict=True):
                column.add(input_ids[start : start + length], label_mask[start : start + length])
                start += length
            if sum(len(column.label_mask) for column in self._columns) * _TOKEN_BYTES >= self._shard_bytes:
                self._store()

    def finish(self) -> Statistics:
        """Stores what is left and `statistics.json`. There must have been rows."""
        if len(self._columns[0].row_offsets) > 1:
            self._store()
        statistics = self._statistics()
        self._writer.put_bytes("statistics.json", data=json.dumps(asdict(statistics), indent=2).encode())
        return statistics

    def _store(self) -> None:
        tensors: dict[str, NDArray[np.generic]] = {}
        for prefix, column in zip(self._prefixes, self._columns, strict=True):
            tensors[f"{prefix}input_ids"] = np.frombuffer(column.input_ids, dtype=np.int32)
            tensors[f"{prefix}label_mask"] = np.frombuffer(column.label_mask, dtype=np.uint8)
            tensors[f"{prefix}row_offsets"] = np.array(column.row_offsets, dtype=np.int64)
        self._writer.put_bytes(f"shard-{self._num_shards:05}.safetensors", data=safetensors.numpy.save(tensors))
        self._num_shards += 1
        self._clear()

    def _clear(self) -> None:
        self._columns = [_Column() for _ in self._prefixes]

    def _statistics(self) -> Statistics:
        lengths = sorted(self._rows_by_length)
        num_rows = self._rows_by_length.total()
        return Statistics(
            num_rows=num_rows,
            num_tokens=self._num_tokens,
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
