"""What an adapter (PEFT's files) does to each tensor of its base model, with every one of its tensors accounted for.

Owns the reading of adapter_config.json, PEFT's names for tensors, the scale of each pair and the arithmetic of one update on a block of
rows: LoRA, rank-stabilized LoRA, DoRA, ranks and alphas by pattern, embeddings, layers stored transposed (Conv1D), trained biases and whole
modules. Leaves the base's own values to `base_tensors`, order and files to `merge`.

Letters: O output features (rows), I input features (columns), R rank, N rows of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finery_common.errors import FineryError, InvalidArgumentError, UnimplementedError
from finery_converter.base_tensors import BaseTensor, not_finite, read_json
from finery_converter.tensorfiles import StoredTensor, read_header

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
_SHOWN = 5
_KINDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight", "bias")
_UNSUPPORTED = (
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "megatron_config",
)
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways of starting an adapter that leave the base model as it is; pissa, olora, loftq and others change it under the adapter."""


@dataclass(frozen=True)
class Update:
    """What an adapter does to one base tensor: puts `replacement` in its place, then adds `scale` * `b` @ `a`, then sets row norms."""

    a: StoredTensor | None = None
    """[R, I]; of an embedding [R, O]."""
    b: StoredTensor | None = None
    """[O, R]; of an embedding [I, R]."""
    scale: float = 0.0
    is_transposed: bool = False
    """The base holds (b @ a) transposed: Conv1D's weights, and embeddings."""
    magnitude: StoredTensor | None = None
    """DoRA's [O]: the norm that each row has in the end."""
    replacement: StoredTensor | None = None


class LoadedUpdate:
    """An update with its matrices in memory, to be applied to blocks of rows in order.

    Raises InvalidArgumentError (code `not_finite`) where one of them holds NaN or Inf.
    """

    def __init__(self, update: Update) -> None:
        self._scale = update.scale
        self._left_OR: torch.Tensor | None = None
        self._right_RI: torch.Tensor | None = None
        if update.a is not None and update.b is not None:
            a, b = _finite(update.a), _finite(update.b)
            self._left_OR, self._right_RI = (a.t().contiguous(), b.t().contiguous()) if update.is_transposed else (b, a)
        self._magnitude_O = None if update.magnitude is None else _finite(update.magnitude).reshape(-1)
        self._row = 0

    def apply(self, weight_NI: torch.Tensor) -> None:
        """Changes the next rows of the weight, float32, in place."""
        rows = slice(self._row, self._row + len(weight_NI))
        self._row = rows.stop
        if self._left_OR is not None and self._right_RI is not None:
            torch.addmm(weight_NI, self._left_OR[rows], self._right_RI, alpha=self._scale, out=weight_NI)
        if self._magnitude_O is not None:
            weight_NI.mul_((self._magnitude_O[rows] / torch.linalg.vector_norm(weight_NI, dim=1)).unsqueeze(1))


def _finite(tensor: StoredTensor) -> torch.Tensor:
    values = tensor.read().to(torch.float32)
    if values.numel() and not values.isfinite().all():
        raise not_finite(tensor.name, of="adapter")
    return values


def adapter_config(adapter_dir: Path) -> dict[str, object]:
    """The adapter's configuration; anything in it that would change the arithmetic and is not known here is an UnimplementedError."""
    config = read_json(adapter_dir / CONFIG_FILE)
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        raise UnimplementedError(f"{CONFIG_FILE}: got peft_type {config.get('peft_type')!r}, wanted LORA with r and lora_alpha.")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("use_dora") and config.get("fan_in_fan_out"):
        used.append("use_dora with fan_in_fan_out")
    if used:
        raise UnimplementedError(f"{CONFIG_FILE}: {', '.join(used)} cannot be merged here; merge this adapter with PEFT.")
    if config.get("init_lora_weights") not in _HARMLESS_STARTS:
        raise UnimplementedError(
            f"{CONFIG_FILE}: init_lora_weights {config['init_lora_weights']!r} changed the base model that this adapter was trained on; "
            "save it with PEFT's path_initial_model_for_weight_conversion first, which makes a plain adapter of it."
        )
    return config


def adapter_tensors(adapter_dir: Path) -> dict[str, StoredTensor]:
    """The adapter's tensors by name. Raises InvalidArgumentError where there are none or the file is broken."""
    if not (adapter_dir / ADAPTER_FILE).is_file():
        raise InvalidArgumentError(f"The adapter holds no {ADAPTER_FILE}; adapters are read as safetensors only.")
    stored = read_header(adapter_dir / ADAPTER_FILE)
    if not stored:
        raise InvalidArgumentError("The adapter holds no tensor.")
    return stored


def split_key(key: str) -> tuple[str, str]:
    """(`model.layers.0.self_attn.q_proj`, `lora_A.weight`) of PEFT's name for a tensor; an unknown kind is the last part."""
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    for kind in _KINDS:
        if path.endswith(f".{kind}"):
            return path.removesuffix(f".{kind}"), kind
    module, _, last = path.rpartition(".")
    return module, last


