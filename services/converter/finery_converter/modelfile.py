"""An Ollama Modelfile for a GGUF file.

Owns the file: its commands, stop tokens, parameters, and that `ollama create` reads back what was meant. Leaves the template and its
proof to `ollama_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.chat_rendering import ChatTemplate
from finery_converter.ollama_template import OllamaTemplate, ollama_template

# Ollama takes memory for all of it when a model is loaded.
MOST_CONTEXT = 8192
# generation_config.json's names, and Ollama's.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repeat_penalty"}
# Vocabularies to which llama.cpp adds the beginning-of-sequence token where the file does not say.
_ADDING_VOCABULARIES = ("llama",)
_ADDING_PRE_TOKENIZERS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")


@dataclass(frozen=True, kw_only=True)
class Modelfile:
    """`text` is the file, `template` what was proven of the template in it."""

    text: str
    template: OllamaTemplate


def make_modelfile(
    model_dir: Path, files: Sequence[str], *, adds_bos: bool, adapter: str | None = None, num_ctx: int | None = None
) -> Modelfile:
    """The Modelfile for the GGUF `files` (names as FROM gets them, relative to it) of the model in the folder `model_dir`.

    `adds_bos` is `adds_bos(header.metadata)` of the GGUF file. `adapter` is a GGUF adapter's name. `num_ctx` is by default the length that
    the model was made for, at most `MOST_CONTEXT`.

    Raises UnimplementedError (code `ollama_template_unequal`, with the reason) where no template of ours says what the model's does, or
    Ollama would not read the files; InvalidArgumentError for a model without a chat template.
    """
    if len(files) != 1:
        raise UnimplementedError(
            f"A Modelfile names one GGUF file, and there are {len(files)}; write it without parts for Ollama.", code="ollama_one_file"
        )
    template = ollama_template(ChatTemplate.read(model_dir), adds_bos=adds_bos)
    commands = [("FROM", f"./{files[0]}")]
    commands += [("ADAPTER", f"./{adapter}")] if adapter else []
    commands.append(("TEMPLATE", template.text))
    commands += [("SYSTEM", template.default_system)] if template.default_system else []
    commands += [("PARAMETER stop", token) for token in stop_tokens(model_dir, ends=template.ends)]
    commands += [(f"PARAMETER {name}", value) for name, value in _parameters(model_dir, num_ctx)]
    text = "".join(f"{name} {_quoted(value)}\n" for name, value in commands)
    read = [(name.upper() if name != "model" else "FROM", value) for name, value in parse_modelfile(text)]
    if read != [(name.removeprefix("PARAMETER ").upper(), value) for name, value in commands]:
        raise UnimplementedError(
            "Ollama's Modelfile can not hold this model's template: it drops characters that are not printed.",
            code="ollama_template_unequal",
        )
    return Modelfile(text=text, template=template)


def adds_bos(metadata: Mapping[str, object]) -> bool:
    """Whether llama.cpp puts the beginning-of-sequence token before a text, by a GGUF file's metadata."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    return metadata.get("tokenizer.ggml.model") in _ADDING_VOCABULARIES or metadata.get("tokenizer.ggml.pre") in _ADDING_PRE_TOKENIZERS


def stop_tokens(model_dir: Path, *, ends: str) -> list[str]:
    """The tokens that end an answer: those of the generation's and the tokenizer's configuration, and the special one in `ends`."""
    tokens = _special_tokens(model_dir)
    configured = _read(model_dir / "generation_config.json").get("eos_token_id", _read(model_dir / "config.json").get("eos_token_id"))
    ids = cast("list[int]", configured if isinstance(configured, list) else [configured])
    named = _read(model_dir / "tokenizer_config.json").get("eos_token")
    found = [tokens[token_id] for token_id in ids if token_id in tokens]
    found += [named["content"] if isinstance(named, dict) else named] if named else []
    begins = ends.lstrip()
    found += [token for token in sorted(tokens.values(), key=len, reverse=True) if begins.startswith(token)][:1]
    return list(dict.fromkeys(found))


def _special_tokens(model_dir: Path) -> dict[int, str]:
    added = _read(model_dir / "tokenizer.json").get("added_tokens", [])
    tokens = {int(token["id"]): str(token["content"]) for token in added if token.get("special")}
    decoder = _read(model_dir / "tokenizer_config.json").get("added_tokens_decoder", {})
    return {int(key): str(token["content"]) for key, token in decoder.items()} | tokens


