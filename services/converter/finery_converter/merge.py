"""Merging a LoRA adapter (PEFT's files) into its base model (a Hugging Face folder): W + scale * B A, tensor by tensor.

Owns the arithmetic (in float32, rounded once at the end), the accounting of every adapter tensor, and the folder that comes out: the
base's shards under their names, its configuration with the new dtype, everything else byte for byte. Memory stays within a few blocks
of rows and the adapter itself. Leaves staging, digests and publication to the server.

    plan = plan_merge(base_dir, adapter_dir, stored_as=torch.bfloat16, fits=torch.bfloat16)   # cheap: reads headers, checks everything
    merge(plan, output_dir, on_progress=print)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finery_common.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from finery_converter.tensorfiles import StoredTensor, TensorWriter, read_header, rows_and_columns

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PREFIX = "base_model.model."
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_SHOWN = 5


@dataclass(frozen=True)
class Update:
    """What an adapter does to one base tensor: adds `scale` * `b` @ `a`, or puts `bias` in its place."""

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    scale: float = 0.0
    bias: StoredTensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge whose inputs have been checked; nothing is read but headers."""

    base_dir: Path
    shards: dict[str, dict[str, StoredTensor]]
    """File name to its tensors."""
    updates: dict[str, Update]
    """Base tensor name to what changes it."""
    stored_as: torch.dtype
    """Of every floating-point tensor written."""
    fits: torch.dtype
    """Values must stay finite in this type too; a later step rounds to it."""
    copied: tuple[Path, ...] = field(default=())
    """Files taken over byte for byte, relative to `base_dir`."""

    def written_as(self, tensor: StoredTensor) -> torch.dtype:
        return self.stored_as if tensor.dtype.is_floating_point else tensor.dtype

    @property
    def num_elements(self) -> int:
        return sum(tensor.num_elements for tensor in self._tensors())

    @property
    def size_bytes(self) -> int:
        """Of everything written, nearly: headers and the index are not counted."""
        weights = sum(tensor.num_elements * self.written_as(tensor).itemsize for tensor in self._tensors())
        return weights + sum((self.base_dir / name).stat().st_size for name in self.copied)

    def _tensors(self) -> Iterator[StoredTensor]:
        return (tensor for shard in self.shards.values() for tensor in shard.values())


def plan_merge(base_dir: Path, adapter_dir: Path, *, stored_as: torch.dtype, fits: torch.dtype) -> MergePlan:
    """Checks that `adapter_dir` fits `base_dir` to the last tensor.

    Raises InvalidArgumentError for an adapter key that matches nothing, a missing half of a pair, a wrong shape or a broken file;
    UnimplementedError for kinds of adapter and base that this merge does not know; FailedPreconditionError for a base without weights.
    """
    shards = _base_shards(base_dir)
    base = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    updates = _updates(adapter_dir, base=base, tied=_is_tied(base_dir))
    return MergePlan(base_dir, shards, updates, stored_as, fits, copied=tuple(_copied_files(base_dir)))


def merge(plan: MergePlan, output_dir: Path, *, on_progress: Callable[[float], None]) -> None:
    """Writes the merged folder into the empty `output_dir`; `on_progress` gets the share done, 0 to 1, after each tensor.

    Raises InvalidArgumentError where base or adapter holds NaN or Inf, or a merged value does not fit the output's type.
    """
    written, total = 0, max(1, plan.num_elements)
    for file_name, tensors in plan.shards.items():
        listed = [(name, plan.written_as(tensor), tensor.shape) for name, tensor in tensors.items()]
        with TensorWriter(output_dir / file_name, tensors=listed) as writer:
            for name in writer.names:
                for block in _merged_blocks(plan, tensors[name]):
                    writer.append(block)
                written += tensors[name].num_elements
                on_progress(written / total)
    if list(plan.shards) != [WEIGHTS_FILE]:
        _write_index(plan, output_dir / INDEX_FILE)
    _write_config(plan, output_dir / "config.json")
    for name in plan.copied:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base_dir / name, output_dir / name)


