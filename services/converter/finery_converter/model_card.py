"""The README.md of a pushed model: what it was made of, for people and for the Hub's filters.

Owns its text. It says only what is known; a folder or a repository that has a card of its own keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CARD_NAME = "README.md"
_MARK = "<!-- Written by Finery at each push. Take this line out to keep a text of your own. -->"


@dataclass(frozen=True)
class Lineage:
    """What a model was made of; what is not known is left out."""

    title: str
    manifest_sha256: str
    """Of the published artifact."""
    base_model: str
    """The catalogue's name."""
    base_model_hub_id: str = ""
    """`owner/name` on the Hub, where it comes from there."""
    base_model_sha256: str = ""
    license: str = ""
    format: str = "safetensors"
    type: str = "bf16"
    adapters: tuple[tuple[str, str], ...] = ()
    """Key and manifest digest of each adapter."""
    dataset: str = ""
    """Manifest digest of what it was trained on."""


def model_card(lineage: Lineage) -> str:
    """The card. The same lineage gives the same text."""
    from huggingface_hub import ModelCardData

    is_adapter, is_gguf = "adapter" in lineage.format, "gguf" in lineage.format
    head = ModelCardData(
        base_model=lineage.base_model_hub_id or None,
        base_model_relation=_relation(is_adapter=is_adapter, is_gguf=is_gguf) if lineage.base_model_hub_id else None,  # pyright: ignore[reportCallIssue]
        library_name="gguf" if is_gguf else "peft" if is_adapter else "transformers",
        license=lineage.license or None,
        tags=["finery"],
    ).to_yaml()
    rows = [
        ("Format", f"{lineage.format}, {lineage.type}"),
        ("Base model", _with_digest(lineage.base_model_hub_id or lineage.base_model, lineage.base_model_sha256)),
        *(("Adapter", _with_digest(key, digest)) for key, digest in lineage.adapters),
        *([("Dataset", f"`{lineage.dataset}`")] if lineage.dataset else []),
        ("Manifest (SHA-256)", f"`{lineage.manifest_sha256}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"---\n{head}\n---\n{_MARK}\n\n# {lineage.title}\n\n| Made of | |\n|---|---|\n{table}\n"


def is_ours(text: str) -> bool:
    """Whether a card was written here, and may be written anew."""
    return _MARK in text


def license_of(base_dir: Path) -> str:
    """The licence that a base model's card names; empty where there is none."""
    import yaml

    try:
        text = (base_dir / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    parts = text.split("---\n", 2) if text.startswith("---\n") else []
    try:
        head: object = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError:
        return ""
    said = head.get("license") if isinstance(head, dict) else None
    return said if isinstance(said, str) else ""


def _relation(*, is_adapter: bool, is_gguf: bool) -> str:
    return "adapter" if is_adapter else "quantized" if is_gguf else "finetune"


def _with_digest(name: str, digest: str) -> str:
    return f"{name}, `{digest}`" if digest else name