def by_pattern(config: Mapping[str, object], patterns: str, module: str, *, default: str) -> float:
    """`config[default]`, or what `config[patterns]` says of `module`: the first name or regular expression that its name ends with."""
    chosen = config.get(patterns) or {}
    if not isinstance(chosen, dict):
        raise InvalidArgumentError(f"{CONFIG_FILE}: {patterns} is no object")
    for pattern, value in chosen.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return _number(value, patterns)
        except re.error as error:
            raise InvalidArgumentError(f"{CONFIG_FILE}: {patterns} holds {pattern!r}, which is no regular expression") from error
    return _number(config[default], default)


def scale_of(config: Mapping[str, object], module: str) -> tuple[int, float]:
    """(rank, factor of b @ a) of one module, as PEFT takes them."""
    rank = int(by_pattern(config, "rank_pattern", module, default="r"))
    alpha = by_pattern(config, "alpha_pattern", module, default="lora_alpha")
    if rank < 1:
        raise InvalidArgumentError(f"{CONFIG_FILE}: got rank {rank} for {module}, wanted 1 or more")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgumentError(f"{CONFIG_FILE}: {name} is {value!r}, wanted a number")
    return float(value)


def looks_transposed(adapter_dir: Path, base: Mapping[str, BaseTensor]) -> bool:
    """Whether some layers may be stored transposed (Conv1D): the configuration says so, or a matrix fits a layer only then.

    The configuration alone does not tell: PEFT sets `fan_in_fan_out` layer by layer and saves what the last one had.
    """
    if adapter_config(adapter_dir).get("fan_in_fan_out"):
        return True
    for key, a in adapter_tensors(adapter_dir).items():
        module, kind = split_key(key)
        weight = _find(f"{module}.weight", base) if kind == "lora_A.weight" else None
        if weight is not None and len(weight.shape) == len(a.shape) == 2 and a.shape[1] == weight.shape[0] != weight.shape[1]:
            return True
    return False


def updates(adapter_dir: Path, *, base: Mapping[str, BaseTensor], tied: bool, conv1d: frozenset[str]) -> dict[str, Update]:
    """Base tensor's name to what the adapter does to it; `conv1d` are modules whose weights are stored transposed.

    Raises InvalidArgumentError for a key that matches nothing, a missing half of a pair, a wrong shape or a broken file;
    UnimplementedError for kinds of adapter that are not known here.
    """
    config = adapter_config(adapter_dir)
    stored = adapter_tensors(adapter_dir)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        module, kind = split_key(key)
        modules.setdefault(module, {})[kind] = tensor
    result: dict[str, Update] = {}
    unmatched: list[str] = []
    for module, kinds in modules.items():
        known = _module_updates(module, kinds, base=base, tied=tied, conv1d=conv1d, config=config)
        result |= known
        matched = {item.name for update in known.values() for item in (update.a, update.b, update.magnitude, update.replacement) if item}
        unmatched += [tensor.name for tensor in kinds.values() if tensor.name not in matched]
    if unmatched:
        raise _unmatched(unmatched, num_tensors=len(stored), tied=tied)
    _check_complete(config, modules, base=base)
    return result


def _check_complete(config: Mapping[str, object], modules: Collection[str], *, base: Mapping[str, BaseTensor]) -> None:
    """Raises where the configuration speaks of modules whose tensors are not there: a file of which a part was lost."""
    lost = [name for name in _names(config, "modules_to_save") if not any(_is_of(module, [name]) for module in modules)]
    if not any(config.get(name) is not None for name in ("layers_to_transform", "layers_pattern", "exclude_modules")):
        # Alike but for their numbers, or of a name that no other has: other parts of a model, such as one for images, may have layers of
        # the same name.
        alike = {re.sub(r"\d+", "#", module) for module in modules}
        last_names = {module.rpartition(".")[2] for module in modules}
        for module in (
            name.removesuffix(".weight") for name, tensor in base.items() if name.endswith(".weight") and len(tensor.shape) == 2
        ):
            is_own = re.sub(r"\d+", "#", module) in alike or module.rpartition(".")[2] not in last_names
            if is_own and module not in modules and _is_target(module, config):
                lost.append(module)
    if lost:
        raise InvalidArgumentError(
            f"The adapter lacks the tensors of {len(lost)} modules that its {CONFIG_FILE} speaks of, such as {', '.join(lost[:_SHOWN])}.",
            code="missing_adapter_tensor",
        )


def _unmatched(names: list[str], *, num_tensors: int, tied: bool) -> FineryError:
    text = f"{len(names)} of {num_tensors} adapter tensors match nothing in the base model that can be merged, such as "
    text += ", ".join(sorted(names)[:_SHOWN]) + ". "
    if tied and any("embed" in name or "lm_head" in name for name in names):
        text += "The base model's embeddings and head are one tensor, which an adapter of only one of them cannot be merged into."
    else:
        text += "The adapter was trained for another model, or changes parts that this merge does not know."
    return InvalidArgumentError(text, code="unmatched_adapter_tensor")


