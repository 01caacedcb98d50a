"""Unmodified clients of Mistral's, sync and async, on every endpoint of the door that they know."""

from __future__ import annotations

import asyncio
import json

import pydantic
import pytest
from http_house import MESSAGES
from mistralai.client import Mistral, errors
from mistralai.client.models import TextChunk, ThinkChunk
from mistralai.client.utils import BackoffStrategy, RetryConfig

from cierzo.engine.errors import CoreFailed, Draining, NotFound, Overloaded, Unauthorized
from cierzo.engine.text import tokenizer
from cierzo.testing import FakeAnswer

TOOL = {"type": "function", "function": {"name": "wind", "parameters": {"type": "object"}}}


def _client(house):
    return Mistral(api_key="none", server_url=house.url)


def test_a_chat_completion(either):
    with _client(either("Hello there.")) as client:
        answer = client.chat.complete(model="fake", messages=MESSAGES, max_tokens=50)
    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 13


def test_a_chat_completion_in_a_stream(either):
    with _client(either("Hello there.")) as client:
        events = [event.data for event in client.chat.stream(model="fake", messages=MESSAGES)]
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Hello there."
    assert events[-1].choices[0].finish_reason == "stop"


def test_thoughts_as_chunks(either):
    house = either(FakeAnswer(thinking="Hm.", text="So."), http={"reasoning_format": "thinking"})
    with _client(house) as client:
        whole = client.chat.complete(model="fake", messages=MESSAGES)
        events = [event.data for event in client.chat.stream(model="fake", messages=MESSAGES)]
    thought, text = whole.choices[0].message.content
    assert isinstance(thought, ThinkChunk)
    assert isinstance(text, TextChunk)
    assert ([chunk.text for chunk in thought.thinking], text.text) == (["Hm."], "So.")
    contents = [event.choices[0].delta.content for event in events]
    chunks = [chunk for content in contents if isinstance(content, list) for chunk in content]
    assert "".join(piece.text for chunk in chunks for piece in chunk.thinking) == "Hm."
    assert "".join(content for content in contents if isinstance(content, str)) == "So."


def test_calls(either):
    with _client(either(FakeAnswer(calls=[("wind", {"at": "sea"})]))) as client:
        answer = client.chat.complete(model="fake", messages=MESSAGES, tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("wind", {"at": "sea"})
    assert answer.choices[0].finish_reason == "tool_calls"


def test_seeds_and_models(either):
    house = either("Hello")
    with _client(house) as client:
        client.chat.complete(model="fake", messages=MESSAGES, random_seed=3)
        assert [model.id for model in client.models.list().data] == ["fake"]
    assert house.requests[-1].sampling.seed == 3


def test_what_is_refused(either):
    with _client(either("Hello")) as client, pytest.raises(errors.SDKError) as refused:
        client.chat.complete(model="fake", messages=MESSAGES, temperature=-1.0)
    assert refused.value.status_code == 400
    assert json.loads(refused.value.body)["error"]["param"] == "temperature"


def test_calls_in_a_stream(either):
    with _client(either(FakeAnswer(text="So", calls=[("wind", {"at": "sea"})]))) as client:
        events = [event.data for event in client.chat.stream(model="fake", messages=MESSAGES, tools=[TOOL])]
    pieces = [call for event in events for call in event.choices[0].delta.tool_calls or ()]
    assert pieces[0].function.name == "wind"
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"at": "sea"}
    assert events[-1].choices[0].finish_reason == "tool_calls"


def test_forms_of_answers(either):
    class Wind(pydantic.BaseModel):
        knots: int

    with _client(either('{"knots": 3}')) as client:
        whole = client.chat.parse(Wind, model="fake", messages=MESSAGES)
        assert whole.choices[0].message.parsed == Wind(knots=3)
        events = [event.data for event in client.chat.parse_stream(Wind, model="fake", messages=MESSAGES)]
        assert "".join(event.choices[0].delta.content or "" for event in events) == '{"knots": 3}'


