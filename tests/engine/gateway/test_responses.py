"""Events of /v1/responses, held against the types of OpenAI's own client, and put together by it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import ConfigDict, TypeAdapter

from cierzo.engine.errors import CoreFailed, InvalidRequest, Overloaded
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.gateway.responses import ResponseEvents, response_head
from cierzo.engine.gateway.token_words import TokenWords
from cierzo.engine.messages import Delta, Final, Part, SampleEnd, Timings, TokenLogprobs, Usage
from cierzo.testing import FakeAnswer, FakeServer

EVENT = TypeAdapter(ResponseStreamEvent, config=ConfigDict(defer_build=True))
GIVEN = {"instructions": "Be brief.", "temperature": 0.5, "tools": [{"type": "function", "name": "f"}]}
CALL = Part(kind="call", name="wind", id="abcdefghi", text='{"a": 1}', num_tokens=3)


class Letters(TokenWords):
    """Words of tokens that are letters, by their numbers in ASCII."""

    def bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id])


def started(words: TokenWords | None = None) -> ResponseEvents:
    return ResponseEvents(response_head("resp_1", 1_700_000_000, "tiny", GIVEN), words)


def final(reason: str = "stop", tokens: int = 0, **fields: Any) -> Final:
    end = SampleEnd(sample=0, finish_reason=reason, output_tokens=tokens, **fields)
    usage = Usage(prompt_tokens=7, output_tokens=tokens, cached_tokens=4)
    return Final(stream=1, samples=[end], usage=usage, timings=Timings(0.0, 0.0, 0.0, 0.0), seed=1)


def read(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name."""
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        name, body = block.split("\n")
        events.append(json.loads(body.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> Response:
    """The response as OpenAI's client makes it of events, each one of its types; deltas say what the
    whole items say."""
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    texts: dict[int, str] = {}
    for event in events:
        typed = EVENT.validate_python(event)
        assert typed.to_dict(mode="json", exclude_unset=True) == event
        state.handle_event(typed)
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
        if event["type"].endswith(("_text.done", "arguments.done")):
            assert texts.get(event["output_index"], "") == event.get("text", event.get("arguments"))
    response = Response.model_validate(events[-1]["response"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert events[-1]["response"]["output"] == done
    assert [item["id"] for item in done] == added
    assert len(set(added)) == len(added)
    return response


def told(response: Response) -> list[tuple[str, str]]:
    """What each item of the output says."""
    said = []
    for item in response.output:
        text = item.arguments if item.type == "function_call" else "".join(part.text for part in item.content)
        said.append((item.type, text))
    return said


# --- the shape of a stream -----------------------------------------------------------------------------------


def test_a_text_is_told_in_the_order_that_clients_expect() -> None:
    events = started()
    data = events.begin(7) + events.take([Delta(stream=1, token_ids=[1], text="Hel")])
    data += events.take([Delta(stream=1, token_ids=[2]), Delta(stream=1, token_ids=[3], text="lo")])
    data += events.end(final(tokens=3))
    heard = read(data)
    assert [event["type"].removeprefix("response.") for event in heard] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]
    response = put_together(heard)
    assert (response.output_text, response.status, response.id) == ("Hello", "completed", "resp_1")
    assert (response.instructions, response.temperature) == ("Be brief.", 0.5)
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 3, 10)
    assert usage.input_tokens_details.cached_tokens == 4
    assert heard[0]["response"]["output"] == []
    assert heard[0]["response"]["status"] == "in_progress"


def test_thoughts_texts_and_calls_are_items_of_their_own() -> None:
    events, thought = started(), Part(kind="thinking", text="hm", num_tokens=2)
    data = events.begin()
    data += events.take(
        [Delta(stream=1, token_ids=[1, 2, 3], text="So.", parts=[thought, Part(kind="text", text="So.")])]
    )
    first, rest = Part(kind="call", name="wind", id="abcdefghi"), Part(kind="call", text='{"a": 1}')
    other = Part(kind="call", call=1, name="rain", id="bcdefghij", text="{}")
    data += events.take([Delta(stream=1, parts=[first]), Delta(stream=1, parts=[rest, other])])
    data += events.end(final("tool_calls", 9))
    response = put_together(read(data))
    assert told(response) == [
        ("reasoning", "hm"),
        ("message", "So."),
        ("function_call", '{"a": 1}'),
        ("function_call", "{}"),
    ]
    calls = [(item.name, item.call_id, item.status) for item in response.output[2:]]
    assert calls == [("wind", "abcdefghi", "completed"), ("rain", "bcdefghij", "completed")]
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == events.thought_tokens == 2


def test_a_call_whose_id_comes_last_waits_for_it() -> None:
    """Some models write the id behind the arguments, and a call cannot be announced without it."""
    events = started()
    pieces = [Part(kind="call", name="f"), Part(kind="call", text="{}"), Part(kind="call", id="abcdefghi")]
    heard = read(events.begin() + events.take([Delta(stream=1, parts=pieces[:2])]))
    assert len(heard) == 2
    heard += read(events.take([Delta(stream=1, parts=pieces[2:])]) + events.end(final("tool_calls")))
    (call,) = put_together(heard).output
    assert (call.call_id, call.arguments, call.name) == ("abcdefghi", "{}", "f")


def test_an_answer_without_output_is_one() -> None:
    events = started()
    response = put_together(read(events.begin() + events.end(final())))
    assert (response.output, response.output_text, response.status) == ([], "", "completed")


def test_an_empty_thought_is_an_item_and_a_text_without_letters_is_none() -> None:
    events = started()
    parts = [
        Part(kind="thinking", num_tokens=2),
        Part(kind="text", num_tokens=1),
        Part(kind="call", name="f", id="a" * 9),
    ]
    data = events.begin() + events.take([Delta(stream=1, token_ids=[1, 2, 3], parts=parts)])
    response = put_together(read(data + events.end(final("length", 3))))
    assert told(response) == [("reasoning", ""), ("function_call", "")]


# --- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ['{"a": 1', "", "[1]"])
def test_a_call_that_is_none_is_incomplete(arguments: str) -> None:
    events = started()
    broken = Part(kind="call", name="f", id="abcdefghi", text=arguments)
    data = events.begin() + events.take([Delta(stream=1, parts=[broken, Part(kind="text", text="x")])])
    response = put_together(read(data + events.end(final(broken_calls=[0]))))
    assert [item.status for item in response.output] == ["incomplete", "completed"]


def test_an_answer_that_is_too_long_is_incomplete() -> None:
    events = started()
    data = events.begin() + events.take([Delta(stream=1, token_ids=[1], text="a")])
    heard = read(data + events.end(final("length", 1)))
    response = put_together(heard)
    assert heard[-1]["type"] == "response.incomplete"
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


@pytest.mark.parametrize(
    ("reason", "message", "expected", "param"),
    [
        ("deadline", "", "its deadline passed before the answer was complete", "deadline_s"),
        ("cancelled", "", "it was cancelled before the answer was complete", None),
        ("failed", "no token is left", "a step of the model failed: no token is left", None),
    ],
)
def test_an_end_that_was_not_planned_is_a_failure(
    reason: str, message: str, expected: str, param: str | None
) -> None:
    events = started()
    data = events.begin() + events.take([Delta(stream=1, token_ids=[1], text="a")])
    heard = read(data + events.end(final(reason, 1, message=message)))
    response = put_together(heard)
    assert heard[-1]["type"] == "response.failed"
    assert (response.status, response.error.code, response.error.message) == ("failed", "server_error", expected)
    assert response.error.param == param
    assert response.usage.output_tokens == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CoreFailed("dead"), "server_error"),
        (Overloaded("full", field="max_kept_bytes"), "rate_limit_exceeded"),
        (InvalidRequest("no", field="input"), "invalid_prompt"),
    ],
)
def test_an_error_within_the_stream_tells_what_came_before_it(error: Exception, code: str) -> None:
    events = started()
    data = events.begin() + events.take([Delta(stream=1, token_ids=[1], text="a")]) + events.fail(error)
    response = put_together(read(data))
    assert (response.status, response.error.code, response.error.message) == ("failed", code, error.message)
    assert (response.error.param, response.output_text) == (error.field, "a")
    assert response.output[0].status == "incomplete"


