"""Which of vLLM's parsers reads a model's tool calls.

A chat template says how a model writes them; vLLM wants to be told by name. Where a template has no place for tools the model would never
see them, so tools are off there.
"""

from __future__ import annotations

import json
from pathlib import Path

AUTO = "auto"
OFF = "off"
# What a template writes, most telling first: Qwen3-Coder's form also has Hermes' tag.
_MARKS = (("<function=", "qwen3_coder"), ("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("ipython", "llama3_json"))


def tool_call_parser(setting: str, *, base_model_dir: Path) -> str:
    """The parser's name for `--tool-call-parser`, or nothing where tools are off. `setting` is `auto`, `off` or a name."""
    if setting != AUTO:
        return "" if setting == OFF else setting
    template = _chat_template(base_model_dir)
    if "tools" not in template:
        return ""
    return next((name for mark, name in _MARKS if mark in template), "")


def _chat_template(folder: Path) -> str:
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return own_file.read_text()
    config_file = folder / "tokenizer_config.json"
    template = json.loads(config_file.read_text()).get("chat_template") if config_file.exists() else None
    if isinstance(template, list):
        # Named templates; the one for tools is what vLLM takes when there are any.
        named = {item["name"]: item["template"] for item in template}
        return str(named.get("tool_use", named.get("default", "")))
    return template or ""