@pytest.mark.parametrize("choice", ["any", "required", {"type": "function", "function": {"name": "wind"}}])
def test_calls_that_must_come(either, choice):
    house = either(FakeAnswer(calls=[("wind", {"at": "sea"})]))
    with _client(house) as client:
        answer = client.chat.complete(model="fake", messages=MESSAGES, tools=[TOOL], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "wind"
    assert house.requests[-1].tool_choice == ("wind" if isinstance(choice, dict) else "required")


def test_log_probabilities_of_the_prompt(either):
    house = either("ab")
    with _client(house) as client:
        answer = client.chat.complete(model="fake", messages=MESSAGES, prompt_logprobs=True, max_tokens=1)
    assert house.requests[-1].sampling.prompt_logprobs == 0
    assert answer.choices[0].message.content == "a"


def test_filling_in(either, monkeypatch):
    monkeypatch.setattr(tokenizer, "FIM_TOKENS", (("[THINK]", "[/THINK]", "[ARGS]"),))  # the fake has no others
    house = either("x = 1")
    with _client(house) as client:
        whole = client.fim.complete(model="fake", prompt="def f():", suffix="return x", min_tokens=2, stop="\n")
        stream = client.fim.stream(model="fake", prompt="def f():", suffix="return x")
        events = [event.data for event in stream]
        alone = client.fim.complete(model="fake", prompt="def f():", random_seed=3)
    assert whole.choices[0].message.content == "x = 1"
    assert whole.usage.prompt_tokens == len("def f():return x") + 3
    assert "".join(event.choices[0].delta.content or "" for event in events) == "x = 1"
    assert alone.usage.prompt_tokens == len("def f():")
    assert [request.suffix for request in house.requests] == ["return x", "return x", None]


def test_models(either):
    with _client(either("Hello")) as client:
        model = client.models.retrieve(model_id="fake")
        assert (model.id, model.max_context_length) == ("fake", 4096)
        assert (model.capabilities.function_calling, model.capabilities.vision) == (True, False)
        with pytest.raises(errors.SDKError) as unknown:
            client.models.retrieve(model_id="gpt")
    assert unknown.value.status_code == 404


def test_responses(either):
    tool = {"type": "function", "name": "wind", "parameters": {"type": "object"}}
    with _client(either(FakeAnswer(thinking="Hm.", text="So", calls=[("wind", {"at": "sea"})]))) as client:
        whole = client.responses.create(model="fake", input="Hi", tools=[tool])
        events = [*client.responses.create(model="fake", input=MESSAGES, tools=[tool], stream=True)]
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert (whole.status, whole.output[1].content[0].text) == ("completed", "So")
    said = [event.data for event in events]
    assert [said[0].type, said[-1].type] == ["response.created", "response.completed"]
    assert "".join(one.delta for one in said if one.type == "response.output_text.delta") == "So"


def test_it_waits_as_long_as_it_is_told_and_tries_again(either):
    patience = BackoffStrategy(initial_interval=60_000, max_interval=60_000, exponent=1, max_elapsed_time=120_000)
    house = either("Hello")
    with Mistral(
        api_key="none", server_url=house.url, retry_config=RetryConfig("backoff", patience, False)
    ) as client:
        house.refuse(Overloaded("full"), times=2, retry_after_s=0.01)
        answer = client.chat.complete(model="fake", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello"
        house.refuse(Draining("soon"), retry_after_s=0.01)
        assert [*client.chat.stream(model="fake", messages=MESSAGES)]
    assert len(house.requests) == 5


@pytest.mark.parametrize(
    ("error", "status"), [(Unauthorized("no"), 401), (NotFound("no"), 404), (CoreFailed("no"), 500)]
)
def test_what_it_raises(either, error, status):
    house = either("Hello")
    house.refuse(error, times=None)
    with _client(house) as client:
        for call in (client.chat.complete, client.chat.stream):
            with pytest.raises(errors.SDKError) as raised:
                call(model="fake", messages=MESSAGES)
            assert raised.value.status_code == status
            assert json.loads(raised.value.body)["error"]["code"] == error.code


def test_a_stream_that_fails_in_the_middle_has_no_good_end(either):
    house = either("x" * 100, token_s=60.0)
    with _client(house) as client:
        stream = client.chat.stream(model="fake", messages=MESSAGES)
        assert next(stream).data.choices[0].delta.role == "assistant"
        house.health = "failed"
        with pytest.raises((errors.MistralError, ValueError)):
            list(stream)


async def _told(house):
    async with _client(house) as client:
        whole = await client.chat.complete_async(model="fake", messages=MESSAGES)
        stream = await client.chat.stream_async(model="fake", messages=MESSAGES)
        said = "".join([event.data.choices[0].delta.content or "" async for event in stream])
        filled = await client.fim.complete_async(model="fake", prompt="a")
        stream = await client.fim.stream_async(model="fake", prompt="a")
        streamed = "".join([event.data.choices[0].delta.content or "" async for event in stream])
        response = await client.responses.create_async(model="fake", input="Hi")
        events = await client.responses.create_async(model="fake", input="Hi", stream=True)
        ends = [event.data.type async for event in events][-1:]
        names = [model.id for model in (await client.models.list_async()).data]
    texts = [whole.choices[0].message.content, said, filled.choices[0].message.content, streamed]
    return [*texts, response.output[0].content[0].text], ends, names


def test_an_async_client(either):
    assert asyncio.run(_told(either("Hello"))) == (["Hello"] * 5, ["response.completed"], ["fake"])
