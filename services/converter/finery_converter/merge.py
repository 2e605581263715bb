"""Merging a LoRA adapter (PEFT's files) into its base model (a Hugging Face folder): W + scale * B A, tensor by tensor.

Owns the order of the work and the folder that comes out: the base's shards under their names (or shards of another size), its configuration
with the new dtype, everything else byte for byte. Values are computed in float32 and rounded once. Memory stays within a few blocks of rows
and the two matrices of one update; only the base as an adapter's NF4 training had it needs one whole tensor. Leaves the base's values to
`base_tensors`, the update to `lora`, output types to `stored`, threads to `pipeline`; staging, digests and publication to the server.

    plan = plan_merge(base_dir, adapter_dir, stored_as=torch.bfloat16)   # cheap: reads headers, checks everything
    merge(plan, output_dir, on_progress=print)

An adapter that was trained on NF4 weights (`trained_on="nf4"`) corrects those weights, errors of quantization and all. Merged into them
(`base_weights="trained"`, the default) the result is the model that was trained. The original weights are nearer to the base model, but
what the adapter learnt to make up for is then no longer there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter import nf4
from finery_converter.base_tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    BaseTensor,
    PlainTensor,
    Scratch,
    TrainedNf4Tensor,
    base_tensors,
    is_tied,
    not_finite,
    num_elements,
    quantization_of,
    read_json,
)
from finery_converter.layers import Layers, layers_of
from finery_converter.lora import LoadedUpdate, Update, looks_transposed, updates
from finery_converter.pipeline import Buffers, Lease, ReadAhead, WriteBehind
from finery_converter.stored import Cast, Encoding, Form, Sink, encoding_of
from finery_converter.tensorfiles import BLOCK_BYTES, TensorSpec, TensorWriter, file_too_small

TrainedOn = Literal["plain", "nf4"]
BaseWeights = Literal["trained", "original"]
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_READ_AHEAD, _WRITE_BEHIND = 4, 4
_HEADER_BYTES, _ENTRY_BYTES = 64, 160
"""At most what a header of safetensors takes by itself, and for each tensor beside its name."""
_LEAST_SHARE = 0.5
"""Of a model's weights, without embeddings and head, that must be in linear layers for a quantized form to be worth its name."""


@dataclass(frozen=True)
class MergePlan:
    """A merge whose inputs have been checked; nothing is read but headers."""

    base_dir: Path
    shards: dict[str, dict[str, BaseTensor]]
    """Output file's name to what goes into it, in the order of reading."""
    updates: dict[str, Update]
    """Base tensor's name to what changes it."""
    stored_as: torch.dtype
    """Of every floating-point tensor written, but for quantized ones."""
    fits: torch.dtype
    """Values must stay finite in this type too; a later step rounds to it."""
    copied: tuple[Path, ...] = field(default=())
    """Files taken over byte for byte, relative to `base_dir`."""
    quantized: Encoding | None = None
    """The form of `quantized_names`."""
    quantized_names: frozenset[str] = frozenset()
    kept_modules: tuple[str, ...] = ()
    """Linear layers that stay as they are in a quantized model."""

    def encoding(self, tensor: BaseTensor) -> Encoding:
        """How `tensor` is written."""
        if self.quantized is not None and tensor.name in self.quantized_names:
            return self.quantized
        return Cast(self.stored_as if tensor.dtype.is_floating_point else tensor.dtype)

    def specs(self, tensor: BaseTensor) -> list[TensorSpec]:
        """The tensors that `tensor` becomes."""
        return self.encoding(tensor).specs(tensor.name, tensor.shape)

    @property
    def num_elements(self) -> int:
        """Of the model's tensors."""
        return sum(num_elements(tensor) for tensors in self.shards.values() for tensor in tensors.values())

    @property
    def size_bytes(self) -> int:
        """Of everything written, nearly: headers and the index are not counted."""
        weights = sum(_size_bytes(self.specs(tensor)) for tensors in self.shards.values() for tensor in tensors.values())
        return weights + sum((self.base_dir / name).stat().st_size for name in self.copied)


