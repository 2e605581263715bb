"""The forms that text fields have, by pattern for a machine and in words for people."""

from __future__ import annotations

import re

_WORDS: dict[str, str] = {}
_PYDANTICS = re.compile(r"String should match pattern '(.*)'$")


def text_form(pattern: str, words: str) -> str:
    """`pattern`, which errors name by `words`."""
    _WORDS[pattern] = words
    return pattern


def in_words(message: str) -> str:
    """Pydantic's message on a text of another form, with what was wanted in words where they are known."""
    return _PYDANTICS.sub(lambda match: f"wanted {_WORDS.get(match[1], f'text that matches {match[1]}')}", message)


JOB_ID = text_form(r"^ftjob-[0-9a-f]{24}$", "a job's id: ftjob- and 24 hexadecimal digits")
FILE_ID = text_form(r"^file-[0-9a-f]{24}$", "a file's id: file- and 24 hexadecimal digits")
