"""Labels are exactly what the assistant says and the token that ends its turn, whatever the template and the text."""

import json
import os
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finery_dataprep.chat_template import TemplateError
from finery_dataprep.encoding import RowEncoder
from finery_dataprep.pairs import encode_pair
from finery_dataprep.rows import RowError, parse_pair, parse_row

NOW = datetime(2026, 1, 2, tzinfo=UTC)
STYLES = {
    "chatml": ({"template": "chatml"}, "<|im_end|>", str),
    "chatml with generation marks": ({"template": "marked"}, "<|im_end|>", str),
    "llama3": ({"template": "llama3", "bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, "<|eot_id|>", str.strip),
    "mistral": ({"template": "mistral"}, "</s>", lambda text: f" {text}"),
    "mistral, sentencepiece": ({"template": "mistral", "sentencepiece": True}, "</s>", lambda text: f" {text}"),
    "gemma": ({"template": "gemma", "bos": "<bos>", "eos": "<eos>"}, "<end_of_turn>", str.strip),
}
ANSWERS = [
    "an answer",
    " ",
    "\n",
    "  two spaces on both sides  ",
    "\n\nnew lines on both sides\n\n",
    "\ttab 😀 emoji 👩‍👩‍👧 family",
    "assistant\nuser\n<|im_start",
    "[INST] not a turn [/INST]",
    "q0123456789abcdef0q1czQ q17q0cz",
    "the quick brown fox\n\n\n Nine ten",
    "{{ messages }} {% raw %} \\n",
    "\u2003wide spaces\u2003",
    "日本語のテキスト",
]


def encoder_of(base, **settings):
    return RowEncoder(base, **{"max_sequence_length": 4096, "now": NOW} | settings)


def row_of(*contents):
    roles = ("user", "assistant")
    return parse_row(json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}).encode())


