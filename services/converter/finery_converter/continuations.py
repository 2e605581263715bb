"""What a model goes on to say: greedy continuations by few walks through its weights.

Owns guessing and checking. A guess at all tokens is put through one pass, which tells for each of them what the model would have chosen
in its place. The guess is right up to the first that differs, and that one is then known; the model's choices are the next guess. So a
pass settles one token at least, and several where the model says what the text said. No cache of keys and values is needed, and no
architecture is special.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finery_converter.streamed import StreamedModel


@dataclass(frozen=True)
class Continuation:
    """A prompt of `num_prompt` tokens, and what the model says after it."""

    token_ids: tuple[int, ...]
    num_prompt: int


@dataclass
class _Draft:
    prompt: list[int]
    guess: list[int]
    num_settled: int = 0

    def learn(self, chosen: Sequence[int]) -> None:
        """`chosen`: the model's choice in place of each guessed token, given those before it."""
        agreeing = 0
        while agreeing < len(self.guess) and self.guess[agreeing] == chosen[agreeing]:
            agreeing += 1
        self.num_settled = min(len(self.guess), agreeing + 1)
        self.guess = list(chosen)


def continue_greedily(
    model: StreamedModel,
    texts: Sequence[Sequence[int]],
    *,
    num_prompts: int,
    num_prompt_tokens: int,
    num_tokens: int,
    max_walks: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[Continuation]:
    """Continues the beginnings of some of `texts` by `num_tokens` tokens, or as many as `max_walks` settle (as many tokens at least).

    The beginnings are spread evenly over `texts`; the text's own continuation is the first guess.
    """
    step = max(1, len(texts) // num_prompts)
    drafts = [_draft(text, num_prompt_tokens, num_tokens) for text in list(texts)[::step][:num_prompts]]
    for walk in range(max_walks):
        open_drafts = [draft for draft in drafts if draft.num_settled < len(draft.guess)]
        if not open_drafts:
            break
        states = model.states([draft.prompt + draft.guess for draft in open_drafts])
        asked = [
            state_NH[len(draft.prompt) - 1 : len(draft.prompt) + len(draft.guess) - 1]
            for draft, state_NH in zip(open_drafts, states, strict=True)
        ]
        chosen = model.logits(torch.cat(asked)).argmax(-1)
        for draft, tokens in zip(open_drafts, chosen.split([len(state_NH) for state_NH in asked]), strict=True):
            draft.learn(tokens.tolist())
        if on_progress:
            on_progress((walk + 1) / max_walks)
    return [Continuation((*draft.prompt, *draft.guess[: draft.num_settled]), len(draft.prompt)) for draft in drafts]


def _draft(text: Sequence[int], num_prompt_tokens: int, num_tokens: int) -> _Draft:
    num_prompt = max(1, min(num_prompt_tokens, len(text) // 2))
    guess = list(text[num_prompt : num_prompt + num_tokens])
    return _Draft(list(text[:num_prompt]), guess + [text[-1]] * (num_tokens - len(guess)))
