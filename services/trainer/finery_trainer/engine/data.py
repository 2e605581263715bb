"""Prepared datasets: reading their shards, and the order in which a run sees their rows.

A dataset folder holds `shard-00000.safetensors`, …, each with `input_ids` (int32, all rows behind each other), `label_mask` (uint8 or
bool, 1 where that token is a label) and `row_offsets` (int64, rows + 1); one of pairs has them twice (`preference`). Making them is
dataprep's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from finery_common.errors import InvalidArgumentError
from finery_trainer.engine.limits import ModelLimits
from finery_trainer.engine.packing import IGNORE

IntArray = npt.NDArray[np.int64]
MaskedRow = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids and label mask of a row, each 1-D of its length."""
SampleT_co = TypeVar("SampleT_co", covariant=True)


class Samples(Protocol[SampleT_co]):
    """What the loop asks of a dataset. A sample is a row, or a pair of them."""

    @property
    def num_rows(self) -> int:
        """Samples."""
        ...

    @property
    def row_lengths(self) -> IntArray:
        """Tokens of each sample."""
        ...

    def check(self, limits: ModelLimits, *, max_sequence_length: int) -> None:
        """Raises InvalidArgumentError where the data do not fit the model or the spec's `max_sequence_length`."""
        ...

    def training_row(self, index: int, /) -> SampleT_co:
        """A sample as passes take it."""
        ...


class TokenDataset:
    """The rows of a dataset folder, memory-mapped. Rows are counted over all shards in name order.

    `prefix` is what the names of its tensors begin with: in a dataset of pairs `chosen_` or `rejected_`.
    Raises InvalidArgumentError (code `invalid_dataset`) for a folder without rows, a shard of another form, or a row without a label.
    """

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self._shards = [_Shard(path, prefix=prefix) for path in sorted(folder.glob("shard-*.safetensors"))]
        if not self._shards or not sum(len(shard.lengths) for shard in self._shards):
            raise _invalid(f"The dataset in {folder.name} has no rows; prepare it again.")
        self._starts = np.cumsum([0] + [len(shard.lengths) for shard in self._shards])
        self.row_lengths: IntArray = np.concatenate([shard.lengths for shard in self._shards])
        """Tokens of each row."""
        self.row_labels: IntArray = np.concatenate([shard.labels for shard in self._shards])
        """Tokens of each row that the loss is taken on; a row's first token has nothing before it and is never one."""
        self.max_token_id = max(shard.max_token_id for shard in self._shards)
        if not self.row_labels.all():
            raise _invalid(f"Row {int(np.argmin(self.row_labels))} of the dataset has no token to learn from; prepare it again.")

    @property
    def num_rows(self) -> int:
        return len(self.row_lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.row_lengths.sum())

    def check(self, limits: ModelLimits, *, max_sequence_length: int) -> None:
        """Raises InvalidArgumentError where a token id or a row does not fit the model, or a row the spec's `max_sequence_length`."""
        if self.max_token_id >= limits.vocab_size:
            raise _invalid(
                f"input_ids: got token id {self.max_token_id}, wanted ids below {limits.vocab_size}, the model's vocabulary; "
                "prepare the dataset with this base model."
            )
        longest, row = int(self.row_lengths.max()), int(self.row_lengths.argmax())
        if limits.max_tokens is not None and longest > limits.max_tokens:
            raise _invalid(
                f"input_ids: row {row} has {longest} tokens, the model's limit is {limits.max_tokens} (max_position_embeddings, with its "
                "RoPE scaling); shorten it, or use a base model whose config.json scales RoPE further."
            )
        if longest > max_sequence_length:
            raise _invalid(
                f"input_ids: row {row} has {longest} tokens, the limit is {max_sequence_length}; shorten it or raise max_sequence_length."
            )

    def row(self, index: int) -> MaskedRow:
        """Token ids and label mask of one row, each 1-D of its length."""
        shard_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard_index].row(index - int(self._starts[shard_index]))

    def training_row(self, index: int) -> tuple[IntArray, IntArray]:
        """(token ids, targets) of one row: `targets[t]` is the token to predict after token t, or IGNORE."""
        ids, mask = self.row(index)
        targets = np.full(len(ids), IGNORE, dtype=np.int64)
        targets[:-1] = np.where(mask[1:], ids[1:], IGNORE)
        return ids.astype(np.int64), targets


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """The rows in the order that epoch number `epoch`, counted from 0, sees them: a function of its arguments and nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows).tolist()


class _Shard:
    def __init__(self, path: Path, *, prefix: str) -> None:
        try:
            shard = safe_open(path, framework="numpy")
            raw_offsets = np.asarray(shard.get_tensor(f"{prefix}row_offsets"))
            ids, mask = shard.get_tensor(f"{prefix}input_ids"), shard.get_tensor(f"{prefix}label_mask")
        except (SafetensorError, OSError) as error:
            raise _invalid(f"{path.name} cannot be read: {error}; prepare the dataset again.") from error
        for name, array, kinds in (("row_offsets", raw_offsets, "iu"), ("input_ids", ids, "iu"), ("label_mask", mask, "iub")):
            if array.ndim != 1 or array.dtype.kind not in kinds:
                wanted = "whole numbers" if kinds == "iu" else "whole numbers or booleans"
                raise _invalid(f"{path.name}: {name} is {array.dtype} {array.shape}, wanted {wanted} in one dimension; prepare it again.")
        offsets = raw_offsets.astype(np.int64)
        self.lengths: IntArray = np.diff(offsets)
        if ids.shape != mask.shape or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids) or (self.lengths < 1).any():
            raise _invalid(
                f"{path.name}: row_offsets, input_ids {ids.shape} and label_mask {mask.shape} do not fit together; prepare it again."
            )
        if len(ids) and int(ids.min()) < 0:
            raise _invalid(f"{path.name}: input_ids: got token id {int(ids.min())}, wanted 0 or more; prepare the dataset again.")
        is_label = (mask != 0).astype(np.int64)
        is_label[offsets[:-1]] = 0
        self.labels: IntArray = np.add.reduceat(is_label, offsets[:-1]) if len(self.lengths) else self.lengths
        self.max_token_id = int(ids.max()) if len(ids) else -1
        self._offsets = offsets
        self._ids, self._mask = shard.get_slice(f"{prefix}input_ids"), shard.get_slice(f"{prefix}label_mask")

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._ids[start:stop], self._mask[start:stop].astype(bool)


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, code="invalid_dataset")
