"""Bodies of /v1/responses: items become turns."""

from __future__ import annotations

import json

import msgspec
import pytest
from gateway_rules import RULES, refusal
from openai.types.responses import Response

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.gateway.asked import in_body, read_responses
from cierzo.engine.messages import ChatMessage, TextChunk, Tool, ToolCall

USER = {"role": "user", "content": "What is it?"}
THOUGHT = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {
    "type": "message",
    "id": "m",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Wait.", "annotations": []}],
}
CALL = {"type": "function_call", "id": "c", "call_id": "abcdefghi", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "abcdefghi", "output": "3"}
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": None}


@pytest.fixture
def rules():
    return RULES


def read(rules, given="Hi", **body):
    return read_responses(json.dumps({"input": given, **body}).encode(), rules)


def turns(rules, *items):
    return generate_message(**read(rules, list(items)).arguments).messages


def test_a_text(rules):
    reasoning = {"effort": "high", "summary": "auto"}
    asked = read(rules, instructions="Be brief.", max_output_tokens=7, reasoning=reasoning)
    assert asked.arguments == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 7,
        "reasoning_effort": "high",
        "deltas": False,
    }
    assert asked.endpoint == "responses"
    assert asked.given["instructions"] == "Be brief."
    assert read(rules).arguments["max_tokens"] == 4096


def test_thoughts_text_and_calls_that_follow_each_other_are_one_turn(rules):
    call = ToolCall(id="abcdefghi", name="f", arguments="{}")
    assert turns(rules, USER, THOUGHT, SAID, CALL, RESULT) == [
        ChatMessage(role="user", content="What is it?"),
        ChatMessage(role="assistant", reasoning="Hm.", content=[TextChunk(text="Wait.")], tool_calls=[call]),
        ChatMessage(role="tool", tool_call_id="abcdefghi", content="3"),
    ]
    second = CALL | {"call_id": "bcdefghij"}
    assert turns(rules, USER, CALL, second, RESULT, RESULT | {"call_id": "bcdefghij"})[1].tool_calls == [
        call,
        ToolCall(id="bcdefghij", name="f", arguments="{}"),
    ]


def test_what_begins_a_turn(rules):
    assert [turn.role for turn in turns(rules, USER, SAID, SAID)] == ["user", "assistant", "assistant"]
    assert [turn.reasoning for turn in turns(rules, USER, SAID, THOUGHT, SAID)] == ["", "", "Hm."]
    assert len(turns(rules, USER, CALL, SAID)) == 3
    assert len(turns(rules, THOUGHT, USER, SAID)) == 3
    empty = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]}
    assert len(turns(rules, USER, empty)) == 1
    assert turns(rules, USER, empty, SAID)[1] == ChatMessage(role="assistant", content=[TextChunk(text="Wait.")])


def test_items_are_counted_before_they_are_read(rules):
    few = msgspec.structs.replace(rules, max_turns=2)
    assert len(read(few, [USER, SAID], instructions="Be brief.").arguments["messages"]) == 3
    with pytest.raises(InvalidRequest, match="input has 3 entries, allowed: 2"):
        read(few, ["no item"] * 3)


def test_items_of_every_kind(rules):
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = [
        {"type": "message", "role": "developer", "content": parts},
        {"role": "user", "content": parts, "status": "completed"},
        {"role": "assistant", "content": "c", "phase": "final_answer"},
        CALL,
        RESULT | {"output": parts, "name": "f"},
    ]
    asked = read(rules, items)
    chunks = [TextChunk(text="a"), TextChunk(text="b")]
    assert generate_message(**asked.arguments).messages == [
        ChatMessage(role="system", content=chunks),
        ChatMessage(role="user", content=chunks),
        ChatMessage(role="assistant", content="c", tool_calls=[ToolCall(id="abcdefghi", name="f", arguments="{}")]),
        ChatMessage(role="tool", tool_call_id="abcdefghi", name="f", content=chunks),
    ]
    assert set(asked.passed_over) == {"input.status", "input.phase", "input.id"}