def test_an_answer_without_deltas_is_the_same_response() -> None:
    parts = [Part(kind="thinking", text="hm", num_tokens=1), Part(kind="text", text="So.", num_tokens=2), CALL]
    deltas, whole = started(), started()
    deltas.begin()
    deltas.take([Delta(stream=1, token_ids=[*range(6)], text="So.", parts=parts)])
    deltas.end(final("tool_calls", 6))
    end = final("tool_calls", 6, token_ids=[*range(6)], text="So.", parts=parts)
    put_together(read(whole.begin() + whole.end(end)))
    assert deltas.response == whole.response
    assert Response.model_validate(whole.response).output_text == "So."


# --- log-probabilities ---------------------------------------------------------------------------------------


def entry(char: str) -> TokenLogprobs:
    return TokenLogprobs(ord(char), -0.5, [ord(char), ord("z")], [-0.5, float("-inf")])


def test_log_probabilities_are_those_of_the_texts_tokens() -> None:
    """Tokens of thoughts and markers are others', and a token whose letter is held back comes with it."""
    events = started(Letters())
    parts = [Part(kind="thinking", text="t", num_tokens=2), Part(kind="text", num_tokens=1)]
    data = events.begin()
    logprobs = [entry(char) for char in "<t>"]
    data += events.take([Delta(stream=1, token_ids=[1, 2, 3], logprobs=logprobs, parts=parts)])
    more = Delta(stream=1, token_ids=[4], text="ab", logprobs=[entry("b")], parts=[])
    data += events.take([more, Delta(stream=1, token_ids=[5], text="c", logprobs=[entry("c")])])
    data += events.take([Delta(stream=1, token_ids=[6], logprobs=[entry("d")])])
    heard = read(data + events.end(final(tokens=6)))
    deltas = [event["logprobs"] for event in heard if event["type"] == "response.output_text.delta"]
    assert [[each["token"] for each in delta] for delta in deltas] == [[">", "b"], ["c"]]
    response = put_together(heard)
    content = response.output[1].content[0]
    assert [each.token for each in content.logprobs] == [">", "b", "c", "d"]
    assert content.logprobs[0].bytes == [ord(">")]
    assert content.logprobs[0].logprob == content.logprobs[0].top_logprobs[0].logprob == -0.5
    assert content.logprobs[0].top_logprobs[1].logprob == -9999.0