def plan_merge(
    base_dir: Path,
    adapter_dir: Path | None,
    *,
    stored_as: torch.dtype,
    fits: torch.dtype | None = None,
    form: Form | None = None,
    trained_on: TrainedOn = "plain",
    trained_dtype: torch.dtype = torch.bfloat16,
    trained_arithmetic: nf4.Arithmetic = "gpu",
    base_weights: BaseWeights = "trained",
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """Checks that `adapter_dir` fits `base_dir` to the last tensor; without an adapter the base itself is converted.

    `stored_as` is the type of all floating-point tensors; with `form` linear layers are quantized. `trained_dtype` is what weights had
    before NF4 quantized them, `trained_arithmetic` where that was. `max_shard_bytes` splits the weights anew.

    Raises InvalidArgumentError for an adapter key that matches nothing, a missing half of a pair, a wrong shape, a broken file, original
    weights of a base that has none, or a tensor larger than a shard may be; UnimplementedError for kinds of adapter, base and form that
    this merge does not know; FailedPreconditionError for a base without weights.
    """
    files = base_tensors(base_dir)
    base = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    is_quantized = quantization_of(base_dir) is not None
    if is_quantized and base_weights == "original":
        raise InvalidArgumentError(
            f"base_weights: got original, but the base model {base_dir.name} exists as NF4 only; use trained, or a base of 16 or 32 bits.",
            param="base_weights",
            code="no_original_weights",
        )
    as_trained = adapter_dir is not None and trained_on == "nf4" and base_weights == "trained" and not is_quantized
    has_conv1d = adapter_dir is not None and looks_transposed(adapter_dir, base)
    layers = layers_of(base_dir) if form or as_trained or has_conv1d else Layers.none()
    if adapter_dir is None:
        changes = dict[str, Update]()
    else:
        changes = updates(adapter_dir, base=base, tied=is_tied(base_dir), conv1d=layers.conv1d)
    if as_trained:
        files = _as_trained(files, layers, dtype=trained_dtype, arithmetic=trained_arithmetic)
    plan = MergePlan(base_dir, files, changes, stored_as, fits or stored_as, copied=tuple(_copied_files(base_dir)))
    if form is not None:
        plan = _quantized(plan, layers, form=form)
    return plan if max_shard_bytes is None else _resharded(plan, max_shard_bytes)


def _as_trained(
    files: dict[str, dict[str, BaseTensor]], layers: Layers, *, dtype: torch.dtype, arithmetic: nf4.Arithmetic
) -> dict[str, dict[str, BaseTensor]]:
    if layers.conv1d:
        raise UnimplementedError("base_weights: trained is not known for models whose layers are stored transposed (Conv1D); use original.")
    names = {f"{name}.weight" for name in layers.linear}
    if missing := names - {name for tensors in files.values() for name in tensors}:
        raise UnimplementedError(f"base_weights: trained finds no tensor {min(missing)} in the base model's files; use original.")

    def as_trained(tensor: BaseTensor) -> BaseTensor:
        if tensor.name not in names or not isinstance(tensor, PlainTensor):
            return tensor
        return TrainedNf4Tensor(tensor.stored, dtype, arithmetic)

    return {file: {name: as_trained(tensor) for name, tensor in tensors.items()} for file, tensors in files.items()}


def _quantized(plan: MergePlan, layers: Layers, *, form: Form) -> MergePlan:
    names = {f"{name}.weight" for name in layers.linear}
    present = {tensor.name: tensor for tensors in plan.shards.values() for tensor in tensors.values()}
    if layers.share < _LEAST_SHARE or not names <= set(present):
        raise UnimplementedError(
            f"type: got {form}, which is for linear layers, and only {layers.share:.0%} of this model's weights without embeddings and "
            "head are in such under their own names (experts and some families' own layers are not); use bf16 or f16."
        )
    encoding = encoding_of(form, dtype=plan.stored_as)
    for name in names:
        encoding.specs(name, present[name].shape)
    return replace(plan, quantized=encoding, quantized_names=frozenset(names), kept_modules=tuple(sorted(layers.kept)))


def _resharded(plan: MergePlan, max_bytes: int) -> MergePlan:
    """The same tensors in files of at most `max_bytes`, filled in order."""
    groups: list[dict[str, BaseTensor]] = [{}]
    filled_bytes = _HEADER_BYTES
    for tensor in (tensor for tensors in plan.shards.values() for tensor in tensors.values()):
        specs = plan.specs(tensor)
        size_bytes = _size_bytes(specs) + sum(len(name) + _ENTRY_BYTES for name, _, _ in specs)
        if _HEADER_BYTES + size_bytes > max_bytes:
            raise file_too_small(max_bytes, f"{tensor.name} alone", least_bytes=_HEADER_BYTES + size_bytes)
        if filled_bytes + size_bytes > max_bytes:
            groups.append({})
            filled_bytes = _HEADER_BYTES
        groups[-1][tensor.name] = tensor
        filled_bytes += size_bytes
    if len(groups) == 1:
        return replace(plan, shards={WEIGHTS_FILE: groups[0]})
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return replace(plan, shards=dict(zip(names, groups, strict=True)))


def _size_bytes(specs: list[TensorSpec]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in specs)


def merge(plan: MergePlan, output_dir: Path, *, on_progress: Callable[[float], None]) -> None:
    """Writes the merged folder into the empty `output_dir`; `on_progress` gets the share done, 0 to 1, after each tensor.

    Raises InvalidArgumentError where base or adapter holds NaN or Inf, or a merged value does not fit the output's type.
    """
    _write_weights(plan, output_dir, on_progress=on_progress)
    if list(plan.shards) != [WEIGHTS_FILE]:
        _write_index(plan, output_dir / INDEX_FILE)
    _write_config(plan, output_dir / "config.json")
    for name in plan.copied:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base_dir / name, output_dir / name)


