"""Errors of the operations."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """An input that the operation does not take: the message names the tensor, what was got and what is wanted."""
