"""Unmodified clients of Mistral's on the door."""

from __future__ import annotations

import json

import pytest
from http_house import MESSAGES
from mistralai.client import Mistral, errors
from mistralai.client.models import TextChunk, ThinkChunk

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


async def _told(house):
    async with _client(house) as client:
        whole = await client.chat.complete_async(model="fake", messages=MESSAGES)
        stream = await client.chat.stream_async(model="fake", messages=MESSAGES)
        said = "".join([event.data.choices[0].delta.content or "" async for event in stream])
    return whole.choices[0].message.content, said


def test_an_async_client(either):
    import asyncio

    assert asyncio.run(_told(either("Hello"))) == ("Hello", "Hello")
