"""OpenAI's lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def page(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A cursor page: the client asks for the next one with `after` = the last id."""
    return {
        "object": "list",
        "data": list(items),
        "has_more": has_more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }
