"""What a conversion takes, step by step, for each format; runs in the worker's process, on folders alone.

Owns the order of the steps, the room that they need on the disk, and the report that goes into the manifest. A step that fails leaves
nothing to publish: what the parity gate has not passed never leaves the scratch folder. Leaves each piece of work to its module.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from finery_common.conversion_spec import ConversionSpec, OutputFormat, OutputType
from finery_common.errors import InvalidArgumentError, ResourceExhaustedError, UnimplementedError
from finery_converter import adapters, calibration, ggufparts, importance, parity, quantize
from finery_converter import gguf as hf_to_gguf
from finery_converter.base_tensors import num_elements
from finery_converter.gguf_parity import Comparison, GgufModel, compare, compare_with_logits
from finery_converter.lora import adapter_tensors
from finery_converter.merge import Form, MergePlan, merge, plan_merge
from finery_converter.modelfile import adds_bos, make_modelfile
from finery_converter.streamed import StreamedModel
from finery_converter.task import REPORT_FILE, Task
from finery_converter.tensorfiles import file_too_small
from finery_converter.weights import TensorWeights

MODELFILE = "Modelfile"
_SPARE_BYTES = 64 * 1024 * 1024
_HEADER_SPARE_BYTES = 64 * 1024
_IMPORTANCE_TOKENS = 16_384
_DTYPES = {
    OutputType.F32: torch.float32,
    OutputType.BF16: torch.bfloat16,
    OutputType.F16: torch.float16,
}
_FORMS: dict[OutputType, Form] = {OutputType.NF4: "nf4", OutputType.FP8: "fp8", OutputType.FP8_BLOCK: "fp8_block"}
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_READINGS = {
    "f32": parity.LossyBudget(1e-4, 0.99),
    "f16": parity.LossyBudget(1e-3, 0.98),
    "bf16": parity.LossyBudget(0.01, 0.95),
    "q8_0": parity.LossyBudget(0.05, 0.88),
}
"""What llama.cpp may read of a 16-bit file, and of one written as q8_0 straight from float32, against the folder that it was made of. It
rounds activations as well, to 16 or 8 bits: on SmolLM2-135M the divergences are 2e-9, 1e-5, 3e-4 and 0.009 nats."""
_ADAPTER_SHARE, _ADAPTER_NOISE = 0.01, 1e-7
"""What a GGUF adapter may be off by, as a share of what the adapter does to the texts (KL divergences): one that does nothing, or twice as
much, is off by all of it, half the scale by a quarter, a right one by 5e-5 in q8_0 and less in wider types. And in nats, for adapters that
do next to nothing, what llama.cpp's own arithmetic in float32 stays below."""
_NUM_THREADS = max(1, (os.cpu_count() or 1) // 2)
"""llama.cpp's threads spin while they wait for each other, which on busy cores costs ten times what a second thread gains."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Step:
    """`weight` is about how long it takes beside the others."""

    name: str
    weight: float
    run: Callable[[Progress], None]


class Recipe:
    """The steps of one task, and what they hand on."""

    def __init__(self, task: Task) -> None:
        self.spec = ConversionSpec.parse(task.spec)
        self._task = task
        self._type = self.spec.element_type
        self._base_dir = Path(task.base_dir)
        self._output_dir, self._scratch_dir = Path(task.output_dir), Path(task.scratch_dir)
        self._converter_dir = Path(task.converter_dir)
        self._adapter_dir: Path | None = None
        self._files: tuple[Path, ...] = ()
        self.report: dict[str, object] = {}

    @property
    def steps(self) -> Sequence[Step]:
        """In order."""
        prepare = Step("preparing the adapter", 0.02, self._prepare_adapter)
        match self.spec.format:
            case OutputFormat.ADAPTER:
                return prepare, Step("checking", 0.5, self._check_adapter), Step("writing the adapter", 0.5, self._write_adapter)
            case OutputFormat.GGUF_ADAPTER:
                return prepare, *self._gguf_adapter_steps()
            case OutputFormat.SAFETENSORS:
                return prepare, Step("merging", 0.5, self._merge), Step("comparing", 0.5, self._compare)
            case OutputFormat.GGUF:
                return prepare, *self._gguf_steps()

    def _gguf_steps(self) -> Sequence[Step]:
        steps = [
            Step("checking", 0.03, self._check_whole_gguf),
            Step("merging", 0.2, self._merge),
            Step("comparing", 0.3, self._compare),
            Step("writing GGUF", 0.15, self._write_gguf),
            Step("comparing GGUF", 0.1, self._compare_gguf),
        ]
        if self._is_quantized:
            weighs = self.spec.weighs_inputs
            steps += [Step("weighing inputs", 0.2, self._weigh)] if weighs else []
            steps += [Step("quantizing", 0.2, self._quantize), Step("comparing the quantized", 0.1, self._compare_quantized)]
        return [*steps, Step("writing the Modelfile", 0.01, self._write_modelfile)]

    def _gguf_adapter_steps(self) -> Sequence[Step]:
        return (
            Step("checking", 0.05, self._check_gguf_adapter),
            Step("preparing the base", 0.3, self._write_plain_base),
            Step("writing GGUF", 0.05, self._write_gguf_adapter),
            Step("comparing GGUF", 0.6, self._compare_gguf_adapter),
        )

    @property
    def _is_quantized(self) -> bool:
        """By llama.cpp's own quantization, from a 16-bit file."""
        return self._type.value not in hf_to_gguf.TYPES

    @property
    def _merged_dir(self) -> Path:
        return self._output_dir if self.spec.format is OutputFormat.SAFETENSORS else self._scratch_dir / "merged"

    @property
    def _merged_type(self) -> OutputType:
        """GGUF files of 8 bits and more are written from float32, so that their own rounding is the only one and vectors, which GGUF keeps
        in float32, lose nothing; smaller ones from a 16-bit model, which they are then compared with.
        """
        match self.spec.format:
            case OutputFormat.SAFETENSORS:
                return self._type
            case OutputFormat.GGUF_ADAPTER:
                return OutputType.F32
            case _:
                pass
        return OutputType.BF16 if self._is_quantized else OutputType.F32

    @cached_property
    def _plan(self) -> MergePlan:
        form, spec = _FORMS.get(self._merged_type), self.spec
        is_folder = spec.format is OutputFormat.SAFETENSORS
        return plan_merge(
            self._base_dir,
            None if spec.format is OutputFormat.GGUF_ADAPTER else self._adapter_dir,
            stored_as=torch.bfloat16 if form else _DTYPES[self._merged_type],
            fits=_DTYPES.get(self._type) if spec.format is OutputFormat.GGUF else None,
            form=form,
            trained_on=self._task.trained_on,
            trained_dtype=_PRECISIONS[self._task.precision],
            trained_arithmetic="cpu" if self._task.device == "cpu" else "gpu",
            base_weights=spec.base_weights.value,
            max_shard_bytes=spec.max_file_size_bytes if is_folder else None,
        )

    @cached_property
    def _texts(self) -> calibration.TokenSet:
        """What everything is compared on: the fixed passages, and as much again of the dataset where there is one."""
        fixed = calibration.passages(self._base_dir, vocab_size=_vocab_size(self._base_dir))
        if self._task.dataset_dir is None:
            return fixed
        rows = self._token_set(max_tokens=calibration.GATE_TOKENS)
        return calibration.TokenSet("dataset", (*fixed.sequences, *rows.sequences))

    def _token_set(self, *, max_tokens: int) -> calibration.TokenSet:
        vocab_size = _vocab_size(self._base_dir)
        if self._task.dataset_dir is not None:
            return calibration.dataset_rows(Path(self._task.dataset_dir), vocab_size=vocab_size, max_tokens=max_tokens)
        return calibration.passages(self._base_dir, vocab_size=vocab_size, max_tokens=max_tokens)

    def _prepare_adapter(self, _: Progress) -> None:
        """One adapter of however many, scaled as asked; none where a whole model is converted."""
        dirs, spec = [Path(item) for item in self._task.adapter_dirs], self.spec
        if not dirs:
            return
        if len(dirs) > 1:
            target, weights = self._made("combined"), [source.weight for source in spec.sources]
            adapters.combined(list(zip(dirs, weights, strict=True)), target, method=spec.combination.value, density=spec.density)
            dirs = [target]
        if spec.scale != 1:
            target = self._made("scaled")
            adapters.scaled(dirs[0], target, scale=spec.scale)
            dirs = [target]
        [self._adapter_dir] = dirs

    def _made(self, name: str) -> Path:
        folder = self._scratch_dir / name
        folder.mkdir()
        return folder

    def _check_adapter(self, _: Progress) -> None:
        """That every tensor has its place in the base, and is finite."""
        assert self._adapter_dir is not None
        plan_merge(self._base_dir, self._adapter_dir, stored_as=torch.float32)
        tensors = adapter_tensors(self._adapter_dir).values()
        self.report["adapter"] = {"num_tensors": len(tensors), "num_numbers": sum(tensor.num_elements for tensor in tensors)}
        for tensor in tensors:
            if not all(bool(block.isfinite().all()) for block in tensor.blocks()):
                raise InvalidArgumentError(
                    f"{tensor.file.name}: tensor {tensor.name} has NaN or Inf; train the adapter again.", code="not_finite"
                )

    def _write_adapter(self, _: Progress) -> None:
        assert self._adapter_dir is not None
        for file in sorted(self._adapter_dir.iterdir()):
            shutil.copyfile(file, self._output_dir / file.name)

    def _check_gguf_adapter(self, on_progress: Progress) -> None:
        assert self._adapter_dir is not None
        hf_to_gguf.check_lora(self._adapter_dir)
        self._check_adapter(on_progress)
        self._check_gguf(on_progress)
        _check_room(self._needed_bytes, folder=self._scratch_dir)

    def _write_plain_base(self, on_progress: Progress) -> None:
        """The base in float32, as a folder and as a GGUF file, for an adapter must be seen at work; neither is published."""
        self._merged_dir.mkdir()
        merge(self._plan, self._merged_dir, on_progress=lambda share: on_progress(share / 2))
        self._files = hf_to_gguf.convert(
            self._merged_dir,
            self._scratch_dir / "base.gguf",
            type_="f32",
            model_name=self._task.model_name,
            converter_dir=self._converter_dir,
            on_progress=lambda share: on_progress(0.5 + share / 2),
        )

    def _write_gguf_adapter(self, on_progress: Progress) -> None:
        assert self._adapter_dir is not None
        hf_to_gguf.convert_lora(
            self._adapter_dir,
            self._merged_dir,
            self._gguf_adapter_file,
            converter_dir=self._converter_dir,
            on_progress=on_progress,
            type_=self._type.value,
        )

    @property
    def _gguf_adapter_file(self) -> Path:
        return self._output_dir / f"adapter.{self._type}.gguf"

    def _compare_gguf_adapter(self, on_progress: Progress) -> None:
        """llama.cpp's reading of base and adapter against base + adapter; and that no number of the adapter is missing."""
        assert self._adapter_dir is not None
        wanted = sum(tensor.num_elements for tensor in adapter_tensors(self._adapter_dir).values())
        got = sum(fact.num_elements for fact in ggufparts.read_header(self._gguf_adapter_file).tensors.values())
        # Where llama.cpp splits a layer, each part has the whole of A.
        if got < wanted:
            raise parity.NotTheSameModelError(
                f"The GGUF adapter holds {got:,} numbers and the adapter that it was made of {wanted:,}; it is not published."
            )
        base = GgufModel(file=self._files[0])
        candidates = (replace(base, lora=self._gguf_adapter_file), base)
        model = StreamedModel(self._merged_dir, adapter_dir=self._adapter_dir)
        found, without = self._compared(model, candidates, on_progress)
        self.report["base_alone"] = {"mean_kl": without.mean_kl, "perplexity": without.candidate_perplexity}
        self._note_texts()
        budget = _READINGS[self._type.value]
        allowed = max(_ADAPTER_NOISE, _ADAPTER_SHARE * without.mean_kl)
        self._judge(found, self._type.value, budget=replace(budget, max_mean_kl=min(budget.max_mean_kl, allowed)), name="gguf")

    def _check_whole_gguf(self, on_progress: Progress) -> None:
        self._check_file_size(self._check_gguf(on_progress))

    def _check_file_size(self, header_bytes: int) -> None:
        """That one file can hold the largest tensor. To the byte that is known of quantized types once it is written."""
        max_bytes, bits = self.spec.max_file_size_bytes, re.search(r"\d+", self._type.value)
        assert bits is not None, "GGUF's types are named after the bits of a weight, to which most add scales"
        largest = max((tensor for tensors in self._plan.shards.values() for tensor in tensors.values()), key=num_elements)
        scales_bytes = 2 * num_elements(largest) // 32 if self._type is OutputType.Q8_0 else 0
        least_bytes = int(bits[0]) * num_elements(largest) // 8 + scales_bytes + header_bytes + _HEADER_SPARE_BYTES
        if max_bytes is not None and least_bytes > max_bytes:
            raise file_too_small(max_bytes, f"{largest.name} with the file's own data", least_bytes=least_bytes)

    def _check_gguf(self, _: Progress) -> int:
        return hf_to_gguf.check_supported(self._base_dir, converter_dir=self._converter_dir, scratch_dir=self._scratch_dir)

    def _merge(self, on_progress: Progress) -> None:
        _check_room(self._needed_bytes, folder=self._output_dir)
        self._merged_dir.mkdir(exist_ok=True)
        merge(self._plan, self._merged_dir, on_progress=on_progress)

    @property
    def _needed_bytes(self) -> int:
        """Of all files that are there at the same time."""
        if self.spec.format is OutputFormat.SAFETENSORS:
            return self._plan.size_bytes
        # llama.cpp's own quantization is split afterwards; its converter writes parts at once.
        copies = 1 if self.spec.max_file_size_bytes is None else 2
        written_as = self._type if self.spec.format is OutputFormat.GGUF else OutputType.F32
        sixteenths = {OutputType.F32: 64, OutputType.Q8_0: 17}.get(written_as, 32)
        written = sixteenths * self._plan.num_elements // 16
        quantized = copies * 9 * self._plan.num_elements // 8 if self._is_quantized else 0
        # Of a dataset as many tokens again.
        logits = 4 * _vocab_size(self._base_dir) * calibration.GATE_TOKENS * (1 if self._task.dataset_dir is None else 2)
        return self._plan.size_bytes + written + quantized + logits

    def _compare(self, on_progress: Progress) -> None:
        """The gate: nothing goes on that does not say what base and adapter say."""
        form = _FORMS.get(self._merged_type)
        report = parity.check_conversion(
            self._base_dir,
            self._merged_dir,
            adapter_dir=self._adapter_dir,
            type_=form or _name_of(_DTYPES[self._merged_type]),
            dtype=torch.bfloat16 if form else _DTYPES[self._merged_type],
            sequences=self._texts.sequences,
            base_weights=TensorWeights(self._plan.shards.values()),
            on_progress=on_progress,
        )
        self.report["parity"] = report.to_metadata()
        self._note_texts()

    def _note_texts(self) -> None:
        self.report["calibration"] = {"source": self._texts.source, "num_tokens": self._texts.num_tokens}

    @property
    def _gguf_file(self) -> Path:
        """The 16-bit one where a smaller one is made of it, else the result."""
        if self._is_quantized:
            return self._scratch_dir / "model.bf16.gguf"
        return self._output_dir / f"model.{self._type}.gguf"

    def _write_gguf(self, on_progress: Progress) -> None:
        self._files = hf_to_gguf.convert(
            self._merged_dir,
            self._gguf_file,
            type_="bf16" if self._is_quantized else self._type.value,
            model_name=self._task.model_name,
            converter_dir=self._converter_dir,
            on_progress=on_progress,
            max_part_bytes=None if self._is_quantized else self.spec.max_file_size_bytes,
        )

    def _compare_gguf(self, on_progress: Progress) -> None:
        """llama.cpp's reading of the file against the merged folder's."""
        [found] = self._compared(StreamedModel(self._merged_dir), [GgufModel(file=self._files[0])], on_progress)
        type_ = "bf16" if self._is_quantized else self._type.value
        self._judge(found, type_, budget=_READINGS[type_], name="gguf")

    def _compared(self, model: StreamedModel, candidates: Sequence[GgufModel], on_progress: Progress) -> list[Comparison]:
        """Each of `candidates` by llama.cpp against `model` by torch, on all texts."""
        sequences, file = self._texts.sequences, self._scratch_dir / "logits.npy"
        states = model.states(sequences, on_progress=lambda share: on_progress(share / 2))
        rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(self._texts.num_tokens, model.vocab_size))
        done = 0
        for state in states:
            rows[done : done + len(state)] = model.logits(state).numpy()
            done += len(state)
        rows.flush()
        found = [
            compare_with_logits(
                file,
                candidate,
                sequences,
                on_progress=lambda share, done=number: on_progress(0.5 + (done + share) / len(candidates) / 2),
                num_threads=_NUM_THREADS,
            )
            for number, candidate in enumerate(candidates)
        ]
        file.unlink()
        return found

    def _weigh(self, on_progress: Progress) -> None:
        texts = self._token_set(max_tokens=_IMPORTANCE_TOKENS)
        model = StreamedModel(self._merged_dir)
        names = importance.tensor_names(self._files[0], model.linear_names, converter_dir=self._converter_dir)
        collector = importance.ImportanceCollector(names)
        StreamedModel(self._merged_dir, observer=collector).states(texts.sequences, on_progress=on_progress)
        collector.save(self._importance_file, dataset=texts.source, chunk_size=max(map(len, texts.sequences)))
        self.report["importance_matrix"] = {"source": texts.source, "num_tokens": texts.num_tokens}

    @property
    def _importance_file(self) -> Path:
        return self._scratch_dir / "importance.gguf"

    def _quantize(self, on_progress: Progress) -> None:
        made = quantize.quantize(
            self._gguf_file,
            self._output_dir / f"model.{self._type}.gguf",
            type_=self._type.value,
            on_progress=on_progress,
            importance=self._importance_file if self._importance_file.exists() else None,
            max_part_bytes=self.spec.max_file_size_bytes,
        )
        self._files = made.files
        self.report["tensor_types"] = dict(made.type_counts)
        self.report["tensors_of_other_types"] = [asdict(item) for item in made.fallbacks]
        self.report["tensors_without_importance"] = list(made.without_importance)

    def _compare_quantized(self, on_progress: Progress) -> None:
        reference, candidate = GgufModel(file=self._gguf_file), GgufModel(file=self._files[0])
        found = compare(reference, candidate, self._texts.sequences, on_progress=on_progress, num_threads=_NUM_THREADS)
        self._judge(found, self._type.value, budget=parity.LOSSY[self._type.value], name="quantized")

    def _judge(self, found: Comparison, type_: str, *, budget: parity.LossyBudget, name: str) -> None:
        """Puts what was measured on record; raises NotTheSameModelError past the budget."""
        self.report[name] = {**asdict(found), "type": type_, "budget": asdict(budget)}
        failures = budget.failures(mean_kl=found.mean_kl, top1=found.top1_agreement)
        if failures:
            raise parity.NotTheSameModelError(
                f"The GGUF file ({type_}) does not say what its model says, and is not published: {'; '.join(failures)}."
            )

    def _write_modelfile(self, _: Progress) -> None:
        """For Ollama, where it can say the same; else why not."""
        header = ggufparts.read_header(self._files[0]).metadata
        try:
            made = make_modelfile(self._merged_dir, [file.name for file in self._files], adds_bos=adds_bos(header))
        except (UnimplementedError, InvalidArgumentError) as error:
            self.report["modelfile"] = {"is_written": False, "reason": error.message}
            return
        (self._output_dir / MODELFILE).write_text(made.text, encoding="utf-8")
        self.report["modelfile"] = {"is_written": True}


