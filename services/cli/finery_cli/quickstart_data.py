"""The quickstart's data: routing a question to its topic, from the package `chatterbot-corpus` (BSD licence).

Owns reading the corpus, the split into training and held-out rows, the prompt, and the score. A label is the corpus's own: the file a
question stands in. A question of two topics is left out. Both models get the same prompt, which lists the topics, and the same
score: the first topic that a reply names has to be the right one, so a chatty reply counts as much as a bare one. Of the prompts
tried, this one served the base model best: it names a topic in most of its replies and is right about as often as by chance.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from openai.types.chat import ChatCompletionMessageParam

from finery_common.errors import FailedPreconditionError

TOPICS = ("ai", "coding", "emotion", "literature", "sports", "trivia")
SEED = 3407
ROWS_PER_TOPIC = 48
HELD_OUT_PER_TOPIC = 16
NEAR_DUPLICATE = 0.7
MAX_QUESTION_CHARS = 90
BOOTSTRAP_ROUNDS = 10_000
MAX_REPLY_TOKENS = 12
TRAINING_SPEC: dict[str, object] = {
    "max_sequence_length": 256,
    "num_epochs": 1,
    "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    "optimizer": {"learning_rate": 1e-3},
}


@dataclass(frozen=True)
class QuestionRow:
    """One question and the topic it belongs to."""

    question: str
    topic: str

    @property
    def messages(self) -> list[ChatCompletionMessageParam]:
        """What a model is asked, in OpenAI's form."""
        topics = f"{', '.join(TOPICS[:-1])} or {TOPICS[-1]}"
        content = f"Which topic is this question about: {topics}?\nQuestion: {self.question}\nAnswer with the topic only."
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to ask; no question on both sides, nor one nearly the same."""

    train: tuple[QuestionRow, ...]
    held_out: tuple[QuestionRow, ...]


@dataclass(frozen=True)
class Score:
    """Hits by held-out row (1 right, 0 wrong) and the 95% interval of the difference of the two accuracies."""

    base_hits: tuple[int, ...]
    tuned_hits: tuple[int, ...]
    interval: tuple[float, float]

    @property
    def base_accuracy(self) -> float:
        return sum(self.base_hits) / len(self.base_hits)

    @property
    def tuned_accuracy(self) -> float:
        return sum(self.tuned_hits) / len(self.tuned_hits)

    @property
    def is_clear_win(self) -> bool:
        """The tuned model is better by more than chance explains: the whole interval lies above 0."""
        return self.interval[0] > 0


def load_rows(folder: Path) -> list[QuestionRow]:
    """The distinct questions of `TOPICS` in `folder`, the corpus's folder of English YAML files.

    Raises FailedPreconditionError where a file is missing or not the corpus's.
    """
    topics_by_key: dict[str, set[str]] = defaultdict(set)
    questions: dict[str, str] = {}
    for topic in TOPICS:
        for question in _questions(folder / f"{topic}.yml"):
            key = normalised(question)
            topics_by_key[key].add(topic)
            questions.setdefault(key, question)
    return [
        QuestionRow(question, *topics_by_key[key])
        for key, question in questions.items()
        if key and len(topics_by_key[key]) == 1 and len(question) <= MAX_QUESTION_CHARS
    ]


def split(
    rows: Iterable[QuestionRow], *, seed: int = SEED, per_topic: int = ROWS_PER_TOPIC, held_out_per_topic: int = HELD_OUT_PER_TOPIC
) -> Split:
    """At most `per_topic` rows of each topic, up to `held_out_per_topic` of them held out (a third where there are few).

    The same seed gives the same split. Of rows nearly alike only the first is kept, so none has its double on the other side.
    """
    chance = random.Random(seed)
    by_topic: dict[str, list[QuestionRow]] = defaultdict(list)
    for row in _without_near_duplicates(rows, chance):
        by_topic[row.topic].append(row)
    train: list[QuestionRow] = []
    held_out: list[QuestionRow] = []
    for topic in sorted(by_topic):
        chosen = by_topic[topic][:per_topic]
        num_held_out = min(held_out_per_topic, len(chosen) // 3)
        held_out += chosen[:num_held_out]
        train += chosen[num_held_out:]
    chance.shuffle(train)
    chance.shuffle(held_out)
    return Split(tuple(train), tuple(held_out))


def to_jsonl(rows: Iterable[QuestionRow]) -> bytes:
    """The rows as a training file in OpenAI's chat form."""
    lines = [json.dumps({"messages": [*row.messages, {"role": "assistant", "content": row.topic}]}, ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def named_topic(reply: str) -> str | None:
    """The topic that `reply` names first, if any."""
    found = re.search(rf"\b({'|'.join(TOPICS)})\b", reply.lower())
    return found.group(1) if found else None


def score(rows: Sequence[QuestionRow], *, base_replies: Sequence[str], tuned_replies: Sequence[str]) -> Score:
    """Judges both models' replies to the same `rows`, in their order."""
    base_hits = tuple(int(named_topic(reply) == row.topic) for row, reply in zip(rows, base_replies, strict=True))
    tuned_hits = tuple(int(named_topic(reply) == row.topic) for row, reply in zip(rows, tuned_replies, strict=True))
    return Score(base_hits, tuned_hits, paired_difference_interval(base_hits, tuned_hits=tuned_hits))


def paired_difference_interval(base_hits: Sequence[int], *, tuned_hits: Sequence[int]) -> tuple[float, float]:
    """The 95% interval of tuned minus base accuracy: percentiles of a bootstrap over rows, both answers of a row drawn together.

    One row that speaks for each side is added first, so that few rows, or rows that all agree, cannot give an interval of width 0.
    The seed is fixed: the same hits give the same interval. Raises ValueError where the two differ in length or are empty.
    """
    differences = [tuned - base for base, tuned in zip(base_hits, tuned_hits, strict=True)]
    if not differences:
        raise ValueError("no rows to compare")
    differences += [1, -1]
    chance = random.Random(SEED)
    means = sorted(sum(chance.choices(differences, k=len(differences))) / len(differences) for _ in range(BOOTSTRAP_ROUNDS))
    return means[round(0.025 * BOOTSTRAP_ROUNDS)], means[round(0.975 * BOOTSTRAP_ROUNDS) - 1]


def normalised(text: str) -> str:
    """Lower-case words and digits only: what makes two questions the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "").replace("’", "")))


def _questions(path: Path) -> list[str]:
    try:
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        return [" ".join(str(turns[0]).split()) for turns in conversations]
    except (OSError, yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise FailedPreconditionError(
            f"Cannot read {path}, a file of chatterbot-corpus: {error}. Run the set-up again; it installs the corpus."
        ) from error


def _without_near_duplicates(rows: Iterable[QuestionRow], chance: random.Random) -> list[QuestionRow]:
    shuffled = sorted(rows, key=lambda row: normalised(row.question))
    chance.shuffle(shuffled)
    kept: list[QuestionRow] = []
    kept_words: list[frozenset[str]] = []
    for row in shuffled:
        words = frozenset(normalised(row.question).split())
        if not any(_likeness(words, other) >= NEAR_DUPLICATE for other in kept_words):
            kept.append(row)
            kept_words.append(words)
    return kept


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard's index of two sets of words."""
    return len(one & other) / len(one | other)
