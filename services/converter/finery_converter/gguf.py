"""Hugging Face folders as GGUF files of 8 bits and more, and LoRA adapters as GGUF adapters, by llama.cpp's own converters.

Owns running those programs and putting their failures into words. They run in processes of their own because they carry their own `gguf`
module, which must not meet the one in this environment. Leaves merging to `merge`, smaller types to `quantize`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from finery_common.errors import (
    FailedPreconditionError,
    FineryError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnimplementedError,
)
from finery_common.leash import leashed
from finery_converter.tensorfiles import file_too_small

SCRIPT = "convert_hf_to_gguf.py"
LORA_SCRIPT = "convert_lora_to_gguf.py"
# What the converter itself writes; smaller types are made from these by `quantize`.
TYPES = ("f32", "f16", "bf16", "q8_0")
_PROGRESS = re.compile(r"^Writing:\s+(\d+)%")
_UNSUPPORTED = re.compile(r"Model (\S+) is not supported")
_KEPT_LINES = 30
_SHOWN_ARCHITECTURES = 400


def check_supported(model_dir: Path, *, converter_dir: Path, scratch_dir: Path) -> int:
    """Lets the converter read configuration and tokenizer of `model_dir`, which takes seconds and tells what it does not know; answers the
    bytes that a file has beside tensors.

    Raises UnimplementedError for an architecture or a tokenizer that GGUF lacks, FailedPreconditionError without the converter.
    """
    vocabulary = scratch_dir / "vocabulary.gguf"
    _run(SCRIPT, ["--vocab-only", "--outfile", str(vocabulary), str(model_dir)], converter_dir=converter_dir, on_progress=lambda _: None)
    size_bytes = vocabulary.stat().st_size
    vocabulary.unlink()
    return size_bytes


def convert(
    model_dir: Path,
    output_file: Path,
    *,
    type_: str,
    model_name: str,
    converter_dir: Path,
    on_progress: Callable[[float], None],
    max_part_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Writes `model_dir` as `output_file`, its matrices as `type_` (one of `TYPES`), its vectors as f32; answers the files in order.

    With `max_part_bytes` a larger model becomes NAME-00001-of-0000N.gguf beside it. `on_progress` gets the share done. Raises as
    `check_supported`, ResourceExhaustedError where the disk fills up, InvalidArgumentError where a tensor is larger than a part may be.
    """
    arguments = ["--outtype", type_, "--model-name", model_name, "--outfile", str(output_file), str(model_dir)]
    if max_part_bytes is not None:
        arguments += ["--split-max-size", str(max(1, max_part_bytes - _header_bytes(model_dir)))]
    _run(SCRIPT, arguments, converter_dir=converter_dir, on_progress=on_progress)
    files = (output_file,) if output_file.is_file() else tuple(sorted(output_file.parent.glob(f"{output_file.stem}-?????-of-?????.gguf")))
    if not files:
        raise InternalError(f"The GGUF converter ended well but wrote no {output_file.name}.")
    largest = max(file.stat().st_size for file in files)
    if max_part_bytes is not None and largest > max_part_bytes:
        raise file_too_small(max_part_bytes, "a single tensor of this model", least_bytes=largest)
    return files


def convert_lora(
    adapter_dir: Path,
    base_dir: Path,
    output_file: Path,
    *,
    converter_dir: Path,
    on_progress: Callable[[float], None],
    type_: str = "f32",
) -> None:
    """Writes the LoRA adapter in `adapter_dir` (PEFT's files) as a GGUF adapter, which llama.cpp puts on top of the base's GGUF file.

    `base_dir` needs its configuration and tokenizer. Scales that GGUF has no place for (rsLoRA, ranks or alphas of single modules) go into
    the matrices. Raises as `check_lora` and `convert`.
    """
    config = check_lora(adapter_dir)
    with TemporaryDirectory(dir=output_file.parent) as scratch:
        source = _with_plain_scale(adapter_dir, config, Path(scratch)) if _has_own_scales(config) else adapter_dir
        arguments = ["--base", str(base_dir), "--outtype", type_, "--outfile", str(output_file), str(source)]
        _run(LORA_SCRIPT, arguments, converter_dir=converter_dir, on_progress=on_progress)
    if not output_file.is_file():
        raise InternalError(f"The GGUF adapter converter ended well but wrote no {output_file.name}.")