def cook(task: Task, on_report: Callable[[str, float], None]) -> None:
    """Does the whole task; `on_report` gets each step's name and the share of all work done. Raises FineryError.

    What was measured is in the report's file, of a conversion that failed as well.
    """
    recipe = Recipe(task)
    total, done = sum(step.weight for step in recipe.steps), 0.0
    try:
        for step in recipe.steps:
            on_report(step.name, done / total)
            step.run(lambda share, step=step, done=done: on_report(step.name, (done + step.weight * share) / total))
            done += step.weight
    except parity.NotTheSameModelError as error:
        if error.report is not None:
            recipe.report["parity"] = error.report.to_metadata()
        raise
    finally:
        # On a full disk the reason why the conversion failed is worth more.
        with contextlib.suppress(OSError):
            (Path(task.scratch_dir) / REPORT_FILE).write_text(json.dumps(_plain(recipe.report), allow_nan=False))


def _plain(value: object) -> object:
    """`value` as JSON can say it: NaN and infinities in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _check_room(needed_bytes: int, *, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise ResourceExhaustedError(
            f"The conversion needs {needed_bytes + _SPARE_BYTES:,} bytes of disk for its files and {free_bytes:,} are free at {folder}; "
            "free space there or move FINERY_STATE_DIR to a larger disk.",
            code="disk_full",
        )


def _vocab_size(folder: Path) -> int:
    """As config.json has it, of a model of several parts its text part's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"config.json of {folder.name} names no vocab_size: {error!r}") from error


def _name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
