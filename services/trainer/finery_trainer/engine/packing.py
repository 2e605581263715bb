"""Packed batches: rows of a dataset behind each other in one sequence of tokens, each attending to itself alone.

Owns how rows become the tensors of a forward pass, and which rows go together under a token budget. Reading rows is `data`'s.

Shapes: T tokens of a pack, padding included; S sequences; L positions that a loss is taken on, padding included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from finery_common.errors import InvalidArgumentError

IGNORE = -100

SMALL_TOKENS = 8192
"""A pack of up to so many tokens may be captured in a CUDA graph. Above, a card is busy for so much longer than launches take that a graph
gains nothing and its memory is better used."""

Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(token ids, targets), both [tokens]: `targets[t]` is the token to predict after token t, or IGNORE."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One forward pass. Padding stands at the end, a sequence of its own without labels."""

    input_ids_T: torch.Tensor
    """int64."""
    positions_T: torch.Tensor
    """int32, from 0 in every sequence."""
    cu_seqlens: torch.Tensor
    """int32 [S + 1]: where sequences begin, and T."""
    rows_L: torch.Tensor
    """int64: the positions with a label; padded with 0."""
    targets_L: torch.Tensor
    """int64: their targets; IGNORE in the padding."""
    max_seqlen: int
    lengths_equal: int | None
    """The length that all sequences have, where they have one."""
    num_tokens: int
    """Without padding."""
    num_labels: int
    """Without padding."""
    is_deterministic: bool = False
    """Whether attention must give the same bits in every run."""
    embedded_TD: torch.Tensor | None = None
    """The tokens' embeddings, where they were looked up beforehand."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a forward pass reads, by field."""
        fields = {name: getattr(self, name) for name in _TENSORS}
        return {name: value for name, value in fields.items() if value is not None}

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; copied without waiting where it lies in pinned memory."""
        return replaced(self, {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()})

    def pinned(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return replaced(self, {name: tensor.pin_memory() for name, tensor in self.tensors().items()})


_TENSORS = ("input_ids_T", "positions_T", "cu_seqlens", "rows_L", "targets_L", "embedded_TD")


def pack(rows: Sequence[Row], *, token_multiple: int = 1, label_multiple: int = 1, is_deterministic: bool = False) -> PackedBatch:
    """The rows as one batch, in the order given; T and L are padded up to multiples, so that few shapes occur.

    Padding is a sequence of its own, but behind a single row, which does not see it and so stays one sequence.

    Raises InvalidArgumentError for no rows, an empty row, or rows without a single label: the loss would be undefined.
    """
    lengths = [len(ids) for ids, _ in rows]
    if not rows or min(lengths) == 0:
        raise InvalidArgumentError(
            f"rows: got {len(rows)} rows of which the shortest has {min(lengths, default=0)} tokens, wanted at least 1."
        )
    num_tokens = sum(lengths)
    padding = -num_tokens % token_multiple
    targets = np.concatenate([targets for _, targets in rows])
    labelled = np.flatnonzero(targets != IGNORE)
    if not len(labelled):
        raise InvalidArgumentError("targets: got none that the loss is taken on, wanted at least 1 in a batch; check the rows' labels.")
    padded = [num_tokens + padding] if len(rows) == 1 else [*lengths, padding] if padding else lengths
    label_padding = np.zeros(-len(labelled) % label_multiple, dtype=np.int64)
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([*(ids for ids, _ in rows), np.zeros(padding, dtype=np.int64)])),
        positions_T=torch.from_numpy(np.concatenate([np.arange(length, dtype=np.int32) for length in padded])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *padded], dtype=np.int32)),
        rows_L=torch.from_numpy(np.concatenate([labelled, label_padding])),
        targets_L=torch.from_numpy(np.concatenate([targets[labelled], label_padding + IGNORE])),
        max_seqlen=max(padded),
        lengths_equal=padded[0] if len(set(padded)) == 1 else None,
        num_tokens=num_tokens,
        num_labels=len(labelled),
        is_deterministic=is_deterministic,
    )


def count_labels(rows: Sequence[Row]) -> int:
    """Positions that a loss is taken on."""
    return sum(int((targets != IGNORE).sum()) for _, targets in rows)


def padded_tokens(num_tokens: int) -> int:
    """The tokens that a pack of `num_tokens` is padded to beside a GPU.

    Small packs go up to an eighth of the power of two below, 128 at least, so that shapes repeat; larger ones to a multiple of 8.
    """
    step = max(128, 1 << max(0, (num_tokens - 1).bit_length() - 4)) if num_tokens <= SMALL_TOKENS else 8
    return -(-num_tokens // step) * step


def multiple_of_labels(padded: int) -> int:
    """What the labels of a pack of `padded` tokens are padded to a multiple of beside a GPU: a quarter of the tokens of small packs, whose
    shapes are to repeat."""
    return max(128, padded // 4) if padded <= SMALL_TOKENS else 128


def groups(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices into `lengths` in groups of at most `max_tokens` tokens, longest first; a longer row is a group of its own.

    First fit decreasing: within 11/9 of the fewest groups (Johnson 1973).
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for position, (used, members) in enumerate(bins):
            if used + lengths[index] <= max_tokens:
                bins[position] = used + lengths[index], [*members, index]
                break
        else:
            bins.append((lengths[index], [index]))
    yield from (members for _, members in bins)


def replaced(batch: PackedBatch, values: Mapping[str, object]) -> PackedBatch:
    """The batch with other values of some fields."""
    return dataclasses.replace(batch, **values)  # pyright: ignore[reportArgumentType]
