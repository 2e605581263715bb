"""What OpenAI's API has for tokens, on the real vLLM through the gateway: fields do what they say, and nothing of the inside shows."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from e2e.system import System

from finery_cli.local.stack import QUICKSTART_MODEL

pytestmark = pytest.mark.timeout(600)

MESSAGES = [{"role": "user", "content": "Name three colours."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "description": "Paints a wall.", "parameters": SCHEMA, "strict": True}}
INSIDE = ("vllm", "0.32", "pydantic", "ftjob-", "/work", "/tmp", ".py", "Traceback", "site-packages", "replica")


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model=QUICKSTART_MODEL, **{"messages": MESSAGES, "max_tokens": 8, "temperature": 0, **fields})


def follows_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"colour", "count"} and value["colour"] in ("red", "green") and value["count"] in range(10)


def test_n_seed_stop_and_logprobs(client: Any):
    first = ask(client, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2)
    again = ask(client, n=3, temperature=1, seed=5)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage is not None
    assert first.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in first.choices)
    assert {len(token.top_logprobs) for token in first.choices[0].logprobs.content} <= {2, 3}
    whole = ask(client).choices[0]
    assert whole.finish_reason == "length"
    word = whole.message.content.split()[2]
    stopped = ask(client, stop=[word]).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", whole.message.content.partition(word)[0])


def test_a_stream_is_the_whole_answer_with_its_usage_and_the_models_public_name(client: Any):
    whole = ask(client, logprobs=True)
    chunks = list(ask(client, stream=True, logprobs=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert sum(len(choice.logprobs.content) for choice in choices if choice.logprobs) == 8
    assert chunks[-1].usage == whole.usage
    assert {chunk.model for chunk in chunks} == {QUICKSTART_MODEL}
    assert not [word for chunk in chunks for word in INSIDE if word in chunk.model_dump_json()]


def test_answers_keep_to_a_json_schema(client: Any):
    schema = {"type": "json_schema", "json_schema": {"name": "wall", "schema": SCHEMA, "strict": True}}
    assert follows_schema(ask(client, response_format=schema, max_tokens=40).choices[0].message.content)
    flat = {"format": {"type": "json_schema", "name": "wall", "schema": SCHEMA}}
    # A schema lets any space through, and a sampled answer may be cut off in the middle of it.
    response = client.responses.create(model=QUICKSTART_MODEL, input="A wall.", text=flat, max_output_tokens=40, temperature=0)
    assert (response.status, follows_schema(response.output_text)) == ("completed", True)


def test_tools_are_called_whole_and_streamed_and_their_results_taken(client: Any):
    choice = {"type": "function", "function": {"name": "paint"}}
    answer = ask(client, tools=[TOOL], tool_choice=choice, max_tokens=100)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "paint"
    assert follows_schema(call.function.arguments)
    pieces = [chunk.choices[0].delta.tool_calls for chunk in ask(client, tools=[TOOL], tool_choice=choice, max_tokens=100, stream=True)]
    arguments = "".join(piece[0].function.arguments or "" for piece in pieces if piece)
    assert follows_schema(arguments)
    # The answer's message goes back as it came.
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = ask(client, messages=[*MESSAGES, message, result], tools=[TOOL], tool_choice="none", max_tokens=4)
    assert after.choices[0].message.content


def test_responses_come_whole_and_streamed_and_are_not_kept(client: Any, system: System):
    whole = client.responses.create(model=QUICKSTART_MODEL, input="Name a colour.", max_output_tokens=6, temperature=0)
    assert (whole.model, whole.status, whole.usage.output_tokens) == (QUICKSTART_MODEL, "incomplete", 6)
    events = list(client.responses.create(model=QUICKSTART_MODEL, input="Name a colour.", max_output_tokens=6, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    final = events[-1].response
    assert (final.usage.output_tokens, final.model) == (6, QUICKSTART_MODEL)
    assert not [word for event in events for word in INSIDE if word in event.model_dump_json()]
    items = [{"role": "user", "content": "Name a colour."}, *whole.output, {"role": "user", "content": "Another."}]
    assert client.responses.create(model=QUICKSTART_MODEL, input=items, max_output_tokens=4).usage.output_tokens in range(1, 5)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=QUICKSTART_MODEL, input="x", previous_response_id=whole.id)


def test_completions_take_several_prompts(client: Any):
    answer = client.completions.create(model=QUICKSTART_MODEL, prompt=["One, two,", "Red, green,"], n=2, max_tokens=3, logprobs=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 3 for choice in answer.choices)


def test_embeddings_are_not_offered_by_a_model_that_generates(client: Any):
    with pytest.raises(openai.BadRequestError, match="does not offer") as caught:
        client.embeddings.create(model=QUICKSTART_MODEL, input="x")
    assert caught.value.code == "not_supported"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 1_000_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x " * 20_000}]}),
        ("chat/completions", {"messages": MESSAGES, "min_tokens": 9, "max_tokens": 2}),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"4000000000": 1}}),
        (
            "chat/completions",
            {
                "messages": MESSAGES,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
            },
        ),
        (
            "chat/completions",
            {
                "messages": MESSAGES,
                "tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": 5}}}],
                "tool_choice": "required",
            },
        ),
        ("completions", {"prompt": [4_000_000_000]}),
        ("completions", {"prompt": ""}),
        ("completions", {"prompt": [[-1]]}),
        ("responses", {"input": "x " * 20_000}),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "none", "output": "x"}]}),
        ("responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"pattern": "(((("}}}}),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_vllm_refuses_tells_nothing_of_the_inside(system: System, path, fields, streamed):
    headers = {"authorization": f"Bearer {system.api_key}"}
    body = {"model": QUICKSTART_MODEL, "max_tokens": 4, "stream": streamed, **fields}
    if path == "responses":
        del body["max_tokens"]
        body["max_output_tokens"] = 4
    answer = httpx.post(f"{system.running.http_url}/v1/{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code in (200, 400), answer.text
    assert not [word for word in INSIDE if word in answer.text], answer.text


def test_the_system_still_answers(client: Any):
    assert ask(client).choices[0].message.content