def _write_weights(plan: MergePlan, output_dir: Path, *, on_progress: Callable[[float], None]) -> None:
    written, total, scratch = 0, max(1, plan.num_elements), Scratch()
    # Whoever holds one: the queue, the reader, the arithmetic.
    sources = Buffers(count=_READ_AHEAD + 2, size_bytes=BLOCK_BYTES)
    results = Buffers(count=_WRITE_BEHIND + 2, size_bytes=2 * BLOCK_BYTES)
    # Files are closed after the thread that writes them has ended.
    with ExitStack() as files, ReadAhead(_read(plan, sources), depth=_READ_AHEAD) as read, WriteBehind(depth=_WRITE_BEHIND) as behind:
        for file_name, tensors in plan.shards.items():
            writer = TensorWriter(output_dir / file_name, tensors=[spec for tensor in tensors.values() for spec in plan.specs(tensor)])
            files.callback(writer.abandon)
            sink = Sink(writer, behind, results)
            for tensor in tensors.values():
                _write_tensor(plan, tensor, _until_none(read), sink=sink, scratch=scratch)
                written += num_elements(tensor)
                on_progress(written / total)
            behind.submit(writer.close)


def _until_none(leases: Iterator[Lease | None]) -> Iterator[Lease]:
    while (lease := next(leases)) is not None:
        yield lease


def _read(plan: MergePlan, buffers: Buffers) -> Iterator[Lease | None]:
    """Every tensor's blocks, and None after each tensor."""
    for tensors in plan.shards.values():
        for tensor in tensors.values():
            yield from _source(plan, tensor).read_blocks(buffers)
            yield None


def _source(plan: MergePlan, tensor: BaseTensor) -> BaseTensor:
    """Where the values come from that the update's pair is added to."""
    update = plan.updates.get(tensor.name)
    return tensor if update is None or update.replacement is None else PlainTensor(update.replacement)


def _write_tensor(plan: MergePlan, tensor: BaseTensor, blocks: Iterator[Lease], *, sink: Sink, scratch: Scratch) -> None:
    source, encoding = _source(plan, tensor), plan.encoding(tensor)
    if isinstance(source, PlainTensor) and encoding == Cast(source.dtype) and tensor.name not in plan.updates:
        for lease in blocks:
            values = lease.data.view(source.dtype)
            if source.dtype.is_floating_point:
                _check(plan, tensor, values)
            sink.cast(tensor.name, values, source.dtype)
            lease.release()
        return
    encoding.encode(tensor.name, tensor.shape, _merged(plan, tensor, source.values(blocks, scratch)), sink)


def _merged(plan: MergePlan, tensor: BaseTensor, values: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensor's rows after its update, float32, all finite."""
    update = LoadedUpdate(plan.updates.get(tensor.name, Update()))
    for values_RK in values:
        update.apply(values_RK)
        _check(plan, tensor, values_RK)
        yield values_RK


def _check(plan: MergePlan, tensor: BaseTensor, values: torch.Tensor) -> None:
    """Raises where a value is NaN or Inf, or would be in one of the output's types."""
    if not values.numel():
        return
    lowest, highest = torch.aminmax(values)
    peak = torch.maximum(-lowest, highest)
    # Rounding keeps order: what holds for the largest holds for all.
    if peak.to(plan.stored_as).isfinite() and peak.to(plan.fits).isfinite():
        return
    if not peak.isfinite():
        _blame(plan, tensor)
    narrower = min(plan.stored_as, plan.fits, key=lambda dtype: torch.finfo(dtype).max)
    raise InvalidArgumentError(
        f"Merged tensor {tensor.name} reaches {peak:.3g}, more than {_name(narrower)} holds; convert to bf16.", code="value_out_of_range"
    )


def _blame(plan: MergePlan, tensor: BaseTensor) -> None:
    """Raises for NaN or Inf in what `tensor` was made of, read again to find it."""
    update = plan.updates.get(tensor.name, Update())
    source = _source(plan, tensor)
    buffers = Buffers(count=2, size_bytes=BLOCK_BYTES)
    for values_RK in source.values(source.read_blocks(buffers), Scratch()):
        if not values_RK.isfinite().all():
            raise not_finite(source.name, of="base model" if update.replacement is None else "adapter")
    if update.magnitude is not None:
        raise InvalidArgumentError(f"Merged tensor {tensor.name} has a row of zeros, which DoRA cannot scale.", code="value_out_of_range")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    weight_map: dict[str, str] = {}
    total = 0
    for file_name, tensors in plan.shards.items():
        for tensor in tensors.values():
            specs = plan.specs(tensor)
            weight_map |= {name: file_name for name, _, _ in specs}
            total += _size_bytes(specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n")


def _write_config(plan: MergePlan, file: Path) -> None:
    config = read_json(plan.base_dir / "config.json")
    config.pop("quantization_config", None)
    config = _with_dtype(config, _name(plan.stored_as))
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = _name(plan.stored_as)
    if plan.quantized is not None:
        config["quantization_config"] = plan.quantized.quantization_config(list(plan.kept_modules))
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _with_dtype(config: dict[str, object], dtype: str) -> dict[str, object]:
    """`config` with every dtype it names, in nested configurations too, replaced."""
    return {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else dtype if key in ("dtype", "torch_dtype") else value
        for key, value in config.items()
    }
