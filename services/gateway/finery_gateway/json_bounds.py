"""How large a piece of JSON may be that the model is to keep to: a schema of an answer, or of a tool's arguments.

vLLM compiles it into a grammar, on the engine's time. So its size, its depth and its counts are bounded, and it refers to nothing outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 32
"""Objects and arrays inside each other."""
MAX_COUNT = 1024
"""The largest number of items, characters or properties that a schema may ask for."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains", "maxContains")


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
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError(f"$ref: got {reference[:80]!r}, wanted a place within the schema, such as #/$defs/name")


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
