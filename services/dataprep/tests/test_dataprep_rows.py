"""What is said about rows and lines that are not as they should be."""

import json

import pytest

from finery_dataprep import lines
from finery_dataprep.lines import count_lines, read_batches
from finery_dataprep.rows import Message, RowError, parse_pair, parse_row

GOOD = b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        (b"hello", "row", "not JSON"),
        (b'{"messages": [', "row", "not JSON"),
        (b"", "row", "blank"),
        (b'[{"messages": []}]', "row", "got a list, wanted an object; a JSON array"),
        (b'"text"', "row", "got a string, wanted an object"),
        (b"null", "row", "got null"),
        (b'{"prompt": "\xff"}', "row", "byte 13 of the line is 0xff, which is not UTF-8"),
        (b'{"text": "x"}', "row", 'got the keys text, wanted "messages", or "prompt" and "completion"'),
        (b"{}", "row", "got the keys none"),
        (b'{"prompt": "p"}', "completion", "missing, wanted a string"),
        (b'{"prompt": 1, "completion": "c"}', "prompt", "got a number, wanted a string"),
        (b'{"prompt": "p", "completion": "c", "id": 1}', "id", "unknown key, known are prompt, completion"),
        (b'{"messages": [], "extra": 1}', "extra", "unknown key"),
        (b'{"messages": []}', "messages", "empty list"),
        (b'{"messages": {}}', "messages", "got an object, wanted a list"),
        (b'{"messages": ["hi"]}', "messages.0", "got a string, wanted an object"),
        (b'{"messages": [{"content": "x"}]}', "messages.0.role", "missing"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "messages.0.role", "got 'bot', wanted one of system, user, assistant, tool"),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}', "messages.0.content", "got a list, wanted a string"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "messages.0.content", "got null, wanted a string"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "messages.0.content", "got an empty text, wanted an answer"),
        (b'{"prompt": "p", "completion": ""}', "completion", "wanted an answer"),
        (b'{"messages": [{"role": "user", "content": "x", "weight": 1}]}', "messages.0.weight", "unknown key"),
        (b'{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}', "messages.0.weight", "got 2, wanted 0 or 1"),
        (b'{"messages": [{"role": "assistant", "content": "x", "weight": true}]}', "messages.0.weight", "wanted 0 or 1"),
        (b'{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', "messages", "weight 0"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "messages", "no assistant message"),
        (b'{"prompt": "p", "prompt": "p", "completion": "c"}', "prompt", "occurs twice"),
        (b'{"prompt": "\\ud800", "completion": "c"}', "prompt", "surrogate"),
        (b'{"prompt": NaN, "completion": "c"}', "row", "NaN"),
        (b'{"prompt": ' + b"9" * 5000 + b', "completion": "c"}', "row", "a number cannot be read"),
        (b'{"prompt": ' + b"[" * 100_000, "row", "nested too deeply"),
        (b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}', "messages.0.tool_calls", "empty list"),
        (
            b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]}',
            "messages.0.tool_calls.0.function.arguments",
            "wanted a JSON object as a string",
        ),
        (b'{"messages": [{"role": "user", "content": "x", "a\\u0000b": 1}]}', "messages.0.a\\x00b", "unknown key"),
    ],
)
def test_a_bad_row_names_its_field_and_what_was_wanted(line, field, words):
    with pytest.raises(RowError) as caught:
        parse_row(line)
    assert caught.value.field == field
    assert words in caught.value.description


PAIR = {
    "input": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "r"}],
        "tools": [],
        "parallel_tool_calls": True,
    },
    "preferred_output": [{"role": "assistant", "content": "good"}],
    "non_preferred_output": [{"role": "assistant", "content": "bad"}],
}


