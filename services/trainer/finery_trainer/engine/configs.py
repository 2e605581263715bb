"""A base model's `config.json` as transformers' configuration, before anything else of the model is there.

Owns reading it, and telling from it alone whether the engine's own layers would train the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finery_common.errors import FailedPreconditionError
from finery_trainer.engine.architecture import describe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read(config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that `config` writes. Raises FailedPreconditionError where no class of transformers takes it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        return AutoConfig.for_model(config["model_type"], **fields)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise FailedPreconditionError(
            f"What this base model needs cannot be told: its config.json cannot be read: {error}", code="invalid_base_model"
        ) from error


def not_own(config: Mapping[str, Any]) -> str | None:
    """Why the engine's own layers would not train the model of this `config.json`, or None where they would. Raises as `read` does."""
    shape = describe(read(config))
    return shape if isinstance(shape, str) else None
