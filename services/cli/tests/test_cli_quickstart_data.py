"""The quickstart's split is clean, its score fair and its interval honest."""

import json

import pytest

from finery_cli.quickstart_data import (
    TOPICS,
    QuestionRow,
    load_rows,
    named_topic,
    normalised,
    paired_difference_interval,
    score,
    split,
    to_jsonl,
)
from finery_common.errors import FailedPreconditionError


@pytest.fixture
def corpus(tmp_path):
    for topic in TOPICS:
        questions = [f"{topic} {topic}{i}a {topic}{i}b {topic}{i}c {topic}{i}d" for i in range(30)]
        questions += [questions[0].upper(), "a question of every topic", questions[1] + "?", "long " * 40]
        lines = "".join(f"- - {json.dumps(question)}\n  - an answer\n" for question in questions)
        (tmp_path / f"{topic}.yml").write_text(f"categories:\n- {topic}\nconversations:\n{lines}")
    return tmp_path


def test_a_question_occurs_once_and_belongs_to_one_topic(corpus):
    rows = load_rows(corpus)
    keys = [normalised(row.question) for row in rows]
    assert len(keys) == len(set(keys)) == 30 * len(TOPICS)
    assert "a question of every topic" not in keys
    assert all(row.topic in row.question.lower() for row in rows)


def test_no_question_or_near_double_is_on_both_sides(corpus):
    rows = load_rows(corpus)
    doubles = [QuestionRow(row.question + " please", row.topic) for row in rows]
    parts = split([*rows, *doubles], per_topic=20, held_out_per_topic=6)
    assert len(parts.held_out) == 6 * len(TOPICS)
    assert len(parts.train) == 14 * len(TOPICS)
    train = [set(normalised(row.question).split()) for row in parts.train]
    for row in parts.held_out:
        words = set(normalised(row.question).split())
        assert all(len(words & other) / len(words | other) < 0.7 for other in train)


def test_the_seed_alone_decides_the_split(corpus):
    rows = load_rows(corpus)
    assert split(rows, seed=1) == split(reversed(rows), seed=1)
    assert split(rows, seed=1) != split(rows, seed=2)


def test_a_training_row_is_the_prompt_and_the_bare_topic():
    row = QuestionRow("who wrote vineland", "literature")
    (line,) = to_jsonl([row]).decode().splitlines()
    *asked, answer = json.loads(line)["messages"]
    assert asked == row.messages
    assert all(topic in asked[-1]["content"] for topic in TOPICS)
    assert answer == {"role": "assistant", "content": "literature"}


@pytest.mark.parametrize(
    ("reply", "topic"),
    [
        ("literature", "literature"),
        (" Sports.", "sports"),
        ("This question is about AI, coding, emotion", "ai"),
        ("The main topic", None),
        ("", None),
    ],
)
def test_the_first_topic_named_counts(reply, topic):
    assert named_topic(reply) == topic


def test_a_score_compares_both_models_on_the_same_rows():
    rows = [QuestionRow(f"q{i}", "sports") for i in range(40)]
    base, tuned = ["ai"] * 30 + ["sports"] * 10, ["sports"] * 36 + ["ai"] * 4
    result = score(rows, base_replies=base, tuned_replies=tuned)
    assert (result.base_accuracy, result.tuned_accuracy) == (0.25, 0.9)
    low, high = result.interval
    assert low < 0.65 < high
    assert result.is_clear_win
    assert not score(rows, base_replies=base, tuned_replies=base).is_clear_win


def test_a_few_wins_of_few_rows_are_no_clear_win():
    low, _ = paired_difference_interval([0, 0, 0], tuned_hits=[1, 1, 1])
    assert low <= 0
    low, high = paired_difference_interval([0] * 80, tuned_hits=[0] * 76 + [1] * 4)
    assert low <= 0 < high


def test_the_interval_agrees_with_the_normal_one_where_rows_are_many():
    base, tuned = [0] * 600 + [1] * 400, ([1] * 300 + [0] * 300) + ([1] * 350 + [0] * 50)
    low, high = paired_difference_interval(base, tuned_hits=tuned)
    mean = 0.25
    half = 1.96 * ((0.35 - mean**2) / 1000) ** 0.5
    assert low == pytest.approx(mean - half, abs=0.005)
    assert high == pytest.approx(mean + half, abs=0.005)
    assert (low, high) == paired_difference_interval(base, tuned_hits=tuned)


def test_a_missing_corpus_says_what_to_do(tmp_path):
    with pytest.raises(FailedPreconditionError, match="Run the set-up again"):
        load_rows(tmp_path)
