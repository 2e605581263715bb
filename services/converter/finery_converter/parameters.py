"""Which checkpoint tensors a model's parameters are made of.

Owns a model without weights, made from a folder's configuration, and the way from checkpoint names to parameters: transformers' own
renamings and conversions (fused experts, split projections), run once on shapes alone to check that everything fits, and again for each
parameter when its values are wanted. Leaves reading to `weights` and the pass to `streamed`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from finery_converter.weights import Weights, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

_SHOWN = 3


def skeleton(folder: Path) -> PreTrainedModel:
    """The causal language model of `folder` in float32 without weights: parameters on the meta device, computed buffers in place.

    Raises UnimplementedError for an architecture that transformers does not know or that brings its own code.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # How a folder's weights are stored is for whoever reads them.
        vars(config).pop("quantization_config", None)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnimplementedError(f"{folder.name}: transformers makes no causal language model of its config.json: {error}") from error
    model.config.use_cache = False
    return cast("PreTrainedModel", model).eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class _Recipe:
    """One conversion: what it reads, and how. `target` is the first of the names that it makes."""

    converter: WeightConverter
    target: str
    sources: tuple[tuple[str, str], ...]
    """(checkpoint name, the converter's pattern that it matched)"""

    def make(self, model: PreTrainedModel, tensor_of: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            # The library's name for it, given where loading is not concurrent: a call that gives the tensor.
            converter.add_tensor(self.target, name, pattern, _call(tensor_of, name))  # pyright: ignore[reportArgumentType]
        made = cast("dict[str, torch.Tensor | list[torch.Tensor]]", converter.convert(self.target, model=model, config=model.config))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Parameters:
    """The parameters and stored buffers of `model`, made from `weights`.

    Raises FailedPreconditionError where a parameter has nothing to be made from, InvalidArgumentError for another shape.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights) -> None:
        self._model = model
        self.weights = weights
        self.direct: dict[str, str] = {}
        """Parameter to the checkpoint tensor that it is, unchanged."""
        self._made: dict[str, _Recipe] = {}
        self._made_shapes: dict[str, tuple[int, ...]] = {}
        self.unused: list[str] = []
        """Checkpoint tensors that become nothing."""
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._plan(wanted)
        self._tie()
        self._check(wanted)

    def read(self, parameter: str) -> torch.Tensor:
        """The whole of a parameter in float32."""
        if parameter in self.direct:
            return read(self.weights, self.direct[parameter])
        return self._made[parameter].make(self._model, lambda name: read(self.weights, name))[parameter]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.direct or parameter in self._made

    def _plan(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, WeightConverter)]
        by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
        prefix, names = self._model.base_model_prefix, dict.fromkeys(wanted, 1)
        collected: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(self.weights.shapes, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, names)
            if target not in wanted and name in wanted:
                target, pattern = rename_source_key(name, [], [], prefix, names)
            if target not in wanted:
                self.unused.append(name)
            elif pattern is None:
                self.direct[target] = name
            else:
                collected[target].append((name, pattern))
        for target, sources in collected.items():
            recipe = _Recipe(by_pattern[sources[0][1]], target, tuple(sources))
            for name, value in recipe.make(self._model, lambda name: torch.empty(self.weights.shapes[name], device="meta")).items():
                self._made[name], self._made_shapes[name] = recipe, tuple(value.shape)

    def _tie(self) -> None:
        """Parameters that are one and the same, of which a checkpoint has either."""
        for name, other in (self._model.all_tied_weights_keys or {}).items():
            for missing, present in ((name, other), (other, name)):
                if missing not in self and present in self.direct:
                    self.direct[missing] = self.direct[present]

    def _check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        if missing := sorted(name for name in wanted if name not in self):
            raise FailedPreconditionError(
                f"The model folder lacks {len(missing)} of the weights that its config.json speaks of, "
                f"such as {', '.join(missing[:_SHOWN])}."
            )
        got = {name: self.weights.shapes[source] for name, source in self.direct.items()} | self._made_shapes
        for name, shape in wanted.items():
            if tuple(got[name]) != shape:
                raise InvalidArgumentError(
                    f"The model folder has {name} of shape {list(got[name])}, wanted {list(shape)} by its config.json."
                )


def _call(tensor_of: Callable[[str], torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: tensor_of(name)
