"""What a model takes: token ids below its vocabulary's size, and rows up to a length.

Owns reading both off transformers' configurations, also off those of models that see images too. What a spec allows is the spec's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """`max_tokens` of a row; None for a model without positions, such as a state-space one."""

    vocab_size: int
    max_tokens: int | None


def limits_of(config: PretrainedConfig) -> ModelLimits:
    """The limits of a model with this configuration; its RoPE scaling counts."""
    text = config.get_text_config(decoder=True)
    positions = cast("int | None", getattr(text, "max_position_embeddings", None))
    return ModelLimits(vocab_size=text.vocab_size, max_tokens=None if positions is None else max(positions, *_scaled(text), 0))


def _scaled(text: PretrainedConfig) -> Iterator[int]:
    """The lengths that RoPE is scaled to, where the configuration says from which: some count them in `max_position_embeddings` already."""
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    for each in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        # Of dynamic scaling, transformers counts the length it begins at there.
        unscaled = text.max_position_embeddings if each.get("rope_type") == "dynamic" else None
        original, factor = each.get("original_max_position_embeddings", unscaled), each.get("factor")
        if original is not None and factor is not None:
            yield floor(original * factor)
