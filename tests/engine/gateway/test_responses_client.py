"""OpenAI's client on /v1/responses."""

from __future__ import annotations

import json

import openai
import pytest
from http_house import MESSAGES, events_of

from cierzo.testing import FakeAnswer

TOOL = {"type": "function", "name": "wind", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
def asking(either):
    def ask(answer, **options):
        with either(answer).openai() as client:
            return client.responses.create(**{"model": "fake", "input": "Hi", "store": False, **options})

    return ask


def test_a_response(asking):
    answer = asking("Hello.")
    assert (answer.output_text, answer.status, answer.object) == ("Hello.", "completed", "response")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (8, 7)
    assert answer.id.startswith("resp_")


def test_thoughts_and_calls(asking):
    answer = asking(FakeAnswer(thinking="Hm.", text="So", calls=[("wind", {"at": "sea"})]), tools=[TOOL])
    thought, text, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
    assert (text.type, text.content[0].text) == ("message", "So")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "wind", {"at": "sea"})
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_an_answer_that_is_too_long(asking):
    answer = asking("Hello.", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_log_probabilities(asking):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = asking("ab", **options).output[0].content
    assert [(entry.token, entry.logprob) for entry in part.logprobs][:2] == [("a", -1.0), ("b", -1.0)]


def test_the_events_of_a_stream(either):
    house = either("Hello.")
    with house.openai() as client:
        events = [*client.responses.create(model="fake", input=MESSAGES, stream=True, store=False)]
        with client.responses.stream(model="fake", input="Hi", store=False) as stream:
            for _ in stream:
                pass
            assert stream.get_final_response().output_text == "Hello."
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello."
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == [*range(len(events))]


def test_a_stream_that_fails(either):
    house = either("x" * 100, token_s=0.02)
    body = {"model": "fake", "input": "Hi", "stream": True, "store": False, "deadline_s": 0.1}
    last = json.loads(events_of(house.post("/v1/responses", body).text)[-1])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    refused = house.post("/v1/responses", body | {"stream": False})
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline")


def test_what_is_refused(asking):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        asking("x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError) as refused:
        asking("x", temperature=-1.0)
    assert refused.value.param == "temperature"


def test_log_probabilities_of_a_response_are_bounded(either, monkeypatch):
    monkeypatch.setattr("cierzo.engine.gateway.endpoints.MAX_ENTRIES", 10)
    house = either("x" * 100)
    body = {"model": "fake", "input": "Hi", "store": False, "top_logprobs": 2}
    body["include"] = ["message.output_text.logprobs"]
    refused = house.post("/v1/responses", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    last = json.loads(events_of(house.post("/v1/responses", body | {"stream": True}).text)[-1])
    assert last["type"] == "response.failed"
