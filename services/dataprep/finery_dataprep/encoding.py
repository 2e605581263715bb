"""From checked messages to token ids and a label mask, for one base model.

Owns finding the assistant's turns exactly, in templates that do not mark them:

1. The conversation is rendered as it is, and once more with every text replaced by a random word between two EM SPACEs. In the
   second rendering the words show where each text lies, and the missing EM SPACEs whether the template trimmed it.
2. Putting the texts back must give the first rendering, character for character. Where it does not (a template that rewrites what it
   is given), the row is an error: nothing is guessed.
3. A turn's labels reach from the end of the generation prompt, where the model takes over, to the end-of-turn token, both found once per
   template. A turn with tool calls, whose text the template makes up, is found by rendering the conversation up to it instead.
4. The text is tokenized as a whole, as at inference. Where a token would straddle the start of a turn (a content that begins with
   a newline after a header that ends with one), the text is cut there, since at inference the prompt ends there as well.

A text that holds one of the tokenizer's special tokens is an error that names the field: at inference it would be read as the token,
so training on it would let a text forge turns. The sequence of special tokens must also be that of the second rendering, so none can
be put together from a text and its surroundings. Markers that a template writes as plain words, not special tokens, cannot be told from
the same words in a text, by the model as by anybody; they never move the labels.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from finery_dataprep.base_tokenizer import BaseTokenizer
from finery_dataprep.chat_template import ChatTemplate, RefusedByTemplate, TemplateError
from finery_dataprep.rows import Message, Row, RowError

_PAD = "\u2003"


@dataclass(frozen=True)
class EncodedRow:
    """One row; both arrays are 1-D of the row's length in tokens."""

    input_ids: NDArray[np.int32]
    label_mask: NDArray[np.uint8]
    """1 where that token is a label."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


class RowEncoder:
    """Encodes rows for one base model. `now` is what its template may tell as the present time."""

    def __init__(self, base: BaseTokenizer, *, max_sequence_length: int, now: datetime) -> None:
        """Raises TemplateError where the template cannot be used for training."""
        self._model = base.model
        self._max_sequence_length = max_sequence_length
        self._tokenizer, special, unknown_id = _plain_tokenizer(Path(base.tokenizer_path))
        # The unknown token may stand for any character; it opens and closes nothing.
        self._special_ids = np.array(sorted(special.keys() - {unknown_id}), dtype=np.int32)
        # Longest first: one special token may begin with another.
        self._special = re.compile("|".join(re.escape(text) for text in sorted(special.values(), key=len, reverse=True)) or r"(?!)")
        self._template = ChatTemplate(base.template, special_tokens=base.special_tokens, now=now)
        self._turn_gap, self._turn_end = self._probe_turn()

    def encode(self, row: Row) -> EncodedRow:
        """Token ids and label mask of `row`. Raises RowError, and TemplateError where a limit of the sandbox is hit."""
        self._refuse_special_tokens(row)
        text = self._render(row)
        probe, spans_by_message = self._spans(row, text)
        spans = [
            self._tool_call_span(row, index, text) if message.tool_calls else self._turn_span(text, spans_by_message[index])
            for index, message in enumerate(row.messages)
            if message.has_loss
        ]
        self._check_tools(row, text)
        input_ids, offsets = self._tokenize(text, cuts=[span.start for span in spans])
        if not np.array_equal(self._specials_of(input_ids), self._specials_of(self._tokenize(probe, cuts=[])[0])):
            raise RowError(
                "messages", f"together with the chat template a text forms a control token of {self._model}; rewrite its start or end"
            )
        if len(input_ids) > self._max_sequence_length:
            raise RowError(
                "row",
                f"{len(input_ids)} tokens, wanted at most {self._max_sequence_length} (max_sequence_length); shorten it or raise the limit",
            )
        return EncodedRow(input_ids, _mask(offsets, spans))

    def _refuse_special_tokens(self, row: Row) -> None:
        for field, text in row.strings():
            found = self._special.search(text)
            if found:
                raise RowError(
                    field,
                    f"character {found.start() + 1} begins {found.group()!r}, a control token of {self._model}; remove or rewrite it",
                )

    def _render(self, row: Row, *, add_generation_prompt: bool = False) -> str:
        messages = [_template_message(message) for message in row.messages]
        try:
            return self._template.render(messages, tools=row.tools, add_generation_prompt=add_generation_prompt)
        except RefusedByTemplate as error:
            raise RowError("messages", f"the chat template of {self._model} refuses the row: {error}") from None

    def _spans(self, row: Row, text: str) -> tuple[str, dict[int, _Span]]:
        """The rendering with words for texts, and where the content of each assistant message lies in `text`."""
        word = _unused_word(row)
        probe = self._render(replace(row, messages=tuple(_hidden(message, f"{word}{index}") for index, message in enumerate(row.messages))))
        pieces: list[str] = []
        size = end = 0
        found: dict[tuple[int, str], list[_Span]] = {}
        for match in re.finditer(f"({_PAD}?){word}([0-9]+)([cn])z({_PAD}?)", probe):
            index, kind = int(match[2]), match[3]
            content = _restored(row.messages[index], kind, trimmed_left=not match[1], trimmed_right=not match[4])
            pieces += [probe[end : match.start()], content]
            size += match.start() - end + len(content)
            found.setdefault((index, kind), []).append(_Span(size - len(content), size))
            end = match.end()
        if "".join([*pieces, probe[end:]]) != text:
            raise RowError(
                "messages",
                f"the chat template of {self._model} rewrites a text of this row, so the assistant's part cannot be told exactly",
            )
        self._check_all_rendered(row, found)
        return probe, {index: spans[0] for (index, kind), spans in found.items() if kind == "c"}

    def _check_all_rendered(self, row: Row, found: dict[tuple[int, str], list[_Span]]) -> None:
        for index, message in enumerate(row.messages):
            if message.name is not None and (index, "n") not in found:
                raise RowError(f"messages.{index}.name", f"the chat template of {self._model} has no place for names; remove it")
            count = len(found.get((index, "c"), ()))
            if message.tool_calls and not message.content:
                continue
            if count == 0:
                raise RowError(f"messages.{index}", f"the chat template of {self._model} leaves this {message.role} message out; remove it")
            if count > 1 and message.has_loss:
                raise RowError(
                    f"messages.{index}", f"the chat template of {self._model} writes this assistant message {count} times, wanted once"
                )

    def _turn_span(self, text: str, content: _Span) -> _Span:
        gap = len(self._turn_gap) if text.endswith(self._turn_gap, 0, content.start) else 0
        if not text.startswith(self._turn_end, content.end):
            raise _unusable(self._model, "it does not end every assistant message alike")
        return _Span(content.start - gap, content.end + len(self._turn_end))

    def _tool_call_span(self, row: Row, index: int, text: str) -> _Span:
        before = self._render(replace(row, messages=row.messages[:index]), add_generation_prompt=True)
        through = self._render(replace(row, messages=row.messages[: index + 1]))
        through = through[: through.rfind(self._turn_end) + len(self._turn_end)]
        turn = through[len(before) :]
        if not text.startswith(through) or not through.startswith(before) or not turn.endswith(self._turn_end):
            raise RowError(f"messages.{index}.tool_calls", f"the chat template of {self._model} does not allow telling this turn exactly")
        if any(call.name not in turn for call in row.messages[index].tool_calls):
            raise RowError(
                f"messages.{index}.tool_calls", f"the chat template of {self._model} has no place for tool calls; remove the row"
            )
        return _Span(len(before), len(through))

    def _check_tools(self, row: Row, text: str) -> None:
        for number, tool in enumerate(row.tools):
            function = tool["function"]
            if isinstance(function, dict) and str(function["name"]) not in text:
                raise RowError(f"tools.{number}", f"the chat template of {self._model} has no place for tools; remove them")

    def _tokenize(self, text: str, *, cuts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids and (start, end) character offsets, of shapes (n,) and (n, 2)."""
        whole_ids, whole_offsets = self._encode(text, at=0)
        straddled = [cut for cut in cuts if ((whole_offsets[:, 0] < cut) & (whole_offsets[:, 1] > cut)).any()]
        if not straddled:
            return whole_ids, whole_offsets
        bounds = [0, *straddled, len(text)]
        parts = [self._encode(text[start:end], at=start) for start, end in pairwise(bounds)]
        ids = np.concatenate([part[0] for part in parts])
        # A tokenizer that puts a space before whatever it is given cannot be cut: there the space stays with the turn's first token.
        if self._tokenizer.decode(ids.tolist(), skip_special_tokens=False) != self._tokenizer.decode(
            whole_ids.tolist(), skip_special_tokens=False
        ):
            return whole_ids, whole_offsets
        return ids, np.concatenate([part[1] for part in parts])

    def _encode(self, text: str, *, at: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + at

    def _specials_of(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return ids[np.isin(ids, self._special_ids)]

    def _probe_turn(self) -> tuple[str, str]:
        """The whitespace that the model itself writes before a content, and the text through the end-of-turn token after it."""
        user, assistant = Message("user", "Question"), Message("assistant", f"answer{secrets.token_hex(8)}", has_loss=True)
        try:
            text = self._render(Row((user, assistant)))
            prompt = self._render(Row((user,)), add_generation_prompt=True)
        except RowError as error:
            raise _unusable(self._model, error.description) from error
        start = text.find(assistant.content)
        end = re.compile(rf"\s*(?:{self._special.pattern})").match(text, start + len(assistant.content))
        if start < 0 or end is None:
            raise _unusable(self._model, "it writes no special token after an assistant message, so a model could not learn to stop")
        gap = text[len(prompt) : start] if text.startswith(prompt) else ""
        return gap if gap.isspace() else "", end.group()


def _plain_tokenizer(path: Path) -> tuple[Tokenizer, dict[int, str], int | None]:
    """The tokenizer without post-processing, which would trim offsets, its special tokens by id, and the id for what it does not know."""
    fields = json.loads(path.read_text())
    fields |= {"post_processor": None, "truncation": None, "padding": None}
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    special = {int(token["id"]): str(token["content"]) for token in fields["added_tokens"] if token["special"]}
    model = fields["model"]
    unknown_id = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    return tokenizer, special, unknown_id


def _unusable(model: str, reason: str) -> TemplateError:
    return TemplateError("chat_template_not_supported", f"The chat template of {model} cannot be used for training: {reason}.")


def _template_message(message: Message) -> dict[str, object]:
    fields: dict[str, object] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls
        ]
    return fields


def _unused_word(row: Row) -> str:
    texts = [text for _, text in row.strings()]
    while True:
        word = f"q{secrets.token_hex(8)}q"
        if not any(word in text for text in texts):
            return word


def _hidden(message: Message, word: str) -> Message:
    keep_empty = bool(message.tool_calls) and not message.content
    return replace(
        message,
        content="" if keep_empty else f"{_PAD}{word}cz{_PAD}",
        name=None if message.name is None else f"{word}nz",
    )


def _restored(message: Message, kind: str, *, trimmed_left: bool, trimmed_right: bool) -> str:
    if kind == "n":
        return message.name or ""
    content = message.content.lstrip() if trimmed_left else message.content
    return content.rstrip() if trimmed_right else content


def _mask(offsets_N2: NDArray[np.int64], spans: Sequence[_Span]) -> NDArray[np.uint8]:
    starts, ends = offsets_N2[:, 0], offsets_N2[:, 1]
    mask = np.zeros(len(starts), dtype=np.uint8)
    for span in spans:
        mask |= ((starts >= span.start) & (starts < span.end)) | ((starts < span.start) & (ends > span.start))
    return mask
