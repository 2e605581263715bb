"""Making base models' folders: a GGUF file becomes a Hugging Face folder that trains and serves.

    python -m finery_trainer.base_models import-gguf MODEL.gguf OUT_DIR

Which base models there are is the catalogue's (`finery_common.catalogue`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from finery_common.errors import AlreadyExistsError, FineryError, InvalidArgumentError


def import_gguf(gguf: Path, *, out_dir: Path) -> None:
    """Writes the model in `gguf` to the new folder `out_dir`: float32 safetensors, tokenizer with chat template, generation config.

    The folder appears at once and whole. Raises InvalidArgumentError for a file that is no GGUF of a known family, AlreadyExistsError
    where `out_dir` exists.
    """
    if not gguf.is_file():
        raise InvalidArgumentError(f"{gguf}: there is no such file.")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InvalidArgumentError(f"{gguf}: got a file that begins with {magic!r}, wanted a GGUF file.")
    if out_dir.exists():
        raise AlreadyExistsError(f"{out_dir} exists; remove it or choose another folder.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _convert(gguf, staging)
        staging.chmod(0o755)
        staging.rename(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; answers its exit status."""
    parser = argparse.ArgumentParser(prog="python -m finery_trainer.base_models", description="Makes base models' folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import-gguf", help="turn a GGUF file into a Hugging Face folder")
    command.add_argument("gguf", type=Path)
    command.add_argument("out_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        import_gguf(options.gguf, out_dir=options.out_dir)
    except FineryError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(f"{gguf}: cannot be read as a causal language model: {error}") from error
    if not tokenizer.chat_template:
        raise InvalidArgumentError(f"{gguf}: its tokenizer has no chat template; import an instruct model.")
    vars(model.config).pop("quantization_config", None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