def _parameters(model_dir: Path, num_ctx: int | None) -> list[tuple[str, str]]:
    config = _read(model_dir / "config.json")
    made_for = config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")
    context = num_ctx or (min(int(made_for), MOST_CONTEXT) if made_for else None)
    generation = _read(model_dir / "generation_config.json")
    sampling = [(name, f"{generation[key]:g}") for key, name in _SAMPLING.items() if generation.get(key) is not None]
    return [*([("num_ctx", str(context))] if context else []), *(sampling if generation.get("do_sample") else [])]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _quoted(value: str) -> str:
    if '"""' in value or value.endswith('"'):
        raise UnimplementedError("Ollama's Modelfile can not hold text with three quotes in a row.", code="ollama_template_unequal")
    return f'"""{value}"""' if "\n" in value or '"' in value or value != value.strip() or value.startswith("<") else value


# The rules by which `ollama create` reads a Modelfile (ollama: parser/parser.go, api/types.go).

_COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message", "requires",
)  # fmt: skip
PARAMETERS: Mapping[str, type] = {
    "num_keep": int, "seed": int, "num_predict": int, "top_k": int, "top_p": float, "min_p": float, "typical_p": float,
    "repeat_last_n": int, "temperature": float, "repeat_penalty": float, "presence_penalty": float, "frequency_penalty": float,
    "stop": str, "num_ctx": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "use_mmap": bool, "num_thread": int,
}  # fmt: skip
_QUOTES = '"""'


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(name, value) of each command, FROM as `model`, a parameter by its own name, as Ollama reads them.

    Raises InvalidArgumentError for what Ollama refuses.
    """
    commands: list[tuple[str, str]] = []
    position, line = 0, 1
    while position < len(text):
        character = text[position]
        if character in " \t\r\n":
            line += character == "\n"
            position += 1
        elif character == "#":
            position = _end_of_line(text, position)
        else:
            name, position = _word(text, position, line)
            if name == "parameter":
                name, position = _word(text, position, line)
                _check_parameter_name(name, line)
            elif name not in _COMMANDS:
                raise InvalidArgumentError(f"Modelfile, line {line}: {name!r} is no command; known are {', '.join(_COMMANDS)}.")
            value, position = _read_value(text, position, line)
            line += value.count("\n")
            _check_value(name, value, line)
            commands.append(("model" if name == "from" else name, value))
    if all(name != "model" for name, _ in commands):
        raise InvalidArgumentError("Modelfile: there is no FROM line.")
    return commands


def _word(text: str, position: int, line: int) -> tuple[str, int]:
    end = position
    while end < len(text) and (text[end].isascii() and (text[end].isalnum() or text[end] == "_")):
        end += 1
    if end == position or end == len(text) or text[end] not in " \t":
        raise InvalidArgumentError(f"Modelfile, line {line}: a name and white space are wanted at {text[position : position + 20]!r}.")
    return text[position:end].lower(), end + 1


def _read_value(text: str, position: int, line: int) -> tuple[str, int]:
    """A quoted value ends with its quotes and white space after them, another one with its line; what is not printed is dropped."""
    begin = position + len(text[position:]) - len(text[position:].lstrip(" \t"))
    quotes = _QUOTES if text.startswith(_QUOTES, begin) else '"' if text.startswith('"', begin) else ""
    if not quotes:
        end = _end_of_line(text, begin)
        return _printable(text[begin:end].strip()), end
    end = text.find(quotes, begin + len(quotes))
    while end >= 0 and end + len(quotes) < len(text) and text[end + len(quotes)] not in " \t\r\n":
        end = text.find(quotes, end + 1)
    if end < 0:
        raise InvalidArgumentError(f"Modelfile, line {line}: the quotes are not closed.")
    return _printable(text[begin + len(quotes) : end]), end + len(quotes)


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable() or character in " \t\r\n")


def _end_of_line(text: str, position: int) -> int:
    return min(place for place in (text.find("\n", position), text.find("\r", position), len(text)) if place >= 0)


def _check_parameter_name(name: str, line: int) -> None:
    if name not in PARAMETERS:
        raise InvalidArgumentError(f"Modelfile, line {line}: {name!r} is no parameter; known are {', '.join(PARAMETERS)}.")


def _check_value(name: str, value: str, line: int) -> None:
    kind = PARAMETERS.get(name, str)
    try:
        if kind in (int, float):
            kind(value)
    except ValueError as error:
        raise InvalidArgumentError(f"Modelfile, line {line}: {name} wants a number, got {value!r}.") from error