def _module_updates(
    module: str,
    kinds: Mapping[str, StoredTensor],
    *,
    base: Mapping[str, BaseTensor],
    tied: bool,
    conv1d: frozenset[str],
    config: Mapping[str, object],
) -> dict[str, Update]:
    """What the tensors of one module change; those that no update holds match nothing."""
    result: dict[str, Update] = {}
    weight = _find(f"{module}.weight", base)
    if weight is not None and not (tied and module.endswith(("lm_head", "embed_tokens", "wte", "embed_in", "embed_out"))):
        update = _pair(module, kinds, weight, config=config, is_conv1d=module in conv1d)
        if (whole := kinds.get("weight")) is not None and _replaces(whole, weight):
            update = replace(update or Update(), replacement=whole)
        if update is not None:
            result[weight.name] = update
    bias = _find(f"{module}.bias", base)
    if bias is not None and (new := kinds.get("bias")) is not None and _may_replace_bias(module, config) and _replaces(new, bias):
        result[bias.name] = Update(replacement=new)
    return result


def _find(name: str, base: Mapping[str, BaseTensor]) -> BaseTensor | None:
    """The tensor `name`, or that of a checkpoint which leaves out the name of the model without its head (`transformer.h.0…`)."""
    return base.get(name) or base.get(name.partition(".")[2])


def _may_replace_bias(module: str, config: Mapping[str, object]) -> bool:
    return config.get("bias") not in (None, "none") or _is_of(module, _names(config, "modules_to_save"))


def _names(config: Mapping[str, object], field: str) -> list[str]:
    """A list of names of modules; none where the field is a regular expression or missing."""
    names = config.get(field) or []
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_target(module: str, config: Mapping[str, object]) -> bool:
    """Whether `target_modules`, a list of names or a regular expression, speaks of `module`."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error as error:
            raise InvalidArgumentError(f"{CONFIG_FILE}: target_modules is {targets!r}, which is no regular expression") from error
    return _is_of(module, _names(config, "target_modules"))


def _is_of(module: str, names: Sequence[str]) -> bool:
    """Whether PEFT takes `module` for one of `names`."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _replaces(new: StoredTensor, old: BaseTensor) -> bool:
    if new.shape != old.shape:
        raise InvalidArgumentError(
            f"{new.name}: got {list(new.shape)}, the base model's {old.name} is {list(old.shape)}; "
            "the adapter was trained with another vocabulary or model.",
            code="adapter_shape_mismatch",
        )
    return new.dtype.is_floating_point and old.dtype.is_floating_point


def _pair(
    module: str, kinds: Mapping[str, StoredTensor], base: BaseTensor, *, config: Mapping[str, object], is_conv1d: bool
) -> Update | None:
    is_embedding = "lora_embedding_A" in kinds or "lora_embedding_B" in kinds
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    a, b = (kinds.get(name) for name in names)
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise InvalidArgumentError(f"The adapter has only one of {' and '.join(names)} for {base.name}.", code="unmatched_adapter_tensor")
    rank, scale = scale_of(config, module)
    is_transposed = is_embedding or is_conv1d
    rows, columns = base.shape if len(base.shape) == 2 else (0, 0)
    num_in, num_out = (rows, columns) if is_transposed else (columns, rows)
    if len(base.shape) != 2 or a.shape != (rank, num_in) or b.shape != (num_out, rank):
        raise InvalidArgumentError(
            f"{a.name}: got A {list(a.shape)} and B {list(b.shape)}; "
            f"rank {rank} on {base.name} {list(base.shape)} wants {[rank, num_in]} and {[num_out, rank]}.",
            code="adapter_shape_mismatch",
        )
    return Update(a, b, scale, is_transposed, _magnitude(kinds, base, config=config, is_transposed=is_transposed))


def _magnitude(
    kinds: Mapping[str, StoredTensor], base: BaseTensor, *, config: Mapping[str, object], is_transposed: bool
) -> StoredTensor | None:
    if not config.get("use_dora"):
        return None
    if is_transposed:
        raise UnimplementedError(f"{CONFIG_FILE}: use_dora on {base.name} cannot be merged here, only on linear layers.")
    magnitude = kinds.get("lora_magnitude_vector")
    if magnitude is None:
        raise InvalidArgumentError(f"The adapter has no lora_magnitude_vector for {base.name}.", code="unmatched_adapter_tensor")
    if magnitude.shape not in ((base.shape[0],), (base.shape[0], 1)):
        raise InvalidArgumentError(
            f"{magnitude.name}: got {list(magnitude.shape)}, wanted {[base.shape[0]]}, one for each row of {base.name}.",
            code="adapter_shape_mismatch",
        )
    return magnitude