def test_an_answer_of_openai_s_client_is_taken_back(rules):
    answer = Response.model_validate(
        {
            "id": "resp",
            "object": "response",
            "created_at": 0,
            "model": "small4",
            "output": [THOUGHT, SAID, CALL],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
    )
    items = [USER, *(one.model_dump() for one in answer.output), RESULT]
    assert [turn.role for turn in turns(rules, *items)] == ["user", "assistant", "tool"]


def test_log_probabilities(rules):
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    assert read(rules, include=include).logprobs == 0
    assert read(rules, include=include, top_logprobs=3).logprobs == 3
    assert read(rules, top_logprobs=3).logprobs == 3
    assert read(rules, top_logprobs=0).logprobs is None
    assert read(rules, include=["reasoning.encrypted_content"]).logprobs is None


def test_tools(rules):
    asked = read(rules, tools=[TOOL], tool_choice="none", parallel_tool_calls=False)
    message = generate_message(**asked.arguments)
    assert message.tools == [Tool(name="f", description="d", parameters={"type": "object"})]
    assert (message.tool_choice, message.parallel_tool_calls) == ("none", False)


def test_the_harmless_is_passed_over(rules):
    body = {"store": False, "background": False, "truncation": "disabled", "text": {"format": {"type": "text"}}}
    body |= {"stream": True, "stream_options": {"include_obfuscation": False, "include_usage": True}}
    asked = read(rules, **body, metadata={}, max_tool_calls=3)
    assert set(asked.passed_over) == {"metadata", "max_tool_calls", "stream_options.include_usage"}
    assert asked.stream


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"given": None}, "input", "input is missing"),
        ({"given": 3}, "input", "must be a list"),
        ({"given": []}, "input", "input is empty"),
        ({"given": ["Hi"]}, "input[0]", "must be an object"),
        ({"given": [USER] * 5000}, "input", "allowed: 4096"),
        ({"given": [{"content": "x"}]}, "input[0].role", "missing"),
        ({"given": [{"role": "tool", "content": "x"}]}, "input[0].role", "allowed: user, assistant"),
        ({"given": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"given": [{"role": "user", "content": 3}]}, "input[0].content", "must be a list"),
        ({"given": [USER | {"name": "x"}]}, "input[0].name", "unknown field"),
        ({"given": [USER, {"type": "item_reference", "id": "x"}]}, "input[1].type", "stores no answers"),
        ({"given": [{"type": "mcp_call"}]}, "input[0].type", "no tools of its own"),
        ({"given": [{"type": "novel"}]}, "input[0].type", "allowed: message, function_call"),
        ({"given": [THOUGHT | {"encrypted_content": "x"}]}, "input[0].encrypted_content", "made alone"),
        ({"given": [THOUGHT | {"content": [{"type": "text"}]}]}, "input[0].content[0].type", "reasoning_text"),
        (
            {"given": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].image_url",
            "is missing",
        ),
        ({"given": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "missing"),
        ({"given": [USER, CALL | {"arguments": {}}]}, "input[1].arguments", "must be a text"),
        ({"given": [USER, SAID, CALL | {"name": None}]}, "input[2].name", "missing"),
        ({"given": [USER, CALL, CALL]}, "input[2].call_id", "input[2].call_id is that of another call"),
        ({"given": [USER, CALL, RESULT | {"call_id": "x"}]}, "input[2].call_id", "no call of the turn before"),
        ({"given": [USER, RESULT | {"output": None}]}, "input[1].output", "missing"),
        ({"given": [USER, CALL]}, "input[2]", "must be the result of a call"),
        ({"instructions": 3}, "instructions", "must be a text"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort is 'low', allowed: none, high"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "thoughts are told as they are"),
        ({"reasoning": "high"}, "reasoning", "must be an object"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
        ({"include": ["all"]}, "include[0]", "'all', allowed: message.output_text.logprobs"),
        ({"include": [3]}, "include[0]", "'3', allowed: message.output_text.logprobs"),
        ({"include": "all"}, "include", "must be a list"),
        ({"include": [False]}, "include[0]", "'False', allowed: message.output_text.logprobs"),
        ({"n": 2}, "n", "one answer"),
        ({"store": True}, "store", "stores no answers"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no answers"),
        ({"background": True}, "background", "stores no answers"),
        ({"truncation": "auto"}, "truncation", "taken whole"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "'mcp', allowed: function; the server has no"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "there twice"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", "unknown"),
        ({"messages": []}, "messages", "unknown field messages"),
    ],
)  # fmt: skip
def test_what_is_refused(body, field, words):
    error = refusal(read, **body)
    assert (error.field, words in error.message) == (field, True), error.message


def test_places_of_what_is_not_an_item(rules):
    asked = read(rules, instructions="Be brief.")
    for field, place in [("messages[0].content", "instructions"), ("messages[1].content", "input")]:
        assert in_body(InvalidRequest(field, field=field), asked).field == place