def test_log_probabilities_that_nobody_asked_for_are_not_told() -> None:
    events = started()
    data = events.begin() + events.take([Delta(stream=1, token_ids=[97], text="a", logprobs=[entry("a")])])
    response = put_together(read(data + events.end(final(tokens=1))))
    assert response.output[0].content[0].logprobs == []


# --- however it is cut ---------------------------------------------------------------------------------------

PARTS = st.lists(
    st.one_of(
        st.builds(Part, kind=st.just("text"), text=st.text(min_size=1, max_size=6), num_tokens=st.integers(0, 3)),
        st.builds(Part, kind=st.just("thinking"), text=st.text(max_size=6), num_tokens=st.integers(1, 3)),
        st.builds(
            Part,
            kind=st.just("call"),
            name=st.just("f"),
            text=st.sampled_from(["{}", '{"a": [1, 2]}', '{"a"']),
            num_tokens=st.integers(0, 3),
        ),
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, data=st.data())
def test_however_an_answer_is_cut_its_items_are_its_parts(parts: list[Part], data: st.DataObject) -> None:
    parts = [
        part if part.kind != "call" else Part(kind="call", call=n, name="f", id=f"id{n:07}", text=part.text)
        for n, part in enumerate(parts)
    ]
    events, answer, stream = started(), Answer(), b""
    stream += events.begin()
    for part in parts:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(part.text)), max_size=3)) | {0, len(part.text)})
        for number, (start, end) in enumerate(pairwise(cuts) if len(cuts) > 1 else [(0, 0)]):
            first = {"name": part.name, "id": part.id} if not number else {}
            tokens = part.num_tokens if not number else 0
            piece = Part(kind=part.kind, call=part.call, text=part.text[start:end], num_tokens=tokens, **first)
            delta = Delta(stream=1, token_ids=[1] * tokens, parts=[piece])
            stream += events.take([delta])
            answer.add_all([delta])
    response = put_together(read(stream + events.end(final(tokens=1))))
    names = {"text": "message", "thinking": "reasoning", "call": "function_call"}
    assert told(response) == [(names[part.kind], part.text) for part in answer.parts]
    assert events.thought_tokens == sum(part.num_tokens for part in parts if part.kind == "thinking")


def test_a_served_answer_comes_out_whole() -> None:
    said = FakeAnswer(thinking="Let me see.", text="Wind, then.", calls=[("wind", {"at": "sea"})])
    tools = [{"name": "wind", "parameters": {"type": "object"}}]
    turns = [{"role": "user", "content": "Wind?"}]
    with FakeServer(said) as server, SyncClient(server.address) as client:
        events = started()
        generation = client.generate(messages=turns, tools=tools)
        stream = events.begin() + b"".join(events.take([delta]) for delta in generation)
        streamed = put_together(read(stream + events.end(generation.final)))
        whole = started()
        whole.begin()
        whole.end(client.complete(messages=turns, tools=tools))
    assert told(streamed) == [
        ("reasoning", "Let me see."),
        ("message", "Wind, then."),
        ("function_call", '{"at": "sea"}'),
    ]
    call = streamed.output[2]
    assert (call.name, len(call.call_id)) == ("wind", 9)
    assert streamed.usage.output_tokens_details.reasoning_tokens > 0
    assert told(Response.model_validate(whole.response)) == told(streamed)