def test_a_preference_row_is_one_conversation_with_two_ends_that_alone_are_trained_on():
    pair = parse_pair(json.dumps(PAIR).encode())
    context = (Message("user", "q"), Message("assistant", "c"), Message("user", "r"))
    assert pair.preferred.messages == (*context, Message("assistant", "good", has_loss=True))
    assert pair.non_preferred.messages == (*context, Message("assistant", "bad", has_loss=True))


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"input": None}, "input", "got null, wanted an object"),
        ({"input": {}}, "input.messages", "missing"),
        ({"input": {"messages": []}}, "input.messages", "empty list"),
        ({"input": {"messages": [{"role": "bot", "content": "x"}]}}, "input.messages.0.role", "got 'bot'"),
        ({"input": {"messages": [{"role": "assistant", "content": "x", "weight": 1}]}}, "input.messages.0.weight", "has no weights"),
        ({"input": {"messages": [{"role": "user", "content": "x"}], "tools": [1]}}, "input.tools.0", "got a number"),
        (
            {"input": {"messages": [{"role": "user", "content": "x"}], "parallel_tool_calls": 1}},
            "input.parallel_tool_calls",
            "true or false",
        ),
        ({"input": {"messages": [{"role": "user", "content": "x"}], "more": 1}}, "input.more", "unknown key"),
        ({"preferred_output": []}, "preferred_output", "got 0 messages, wanted one assistant message"),
        ({"non_preferred_output": [{"role": "user", "content": "x"}]}, "non_preferred_output.0.role", "got 'user', wanted 'assistant'"),
        ({"non_preferred_output": PAIR["preferred_output"]}, "non_preferred_output", "the same as preferred_output"),
        ({"non_preferred_output": [{"role": "assistant"}]}, "non_preferred_output.0.content", "missing"),
        ({"score": 1}, "score", "unknown key, known are input, preferred_output, non_preferred_output"),
    ],
)
def test_a_bad_preference_row_names_its_field_and_what_was_wanted(changes, field, words):
    with pytest.raises(RowError) as caught:
        parse_pair(json.dumps({**PAIR, **changes}).encode())
    assert caught.value.field == field
    assert words in caught.value.description


def test_an_answer_may_be_empty_where_the_model_does_not_learn_to_say_it():
    said = '{"role": "assistant", "content": "%s"}'
    context = '{"role": "assistant", "content": "", "weight": 0}'
    assert len(parse_row(f'{{"messages": [{context}, {said % "a"}]}}'.encode()).messages) == 2
    row = f'{{"input": {{"messages": [{said % ""}]}}, "preferred_output": [{said % "%s"}], "non_preferred_output": [{said % "%s"}]}}'
    assert parse_pair((row % ("a", "")).encode()).non_preferred.messages[-1].content == ""
    with pytest.raises(RowError, match="preferred_output.0.content: got an empty text"):
        parse_pair((row % ("", "a")).encode())


@pytest.mark.parametrize("key", PAIR)
def test_a_part_that_is_missing_from_a_preference_row_is_named(key):
    with pytest.raises(RowError) as caught:
        parse_pair(json.dumps({name: value for name, value in PAIR.items() if name != key}).encode())
    assert (caught.value.field, caught.value.description) == (key, "missing; it is required")


def numbered(path):
    return [(line.number, line.data) for batch in read_batches(path) for line in batch]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\nthree")
    assert numbered(path) == [(1, b"one"), (2, b""), (3, b"two"), (4, b"three")]
    assert count_lines(path) == 4


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one\n\n  \r\n\n")
    assert numbered(path) == [(1, b"one")]
    path.write_bytes(b"\n\n")
    assert numbered(path) == []
    path.write_bytes(b"")
    assert (numbered(path), count_lines(path)) == ([], 0)


def test_a_huge_line_is_passed_over_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"short\n" + b"x" * 100_000 + b"\n0123456789\r\nlast")
    found = [(line.number, line.is_too_long) for batch in read_batches(path) for line in batch]
    assert found == [(1, False), (2, True), (3, False), (4, False)]


def test_memory_is_bounded_by_batches(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 999 + b"\n" * 1)
    with path.open("ab") as file:
        file.write((b"y" * 9_999 + b"\n") * 1000)
    sizes = [sum(len(line.data) for line in batch) for batch in read_batches(path)]
    assert max(sizes) <= 1024 * 1024 + 10_000
    assert len(sizes) > 5