def check_lora(adapter_dir: Path) -> dict[str, Any]:
    """Its configuration. Raises InvalidArgumentError for what a GGUF adapter can not hold: DoRA, biases, whole modules."""
    config: dict[str, Any] = json.loads((adapter_dir / "adapter_config.json").read_text())
    kept = ("peft_type", "use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "fan_in_fan_out")
    plain = {"peft_type": ("LORA",), "bias": ("none", None)}
    bad = {key: config.get(key) for key in kept if config.get(key) not in plain.get(key, (None, False, [], {}))}
    if bad:
        said = ", ".join(f"{key}: {value}" for key, value in bad.items())
        raise InvalidArgumentError(
            f"A GGUF adapter holds plain LoRA matrices only, and this one has {said}; merge it into its base instead.",
            code="gguf_adapter_unsupported",
        )
    return config


def _has_own_scales(config: Mapping[str, object]) -> bool:
    return any(bool(config.get(key)) for key in ("use_rslora", "rank_pattern", "alpha_pattern"))


def _with_plain_scale(adapter_dir: Path, config: dict[str, Any], folder: Path) -> Path:
    """The same adapter in `folder`, its matrices such that lora_alpha / rank is each module's whole scale."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    for name, matrix in tensors.items():
        module, is_b, _ = name.partition(".lora_B")
        if is_b:
            rank = matrix.shape[1]
            alpha = _of_module(module, config.get("alpha_pattern") or {}, default=config["lora_alpha"])
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            tensors[name] = matrix * (scale * rank / config["lora_alpha"])
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {**config, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return folder


def _of_module(module: str, pattern: Mapping[str, float], *, default: float) -> float:
    """PEFT's rule: a pattern names a module whose name ends with it, after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _header_bytes(model_dir: Path) -> int:
    """At most what a GGUF file holds beside tensors: tokenizer and chat template, which its strings and numbers do not take twice."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "tokenizer_config.json")
    return 1024 * 1024 + 2 * sum((model_dir / name).stat().st_size for name in names if (model_dir / name).is_file())


def _run(script: str, arguments: list[str], *, converter_dir: Path, on_progress: Callable[[float], None]) -> None:
    if not (converter_dir / script).is_file():
        raise FailedPreconditionError(
            f"FINERY_CONVERT_HF_TO_GGUF: {converter_dir} has no {script}; run `make setup`, which installs it there.",
            code="gguf_converter_missing",
        )
    process = subprocess.Popen(
        leashed([sys.executable, str(converter_dir / script), *arguments]),
        env=_environment(converter_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with process:
        try:
            for line in _lines(process.stderr):
                progress = _PROGRESS.match(line)
                if progress:
                    on_progress(int(progress[1]) / 100)
                elif line.strip():
                    kept.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _failure("\n".join(kept), process.returncode, converter_dir)


def _environment(converter_dir: Path) -> dict[str, str]:
    """Its folders come first on the path, so that it finds the `gguf` it was made with; and it never asks the network."""
    path = os.pathsep.join(filter(None, [str(converter_dir), str(converter_dir / "gguf-py"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come; a progress bar ends its own with a carriage return."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        *lines, pending = re.split(rb"[\r\n]+", pending + chunk)
        yield from (line.decode(errors="replace") for line in lines)
    if pending:
        yield pending.decode(errors="replace")


def _failure(text: str, returncode: int, converter_dir: Path) -> FineryError:
    unsupported = _UNSUPPORTED.search(text)
    if unsupported:
        return UnimplementedError(
            f"GGUF has no form of the architecture {unsupported[1]}. Known are: {_known_architectures(converter_dir)}.",
            code="gguf_unsupported_architecture",
        )
    if "BPE pre-tokenizer was not recognized" in text:
        return UnimplementedError(
            "GGUF does not know this model's tokenizer (its BPE pre-tokenizer was not recognised).", code="gguf_unsupported_tokenizer"
        )
    if "No space left on device" in text:
        return ResourceExhaustedError("The disk filled up while the GGUF file was written; free space and convert again.", code="disk_full")
    last = text.strip().rsplit("\n", 1)[-1]
    return InternalError(f"The GGUF converter failed (exit status {returncode}): {last[:500]}", code="gguf_conversion_failed")


def _known_architectures(converter_dir: Path) -> str:
    command = [sys.executable, str(converter_dir / SCRIPT), "--print-supported-models"]
    printed = subprocess.run(leashed(command), env=_environment(converter_dir), capture_output=True, text=True, check=False).stderr
    names = sorted(set(re.findall(r"^\s+- (\w+ForCausalLM)$", printed, flags=re.MULTILINE)))
    return ", ".join(names[:_SHOWN_ARCHITECTURES]) or "not to be had"
