"""OpenAI's client as it is, on the endpoints of the door for chats, completions and models."""

from __future__ import annotations

import json

import openai
import pytest
from http_house import MESSAGES

from cierzo.engine.errors import Draining, Overloaded
from cierzo.testing import FakeAnswer

TOOL = {"type": "function", "function": {"name": "wind", "parameters": {"type": "object"}}}


def _chat(client, **options):
    return client.chat.completions.create(**{"model": "fake", "messages": MESSAGES, **options})


def test_a_chat_completion(either):
    with either("Hello there.").openai() as client:
        answer = _chat(client, max_tokens=50)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Hello there.",
        "stop",
    )
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 13, 21)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_a_chat_completion_in_a_stream(either):
    with either("Hello there.").openai() as client:
        chunks = [*_chat(client, stream=True, stream_options={"include_usage": True})]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello there."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 13
    assert {chunk.usage for chunk in chunks[:-1]} == {None}


def test_usage_in_every_event(either):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with either("Hello").openai() as client:
        chunks = [*_chat(client, stream=True, stream_options=options)]
    told = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in chunks]
    assert told[0] == (8, 0)
    assert told[-1] == (8, 6)
    assert told == sorted(told)
    assert (8, 3) in told


def test_several_answers(either):
    with either("abc").openai() as client:
        whole = _chat(client, n=3)
        chunks = [*_chat(client, n=3, stream=True)]
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(i, "abc") for i in range(3)]
    told = ["", "", ""]
    for chunk in chunks:
        told[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert told == ["abc"] * 3
    ends = [chunk.choices[0] for chunk in chunks if chunk.choices[0].finish_reason]
    assert [(end.index, end.finish_reason) for end in ends] == [(i, "stop") for i in range(3)]


def test_an_answer_that_is_cut(either):
    with either("abcdef").openai() as client:
        (choice,) = _chat(client, max_completion_tokens=3).choices
        assert (choice.message.content, choice.finish_reason) == ("abc", "length")
        (choice,) = _chat(client, stop=["d"]).choices
        assert (choice.message.content, choice.finish_reason, choice.stop_reason) == ("abc", "stop", "d")


def test_thoughts_and_calls(either):
    answer = FakeAnswer(thinking="Hm. ", text="So", calls=[("wind", {"at": "sea"}), ("wind", {"at": "Teruel"})])
    with either(answer).openai() as client:
        whole = _chat(client, tools=[TOOL])
        chunks = [*_chat(client, tools=[TOOL], stream=True)]
    (choice,) = whole.choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Hm. ", "So")
    assert choice.finish_reason == "tool_calls"
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    calls = [
        (call.type, call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls
    ]
    assert calls == [("function", "wind", {"at": "sea"}), ("function", "wind", {"at": "Teruel"})]
    assert all(call.id for call in choice.message.tool_calls)
    assert "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks) == "Hm. "
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "So"
    said: dict[int, list[str]] = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            parts = said.setdefault(call.index, ["", "", ""])
            for place, part in enumerate((call.id, call.function.name, call.function.arguments)):
                parts[place] += part or ""
    assert [(name, json.loads(arguments)) for _, name, arguments in said.values()] == [
        ("wind", {"at": "sea"}),
        ("wind", {"at": "Teruel"}),
    ]
    assert all(call_id for call_id, *_ in said.values())
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_clients_own_stream_helper_joins_calls(either):
    client = either(FakeAnswer(calls=[("wind", {"at": "sea"})])).openai()
    with client, client.chat.completions.stream(model="fake", messages=MESSAGES, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("wind", {"at": "sea"})


def test_a_conversation_with_a_tool_goes_on(either):
    house = either([FakeAnswer(calls=[("wind", {"at": "sea"})]), "Calm."])
    with house.openai() as client:
        first = _chat(client, tools=[TOOL]).choices[0].message
        call = first.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": "0 kn", "name": "wind"}
        turns = [*MESSAGES, first.model_dump(exclude_none=True), result]
        assert _chat(client, messages=turns, tools=[TOOL]).choices[0].message.content == "Calm."


def test_log_probabilities(either):
    with either("hé").openai() as client:
        (whole,) = _chat(client, logprobs=True, top_logprobs=2).choices
        chunks = [*_chat(client, logprobs=True, top_logprobs=2, stream=True)]
    entries = whole.logprobs.content
    assert [entry.token for entry in entries] == ["h", "bytes:\\xc3", "bytes:\\xa9", "</s>"]
    assert [entry.bytes for entry in entries] == [[0x68], [0xC3], [0xA9], [*b"</s>"]]
    assert {entry.logprob for entry in entries} == {-1.0}
    assert [top.token for top in entries[0].top_logprobs] == ["h", "\x00"]
    assert [top.logprob for top in entries[0].top_logprobs] == [-1.0, -2.0]
    streamed = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


def test_completions_of_texts_and_tokens(either):
    house = either({"one": "1", "two": "22", (7, 8): "78"})
    with house.openai() as client:
        both = client.completions.create(model="fake", prompt=["one", "two"], n=2)
        tokens = client.completions.create(model="fake", prompt=[7, 8])
        chunks = [*client.completions.create(model="fake", prompt=["one", "two"], stream=True)]
    assert [(choice.index, choice.text) for choice in both.choices] == [(0, "1"), (1, "1"), (2, "22"), (3, "22")]
    assert both.usage.prompt_tokens == 6
    assert tokens.choices[0].text == "78"
    told = ["", ""]
    for chunk in chunks:
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == ["1", "22"]


def test_log_probabilities_of_completions(either):
    with either("ab").openai() as client:
        (whole,) = client.completions.create(model="fake", prompt="x", logprobs=2).choices
        chunks = [*client.completions.create(model="fake", prompt="x", logprobs=2, stream=True)]
    told = whole.logprobs
    assert "prompt_logprobs" not in whole.model_extra
    assert told.tokens == ["a", "b", "</s>"]
    assert told.token_logprobs == [-1.0] * 3
    assert told.top_logprobs[0] == {"a": -1.0, "\x00": -2.0}
    assert told.text_offset == [0, 1, 2]
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for each in streamed for token in each.tokens] == told.tokens
    assert [offset for each in streamed for offset in each.text_offset] == told.text_offset


def test_a_prompt_that_comes_before_its_answer(either):
    with either("bc").openai() as client:
        assert client.completions.create(model="fake", prompt="a", echo=True).choices[0].text == "abc"
        assert client.completions.create(model="fake", prompt=[*b"xy"], echo=True).choices[0].text == "xybc"
        assert client.completions.create(model="fake", prompt="a", echo=True, max_tokens=0).choices[0].text == "a"
        chunks = [*client.completions.create(model="fake", prompt="a", echo=True, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"


def test_models(either):
    with either("x", http={"served_model_name": ("alias",)}).openai() as client:
        assert [model.id for model in client.models.list()] == ["alias", "fake"]
        assert client.models.retrieve("fake").max_model_len == 4096
        assert _chat(client, model="alias").model == "alias"
        assert client.post("/chat/completions", body={"messages": MESSAGES}, cast_to=dict)["model"] == "alias"
        with pytest.raises(openai.NotFoundError, match="served: alias, fake"):
            _chat(client, model="gpt")
        with pytest.raises(openai.NotFoundError, match="served: alias, fake"):
            client.models.retrieve("gpt")


def test_what_is_refused_has_the_status_and_the_field(either):
    with either("x").openai() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            _chat(client, max_completion_tokens=-1)
        assert refused.value.param == "max_completion_tokens"
        assert refused.value.code == "invalid_request"
        with pytest.raises(openai.BadRequestError) as refused:
            _chat(client, temperature=-1.0, stream=True)
        assert refused.value.param == "temperature"


def test_a_client_tries_again_when_it_is_told_to(either):
    house = either("Hello")
    house.refuse(Overloaded("full"), retry_after_s=0.01, times=2)
    with house.openai(max_retries=2) as client:
        assert _chat(client).choices[0].message.content == "Hello"
    assert len(house.requests) == 3
    house.refuse(Draining("full"), retry_after_s=0.01)
    with house.openai() as client, pytest.raises(openai.InternalServerError) as refused:
        _chat(client)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after-ms"] == "10"
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.response.headers["x-should-retry"] == "true"


def test_a_client_does_not_try_again_what_is_wrong(either):
    house = either("Hello")
    with house.openai(max_retries=2) as client, pytest.raises(openai.BadRequestError) as refused:
        _chat(client, temperature=-1.0)
    assert refused.value.response.headers["x-should-retry"] == "false"
