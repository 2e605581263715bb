"""The files of a base model that dataprep reads: its tokenizer, its special tokens and its chat template.

Owns finding and checking them in a model folder; no model code runs and no weights are read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finery_common.errors import FailedPreconditionError


@dataclass(frozen=True)
class BaseTokenizer:
    """What encoding needs of a base model; plain data, so that a worker process can be told it."""

    model: str
    tokenizer_path: str
    template: str
    special_tokens: dict[str, str]
    """`bos_token` and the like, as templates name them."""
    tokenizer_sha256: str
    template_sha256: str


def read_base_tokenizer(folder: Path, *, model: str) -> BaseTokenizer:
    """Reads `folder`, the files of the base model `model`. Raises FailedPreconditionError that names what is missing."""
    tokenizer_path = folder / "tokenizer.json"
    tokenizer = _bytes(tokenizer_path, model)
    config = _json(folder / "tokenizer_config.json", model)
    template = _template(folder, config, model)
    special_tokens = _special_tokens(config)
    if (folder / "special_tokens_map.json").exists():
        special_tokens = _special_tokens(_json(folder / "special_tokens_map.json", model)) | special_tokens
    return BaseTokenizer(
        model=model,
        tokenizer_path=str(tokenizer_path),
        template=template,
        special_tokens=special_tokens,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
    )


def _template(folder: Path, config: dict[str, Any], model: str) -> str:
    path = folder / "chat_template.jinja"
    template = _bytes(path, model).decode() if path.exists() else config.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    if not isinstance(template, str):
        raise FailedPreconditionError(
            f"The base model {model} has no chat template (no chat_template.jinja, no default chat_template in tokenizer_config.json); "
            "take an instruction-tuned base model, or add a chat_template.jinja to its folder.",
            code="no_chat_template",
        )
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _json(path: Path, model: str) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(path, model))
    except ValueError as error:
        raise FailedPreconditionError(f"The base model {model}: {path.name} is not JSON: {error}.", code="invalid_base_model") from error
    if not isinstance(value, dict):
        raise FailedPreconditionError(f"The base model {model}: {path.name} is not a JSON object.", code="invalid_base_model")
    return value


def _bytes(path: Path, model: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPreconditionError(
            f"The base model {model}: cannot read {path.name}: {error.strerror}. A base model's folder needs tokenizer.json and "
            "tokenizer_config.json as `save_pretrained` of a fast tokenizer writes them.",
            code="invalid_base_model",
        ) from error
