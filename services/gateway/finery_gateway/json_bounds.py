"""How large a piece of JSON may be that the model is to keep to: a schema of an answer, or of a tool's arguments.

vLLM compiles it into a grammar, on the engine's time. So its size, its depth and its counts are bounded, and it refers to nothing outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 32
"""Objects and arrays inside each other."""
MAX_COUNT = 1024
"""The largest number of items, characters, properties or repetitions that a schema may ask for."""
MAX_PATTERN_LENGTH = 2048
"""Characters of a regular expression, each counted as often as it is to be repeated."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains")
# An escape, a class, a repetition, or one character.
_REGEX = re.compile(r"\\.|\[(?:\\.|[^\]\\])*+\]?|(?P<repetition>[*+?]|\{(?P<least>[0-9]*)(?:,(?P<most>[0-9]*))?\})|.", re.DOTALL)


def check_size(value: Any, *, limit_bytes: int) -> None:
    """Raises ValueError where `value` is larger than `limit_bytes` as JSON."""
    size_bytes = len(json.dumps(value))
    if size_bytes > limit_bytes:
        raise ValueError(f"got {size_bytes} bytes of JSON, wanted at most {limit_bytes}")


def check_schema(schema: dict[str, Any], *, limit_bytes: int) -> None:
    """Raises ValueError that says what of a JSON schema is over its bounds."""
    check_size(schema, limit_bytes=limit_bytes)
    for node, depth in _objects(schema):
        if depth > MAX_DEPTH:
            raise ValueError(f"got a schema deeper than {MAX_DEPTH} levels; flatten it")
        for name in _COUNTS:
            count = node.get(name)
            if isinstance(count, int | float) and count > MAX_COUNT:
                raise ValueError(f"{name}: got {count}, wanted at most {MAX_COUNT}")
        for name, pattern in _patterns(node):
            _check_pattern(pattern, name=name)
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError(f"$ref: got {reference[:80]!r}, wanted a place within the schema, such as #/$defs/name")


def _patterns(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions of a schema, each with the name of what it is."""
    if isinstance(node.get("pattern"), str):
        yield "pattern", node["pattern"]
    by_pattern = node.get("patternProperties")
    for pattern in by_pattern if isinstance(by_pattern, dict) else ():
        yield "patternProperties", pattern


def _check_pattern(pattern: str, *, name: str) -> None:
    """An automaton is as large as what it repeats, written out; and one repetition may stand in another."""
    # Of each open group what it has so far, the pattern itself first.
    lengths, last = [0], 0
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"{name}: got {len(pattern)} characters, wanted at most {MAX_PATTERN_LENGTH}")
    for token in _REGEX.finditer(pattern):
        if token["repetition"]:
            count = max(int(token["least"] or 1), int(token["most"] or 1))
            if count > MAX_COUNT:
                raise ValueError(f"{name}: got the repetition {token[0][:40]}, wanted at most {MAX_COUNT}")
            lengths[-1] += last * (count - 1)
            last *= count
        elif token[0] == "(":
            lengths.append(0)
        else:
            last = lengths.pop() if token[0] == ")" and len(lengths) > 1 else 1
            lengths[-1] += last
        if len(lengths) > MAX_DEPTH:
            raise ValueError(f"{name}: got groups deeper than {MAX_DEPTH} levels, wanted a flatter one")
    if sum(lengths) > MAX_PATTERN_LENGTH:
        raise ValueError(f"{name}: got {sum(lengths)} characters with all repetitions written out, wanted at most {MAX_PATTERN_LENGTH}")


def _objects(value: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Every object in `value` with its depth; not by recursion, since depth is what is to be judged."""
    left: list[tuple[Any, int]] = [(value, 1)]
    while left:
        node, depth = left.pop()
        if isinstance(node, dict):
            yield node, depth
            left += [(item, depth + 1) for item in node.values()]
        elif isinstance(node, list | tuple):
            if depth > MAX_DEPTH:
                yield {}, depth
            left += [(item, depth + 1) for item in node]