def _merged_blocks(plan: MergePlan, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """`tensor` after its update as blocks of rows in the output's dtype."""
    update = plan.updates.get(tensor.name, Update())
    if not tensor.dtype.is_floating_point:
        yield from tensor.blocks()
        return
    a_RI = _finite(update.a) if update.a is not None else None
    b_OR = _finite(update.b) if update.b is not None else None
    row = 0
    for block in (update.bias or tensor).blocks():
        weight_OI = block.to(torch.float32)
        _check_finite(weight_OI, what=f"tensor {tensor.name} of the {'adapter' if update.bias else 'base model'}")
        if a_RI is not None and b_OR is not None:
            weight_OI = torch.addmm(weight_OI, b_OR[row : row + len(block)], a_RI, alpha=update.scale)
        row += len(block)
        peak = _peak(weight_OI)
        # Rounding keeps order: what holds for the largest holds for all.
        if not (peak.to(plan.stored_as).isfinite() and peak.to(plan.fits).isfinite()):
            raise InvalidArgumentError(
                f"Merged tensor {tensor.name} reaches {peak:.3g}, more than {_name(plan.fits)} holds; convert to bf16.",
                code="value_out_of_range",
            )
        yield weight_OI.to(plan.stored_as)


def _finite(tensor: StoredTensor) -> torch.Tensor:
    values = tensor.read().to(torch.float32)
    _check_finite(values, what=f"tensor {tensor.name} of the adapter")
    return values


def _check_finite(values: torch.Tensor, *, what: str) -> None:
    if values.numel() and not _peak(values).isfinite():
        raise InvalidArgumentError(f"The {what} contains NaN or Inf; train or download it again.", code="not_finite")


def _peak(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude; NaN where there is one."""
    lowest, highest = torch.aminmax(values)
    return torch.maximum(-lowest, highest)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _base_shards(base_dir: Path) -> dict[str, dict[str, StoredTensor]]:
    config = _read_json(base_dir / "config.json")
    if config.get("quantization_config"):
        raise UnimplementedError(f"The base model {base_dir.name} is quantized; merging needs its 16- or 32-bit weights.")
    if (base_dir / INDEX_FILE).exists():
        listed = _read_json(base_dir / INDEX_FILE).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (base_dir / name).is_file()]
    if missing or not names or any("/" in name for name in names):
        raise FailedPreconditionError(
            f"The base model {base_dir.name} has no {', '.join(missing) or 'weights'}; wanted {WEIGHTS_FILE} or all its shards."
        )
    return {name: read_header(base_dir / name) for name in names}


def _is_tied(base_dir: Path) -> bool:
    return bool(_read_json(base_dir / "config.json").get("tie_word_embeddings"))


def _updates(adapter_dir: Path, *, base: dict[str, StoredTensor], tied: bool) -> dict[str, Update]:
    config = _adapter_config(adapter_dir)
    stored = read_header(adapter_dir / "adapter_model.safetensors")
    if not stored:
        raise InvalidArgumentError("The adapter holds no tensor.")
    updates: dict[str, Update] = {}
    unmatched: list[str] = []
    for key, tensor in stored.items():
        module, kind = _split_key(key)
        target = f"{module}.{'bias' if kind == 'bias' else 'weight'}"
        known = target in base
        if kind in ("lora_A.weight", "lora_B.weight"):
            known = known and not (tied and module.endswith(("lm_head", "embed_tokens")))
            pair = [stored.get(key.replace(kind, half)) for half in ("lora_A.weight", "lora_B.weight")]
            if known and target not in updates:
                updates[target] = _pair(pair[0], pair[1], base[target], config=config)
        elif kind == "bias" and config.get("bias") != "none" and known and base[target].shape == tensor.shape:
            updates[target] = Update(bias=tensor)
        else:
            known = False
        if not known:
            unmatched.append(key)
    if unmatched:
        shown = ", ".join(sorted(unmatched)[:_SHOWN])
        raise InvalidArgumentError(
            f"{len(unmatched)} of {len(stored)} adapter tensors match nothing in the base model that can be merged, such as {shown}. "
            "The adapter was trained for another model, or changes parts (embeddings, whole modules) that this merge does not support.",
            code="unmatched_adapter_tensor",
        )
    return updates


def _split_key(key: str) -> tuple[str, str]:
    """(`model.layers.0.self_attn.q_proj`, `lora_A.weight`) of PEFT's name for a tensor."""
    path = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    num_parts = 2 if path.endswith((".lora_A.weight", ".lora_B.weight")) else 1
    parts = path.split(".")
    return ".".join(parts[:-num_parts]), ".".join(parts[-num_parts:])


def _pair(a: StoredTensor | None, b: StoredTensor | None, base: StoredTensor, *, config: dict[str, object]) -> Update:
    if a is None or b is None:
        raise InvalidArgumentError(f"The adapter has only one of lora_A and lora_B for {base.name}.", code="unmatched_adapter_tensor")
    rank = int(str(config["r"]))
    num_out, num_in = rows_and_columns(base.shape)
    if len(base.shape) != 2 or a.shape != (rank, num_in) or b.shape != (num_out, rank):
        raise InvalidArgumentError(
            f"{a.name}: got A {list(a.shape)} and B {list(b.shape)}; "
            f"rank {rank} on {base.name} {list(base.shape)} wants {[rank, num_in]} and {[num_out, rank]}.",
            code="adapter_shape_mismatch",
        )
    alpha = float(str(config["lora_alpha"]))
    return Update(a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _adapter_config(adapter_dir: Path) -> dict[str, object]:
    """The adapter's configuration; anything in it that would change the arithmetic and is not known here is an error."""
    config = _read_json(adapter_dir / "adapter_config.json")
    if config.get("peft_type") != "LORA" or "r" not in config or "lora_alpha" not in config:
        raise UnimplementedError(f"adapter_config.json: got peft_type {config.get('peft_type')!r}, wanted LORA with r and lora_alpha.")
    unsupported = (
        "use_dora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "layer_replication",
    )
    used = [name for name in unsupported if config.get(name)]
    if used:
        raise UnimplementedError(f"adapter_config.json: {', '.join(used)} cannot be merged here; merge this adapter with PEFT.")
    return config


def _copied_files(base_dir: Path) -> Iterator[Path]:
    """Tokenizer, chat templates, generation configuration, licence: all but weights, code and the configuration we write."""
    for path in sorted(base_dir.rglob("*")):
        name = path.relative_to(base_dir)
        ours = name.name == "config.json" or name.name.endswith(".index.json")
        hidden = any(part.startswith(".") for part in name.parts)
        wanted = name.suffix in _COPIED_SUFFIXES or name.name.startswith(_COPIED_NAMES)
        if path.is_file() and wanted and not ours and not hidden:
            yield name


def _write_index(plan: MergePlan, file: Path) -> None:
    weight_map = {name: file_name for file_name, tensors in plan.shards.items() for name in tensors}
    total = sum(item.num_elements * plan.written_as(item).itemsize for tensors in plan.shards.values() for item in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n")


def _write_config(plan: MergePlan, file: Path) -> None:
    config = _with_dtype(_read_json(plan.base_dir / "config.json"), _name(plan.stored_as))
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = _name(plan.stored_as)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _with_dtype(config: dict[str, object], dtype: str) -> dict[str, object]:
    """`config` with every dtype it names, in nested configurations too, replaced."""
    return {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else dtype if key in ("dtype", "torch_dtype") else value
        for key, value in config.items()
    }


def _read_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{file.name} of {file.parent.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{file.name} of {file.parent.name}: got {type(content).__name__}, wanted an object")
    return content