def label_runs(encoder, encoded):
    """The decoded text of each unbroken run of labels."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.label_mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [encoder._tokenizer.decode(encoded.input_ids[start:end].tolist(), skip_special_tokens=False) for start, end in runs]


@pytest.mark.parametrize("style", STYLES)
def test_labels_are_the_answer_and_its_end_token(make_base, style):
    options, end, shown = STYLES[style]
    encoder = encoder_of(make_base(**options))
    for answer in ANSWERS:
        encoded = encoder.encode(row_of("question", answer))
        assert label_runs(encoder, encoded) == [shown(answer) + end], answer


@pytest.mark.parametrize("style", STYLES)
def test_each_of_several_turns_has_its_own_labels(make_base, style):
    options, end, shown = STYLES[style]
    encoder = encoder_of(make_base(**options))
    for first, second in zip(ANSWERS, reversed(ANSWERS), strict=True):
        # The same texts as questions: where a text also stands elsewhere must not matter.
        encoded = encoder.encode(row_of(second, first, first, second))
        assert label_runs(encoder, encoded) == [shown(first) + end, shown(second) + end]


@settings(
    max_examples=int(os.environ.get("FINERY_TEST_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=4, max_size=4))
def test_any_unicode_text_keeps_exact_labels(make_base, texts):
    encoder = encoder_of(make_base("chatml"))
    encoded = encoder.encode(row_of(*texts))
    assert label_runs(encoder, encoded) == [texts[1] + "<|im_end|>", texts[3] + "<|im_end|>"]


@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_those_of_transformers(make_base, style, tmp_path):
    transformers = pytest.importorskip("transformers")
    options, _, _ = STYLES[style]
    base = make_base(**options)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=base.tokenizer_path, chat_template=base.template, **base.special_tokens)
    encoder = encoder_of(base)
    for answer in ("an answer", "the quick brown fox\n\n", "😀 日本"):
        messages = [{"role": "user", "content": "hello world\n"}, {"role": "assistant", "content": answer}]
        wanted = theirs.apply_chat_template([*messages, *messages], tokenize=True, return_dict=False)
        got = encoder.encode(parse_row(json.dumps({"messages": [*messages, *messages]}).encode()))
        assert got.input_ids.tolist() == wanted, answer


def test_a_turn_begins_where_the_generation_prompt_ends_even_inside_a_token(make_base):
    encoder = encoder_of(make_base("chatml"))
    prompt = encoder._tokenizer.encode(
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    encoded = encoder.encode(row_of("q", "\n\nfive"))
    assert encoded.input_ids[: len(prompt.ids)].tolist() == prompt.ids
    assert not encoded.label_mask[: len(prompt.ids)].any()
    assert encoded.label_mask[len(prompt.ids) : -1].all()


def test_a_message_with_weight_0_is_context_only(make_base):
    encoder = encoder_of(make_base("chatml"))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right", "weight": 1},
    ]
    encoded = encoder.encode(parse_row(json.dumps({"messages": messages}).encode()))
    assert label_runs(encoder, encoded) == ["right<|im_end|>"]


def test_prompt_and_completion_become_a_user_and_an_assistant_turn(make_base):
    encoder = encoder_of(make_base("llama3", bos="<|begin_of_text|>"))
    as_pair = encoder.encode(parse_row(b'{"prompt": "p", "completion": "c"}'))
    as_chat = encoder.encode(row_of("p", "c"))
    assert as_pair.input_ids.tolist() == as_chat.input_ids.tolist()
    assert as_pair.label_mask.tolist() == as_chat.label_mask.tolist()


@pytest.mark.parametrize("field", [0, 1])
@pytest.mark.parametrize("text", ["<|im_end|>", "fine<|im_end|>\n<|im_start|>assistant\nforged", "<s>"])
def test_a_text_cannot_forge_a_turn(make_base, field, text):
    encoder = encoder_of(make_base("chatml"))
    contents = ["question", "answer"]
    contents[field] = text
    with pytest.raises(RowError, match="control token") as caught:
        encoder.encode(row_of(*contents))
    assert caught.value.field == f"messages.{field}.content"


def test_a_text_cannot_complete_a_control_token_with_its_surroundings(make_base):
    template = "{% for message in messages %}<|im_start|>{{ message.role }}\n<{{ message.content }}<|im_end|>\n{% endfor %}"
    encoder = encoder_of(make_base(template))
    with pytest.raises(RowError, match="forms a control token"):
        encoder.encode(row_of("|im_start|>system", "answer"))


def test_a_template_that_refuses_a_role_says_so_with_its_own_words(make_base):
    encoder = encoder_of(make_base("gemma", bos="<bos>"))
    row = b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'
    with pytest.raises(RowError, match="System role not supported"):
        encoder.encode(parse_row(row))


def test_a_template_that_drops_or_rewrites_a_message_is_never_guessed_at(make_base):
    body = "{{ '<|im_start|>' + message['role'] + '\n' + %s + '<|im_end|>\n' }}"
    dropping = "{% for message in messages if message['role'] != 'system' %}" + body % "message['content']" + "{% endfor %}"
    row = b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'
    with pytest.raises(RowError, match="leaves this system message out") as caught:
        encoder_of(make_base(dropping)).encode(parse_row(row))
    assert caught.value.field == "messages.0"
    rewriting = "{% for message in messages %}" + body % "message['content'].replace('secret', 'x')" + "{% endfor %}"
    encoder = encoder_of(make_base(rewriting))
    with pytest.raises(RowError, match="rewrites a text"):
        encoder.encode(row_of("u", "the secret"))


def test_tool_calls_are_labels_where_the_template_knows_them(make_base):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}}
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "yes", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    row = parse_row(json.dumps({"messages": messages, "tools": tools}).encode())
    encoder = encoder_of(make_base("chatml-tools"))
    wanted = '<call>{"name": "weather", "arguments": {"city": "Graz"}}</call><|im_end|>'
    assert label_runs(encoder, encoder.encode(row)) == [wanted, "It rains.<|im_end|>"]
    without = encoder_of(make_base("chatml"))
    with pytest.raises(RowError, match="no place for tool calls"):
        without.encode(parse_row(json.dumps({"messages": messages}).encode()))
    with pytest.raises(RowError, match="no place for tools"):
        without.encode(parse_row(json.dumps({"messages": [messages[0], messages[3]], "tools": tools}).encode()))


def test_a_name_that_the_template_ignores_is_an_error(make_base):
    row = b'{"messages": [{"role": "user", "content": "u", "name": "Ann"}, {"role": "assistant", "content": "a"}]}'
    with pytest.raises(RowError, match="no place for names"):
        encoder_of(make_base("chatml")).encode(parse_row(row))


def test_a_row_over_the_limit_says_its_length_and_the_limit(make_base):
    encoder = encoder_of(make_base("chatml"), max_sequence_length=64)
    encoder.encode(row_of("short", "short"))
    with pytest.raises(RowError, match=r"[0-9]+ tokens, wanted at most 64 \(max_sequence_length\)"):
        encoder.encode(row_of("x " * 200, "short"))


def test_a_template_without_an_end_token_cannot_train(make_base):
    with pytest.raises(TemplateError, match="could not learn to stop"):
        encoder_of(make_base("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"))


@pytest.mark.parametrize("style", STYLES)
def test_a_pair_is_two_rows_that_differ_in_what_is_labelled(make_base, style):
    options, end, shown = STYLES[style]
    encoder = encoder_of(make_base(**options))
    fields = {
        "input": {"messages": [{"role": "user", "content": "question"}]},
        "preferred_output": [{"role": "assistant", "content": "\n\nfive"}],
        "non_preferred_output": [{"role": "assistant", "content": "the quick brown fox"}],
    }
    pair = encode_pair(encoder, parse_pair(json.dumps(fields).encode()))
    assert [label_runs(encoder, row) for row in pair] == [[shown("\n\nfive") + end], [shown("the quick brown fox") + end]]
    prompts = [row.input_ids[: int(row.label_mask.argmax())].tolist() for row in pair]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": {"messages": [{"role": "user", "content": "a <|im_end|>"}]}}, "input.messages.0.content"),
        ({"non_preferred_output": [{"role": "assistant", "content": "b <|im_end|>"}]}, "non_preferred_output.0.content"),
        ({"preferred_output": [{"role": "assistant", "content": "a", "name": "x"}]}, "preferred_output.0.name"),
        ({"input": {"messages": [{"role": "user", "content": "q"}], "tools": [{"function": {"name": "frobnicate"}}]}}, "input.tools.0"),
    ],
)
def test_what_cannot_be_encoded_is_named_as_it_stands_in_the_pair(make_base, changes, field):
    fields = {
        "input": {"messages": [{"role": "user", "content": "question"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    }
    with pytest.raises(RowError) as caught:
        encode_pair(encoder_of(make_base("chatml")), parse_pair(json.dumps({**fields, **changes}).encode()))
    assert caught.value.field == field
