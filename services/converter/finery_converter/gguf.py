"""A Hugging Face folder as one GGUF file, by llama.cpp's own converter.

Owns running that program and putting its failures into words. It runs in a process of its own because it carries its own `gguf`
module, which must not meet the one in this environment. Leaves merging to `merge`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from finery_common.conversion_spec import OutputType
from finery_common.errors import FailedPreconditionError, InternalError, ResourceExhaustedError, UnimplementedError
from finery_common.leash import leashed

SCRIPT = "convert_hf_to_gguf.py"
_PROGRESS = re.compile(r"^Writing:\s+(\d+)%")
_UNSUPPORTED = re.compile(r"Model (\S+) is not supported")
_KEPT_LINES = 30
_SHOWN_ARCHITECTURES = 400


def check_supported(model_dir: Path, *, converter_dir: Path, scratch_dir: Path) -> None:
    """Lets the converter read configuration and tokenizer of `model_dir`, which takes seconds and tells what it does not know.

    Raises UnimplementedError for an architecture or a tokenizer that GGUF lacks, FailedPreconditionError without the converter.
    """
    vocabulary = scratch_dir / "vocabulary.gguf"
    _run(["--vocab-only", "--outfile", str(vocabulary), str(model_dir)], converter_dir=converter_dir, on_progress=lambda _: None)
    vocabulary.unlink()


def convert(
    model_dir: Path, output_file: Path, *, type_: OutputType, model_name: str, converter_dir: Path, on_progress: Callable[[float], None]
) -> None:
    """Writes `model_dir` as `output_file`, its matrices as `type_`, its vectors as f32; `on_progress` gets the share done.

    Raises as `check_supported`, and ResourceExhaustedError where the disk fills up.
    """
    arguments = ["--outtype", type_.value, "--model-name", model_name, "--outfile", str(output_file), str(model_dir)]
    _run(arguments, converter_dir=converter_dir, on_progress=on_progress)
    if not output_file.is_file():
        raise InternalError(f"The GGUF converter ended well but wrote no {output_file.name}.")


def _run(arguments: list[str], *, converter_dir: Path, on_progress: Callable[[float], None]) -> None:
    if not (converter_dir / SCRIPT).is_file():
        raise FailedPreconditionError(
            f"FINERY_CONVERT_HF_TO_GGUF: {converter_dir} has no {SCRIPT}; run `make setup`, which installs it there.",
            code="gguf_converter_missing",
        )
    process = subprocess.Popen(
        leashed([sys.executable, str(converter_dir / SCRIPT), *arguments]),
        env=_environment(converter_dir),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with process:
        for line in _lines(process.stderr):
            progress = _PROGRESS.match(line)
            if progress:
                on_progress(int(progress[1]) / 100)
            elif line.strip():
                kept.append(line)
    if process.returncode != 0:
        raise _failure("\n".join(kept), process.returncode, converter_dir)


def _environment(converter_dir: Path) -> dict[str, str]:
    """Its folder comes first on the path, so that it finds the `gguf` it was made with; and it never asks the network."""
    path = os.pathsep.join(filter(None, [str(converter_dir), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come; a progress bar ends its own with a carriage return."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        *lines, pending = re.split(rb"[\r\n]+", pending + chunk)
        yield from (line.decode(errors="replace") for line in lines)
    if pending:
        yield pending.decode(errors="replace")


def _failure(text: str, returncode: int, converter_dir: Path) -> Exception:
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
