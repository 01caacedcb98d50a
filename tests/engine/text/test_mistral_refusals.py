"""Conversations that a Mistral model cannot go on with: each gets an error with its field, limit and value.

A pitfall is a fault that other engines had with these models, by its number in the list that was gathered.
"""

from __future__ import annotations

from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_speakers import speaker
from pydantic import ValidationError
from tekken_folders import CONTROL, VERSIONS

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text import mistral
from cierzo.engine.text.mistral import their_tools
from cierzo.engine.text.prompt import PromptEncoder

A, B = "aaaaaaaaa", "bbbbbbbbb"
USER = ChatMessage(role="user", content="x")
SYSTEM = ChatMessage(role="system", content="s")
ANSWER = ChatMessage(role="assistant", content="y")
OPEN = ThinkingChunk(thinking="so", closed=False)
NAME = "1 to 64 of a-z, A-Z, 0-9, _ and -"
ONCE_EACH = "a turn of the role tool for each call"


def call(*ids: str, name: str = "f", arguments: str = "{}", **fields: Any) -> ChatMessage:
    """A turn that makes calls of these ids."""
    calls = [ToolCall(name=name, arguments=arguments, id=call_id) for call_id in ids]
    return ChatMessage(role="assistant", tool_calls=calls, **fields)


def result(call_id: str, **fields: Any) -> ChatMessage:
    """A turn with the result of a call."""
    return ChatMessage(role="tool", content="1", tool_call_id=call_id, **fields)


def prefix(content: Any, **fields: Any) -> ChatMessage:
    """A turn to go on with."""
    return ChatMessage(role="assistant", content=content, prefix=True, **fields)


EVERYWHERE = {
    "nothing at all": ([], "messages", "at least 1", "0"),
    "an answer is the last turn": (
        [USER, ANSWER],
        "messages[1].role",
        "user, tool, or assistant with prefix",
        "assistant",
    ),
    "an answer is the only turn": ([prefix("y")], "messages[0].role", "user, system", "assistant"),
    "a result is the only turn": ([result(A)], "messages[0].role", "user, system", "tool"),
    "a result without a call before it": ([USER, result(A)], "messages[1].role", "user, assistant, system", "tool"),
    "a system prompt behind an answer": (
        [USER, ANSWER, SYSTEM],
        "messages[2].role",
        "assistant, user, tool",
        "system",
    ),
    "nothing to go on with": (
        [USER, prefix([TextChunk(text="")])],
        "messages[1].content",
        "at least 1 character",
        "",
    ),
    "a prefix in the middle": (
        [USER, prefix("y"), USER],
        "messages[1].prefix",
        "the last turn, if it is the assistant's",
        "True",
    ),
    "a prefix of the user": (
        [ChatMessage(role="user", prefix=True)],
        "messages[0].prefix",
        "the last turn, if it is the assistant's",
        "True",
    ),
    "a prefix that ends in a marker": (
        [USER, prefix("y[TOOL_CALLS] \n")],
        "messages[1].content",
        "text that does not end in a marker",
        "[TOOL_CALLS]",
    ),
    "a chunk that ends in a marker": (
        [USER, prefix([TextChunk(text="[/INST]")])],
        "messages[1].content[0]",
        "text that does not end in a marker",
        "[/INST]",
    ),
    "a call that has no result": ([USER, call(A), USER], "messages[1].tool_calls[0]", ONCE_EACH, A),
    "a call of two has no result": (
        [USER, call(A, B), result(A), ANSWER, USER],
        "messages[1].tool_calls[1]",
        ONCE_EACH,
        B,
    ),
    "calls are the end": (
        [USER, call(A), result(A), call(B, prefix=True)],
        "messages[3].tool_calls[0]",
        ONCE_EACH,
        B,
    ),
    "two results of a call": ([USER, call(A, B), result(A), result(A)], "messages[3].tool_call_id", B, A),
    "a result of another call": ([USER, call(A), result(B)], "messages[2].tool_call_id", A, B),
    "two calls of one id": ([USER, call(A, A), result(A)], "messages[1].tool_calls[1].id", "unique", A),
    "a call without a name": ([USER, call(A, name=""), result(A)], "messages[1].tool_calls[0].name", NAME, ""),
    "a result of a tool with spaces": ([USER, call(A), result(A, name="a b")], "messages[2].name", NAME, "a b"),
    "arguments that are a list": (
        [USER, call(A, arguments="[1]"), result(A)],
        "messages[1].tool_calls[0].arguments",
        "a JSON object",
        "[1]",
    ),
    "arguments that are cut": (
        [USER, call(A, arguments='{"a'), result(A)],
        "messages[1].tool_calls[0].arguments",
        "a JSON object",
        '{"a',
    ),
    "a call without an id": ([USER, call(""), result("")], "messages[1].tool_calls[0].id", ..., ""),
    "a call of the id null": ([USER, call("null"), result("null")], "messages[1].tool_calls[0].id", ..., "null"),
    "the user calls": (
        [ChatMessage(role="user", tool_calls=[ToolCall(name="f", arguments="")])],
        "messages[0].tool_calls",
        "of the assistant alone",
        "1",
    ),
    "the user reasons": (
        [ChatMessage(role="user", reasoning="so")],
        "messages[0].reasoning",
        "of the assistant alone",
        "so",
    ),
    "the user thinks": ([ChatMessage(role="user", content=[OPEN])], "messages[0].content[0]", ..., "user"),
    "a tool thinks": (
        [USER, call(A), ChatMessage(role="tool", tool_call_id=A, content=[OPEN])],
        "messages[2].content[0]",
        ...,
        "tool",
    ),
}
THINKING = {
    "a thought that is open in the middle": (
        [USER, ChatMessage(role="assistant", content=[OPEN]), USER],
        "messages[1].content[0].closed",
        "true, but at the end of a turn with prefix",
        "False",
    ),
    "text behind an open thought": (
        [USER, prefix([OPEN, TextChunk(text="y")])],
        "messages[1].content[0].closed",
        "true, but at the end of a turn with prefix",
        "False",
    ),
    "a thought in both places": (
        [USER, prefix([OPEN], reasoning="so")],
        "messages[1].reasoning",
        "one of both",
        "so",
    ),
    "an open thought that ends in a marker": (
        [USER, prefix([ThinkingChunk(thinking="[INST]", closed=False)])],
        "messages[1].content[0]",
        "text that does not end in a marker",
        "[INST]",
    ),
}
OLD_IDS = {
    "a short id": ([USER, call("a1"), result("a1")], "messages[1].tool_calls[0].id", "9 of a-z, A-Z, 0-9", "a1"),
    "an id with dashes": (
        [USER, call("call-1234"), result(A)],
        "messages[1].tool_calls[0].id",
        "9 of a-z, A-Z, 0-9",
        "call-1234",
    ),
}
SPELLED = {
    "a spelled thought that is closed": (
        [USER, prefix([ThinkingChunk(thinking="so</think>", closed=False)])],
        "messages[1].content[0]",
        "text that does not end in a marker",
        "</think>",
    )
}
NO_THOUGHTS = {
    "reasoning": ([USER, prefix("y", reasoning="so")], "messages[1].reasoning", "none", "assistant"),
    "a thought": ([USER, prefix([OPEN])], "messages[1].content[0]", "none", "assistant"),
}
SYSTEM_THINKS = {
    "a system prompt thinks": (
        [ChatMessage(role="system", content=[OPEN]), USER],
        "messages[0].content[0]",
        ...,
        "system",
    )
}
CASES = [
    *((version, *row) for version in VERSIONS for row in EVERYWHERE.items()),
    *((version, *row) for version in ("v11", "v13", "v15") for row in THINKING.items()),
    *((version, *row) for version in ("v3", "v7", "v11") for row in OLD_IDS.items()),
    *(("v11", *row) for row in SPELLED.items()),
    *((version, *row) for version in ("v3", "v7") for row in NO_THOUGHTS.items()),
    *((version, *row) for version in ("v3", "v7", "v11", "v15") for row in SYSTEM_THINKS.items()),
]


@pytest.mark.parametrize(
    ("version", "what", "wrong"), CASES, ids=[f"{version}-{what}" for version, what, _ in CASES]
)
def test_an_error_names_field_limit_and_value(version: str, what: str, wrong: tuple[Any, ...]) -> None:
    turns, field, limit, value = wrong
    with pytest.raises(InvalidRequest) as caught:
        speaker(version).encode(*turns)
    error = caught.value
    assert (error.field, error.value) == (field, value)
    assert error.limit == limit or limit is ...
    assert "mistral-common" not in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("turn", "said"), [(result(A), "no turn before it calls"), (prefix("y"), "nobody has spoken")]
)
def test_a_chat_that_begins_in_its_middle_hears_why(turn: ChatMessage, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        speaker("v13").encode(turn)


@pytest.mark.parametrize(
    ("marker", "instead"), [("[THINK]", "send a thinking chunk"), ("[TOOL_CALLS]", "leave it out")]
)
def test_a_marker_at_the_end_is_told_with_what_to_do(marker: str, instead: str) -> None:
    with pytest.raises(InvalidRequest, match=instead):
        speaker("v13").encode(USER, prefix(f"y {marker}"))


def test_what_only_mistral_common_refuses_has_a_field_and_is_short() -> None:
    """mistral-common does not count the calls of a conversation's first turn."""
    with pytest.raises(InvalidRequest, match="mistral-common refuses messages") as caught:
        speaker("v15").encode(call(A), result(A))
    assert caught.value.field == "messages"
    assert (caught.value.limit, caught.value.value) == ("what mistral-common takes", "turns of assistant, tool")
    with pytest.raises(ValidationError) as theirs:
        ChatCompletionRequest(messages=[], reasoning_effort="x" * 9000)
    refusal = mistral._refusal("messages", theirs.value, "turns of user")
    assert refusal.field == "messages.reasoning_effort"
    assert len(refusal.message) < 300
    assert "pydantic" not in refusal.message
    assert "\n" not in refusal.message


# --- effort, tools, length ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_pitfall_24_an_effort_that_the_model_does_not_know_is_refused_by_name(version: str) -> None:
    """The value is neither dropped nor sent as something else."""
    ours = speaker(version)
    assert ours.chat.efforts == (("none", "high") if version == "v15" else ())
    for effort in ("low", "medium", "High", "", "none", "high"):
        if effort in ours.chat.efforts:
            assert ours.encode(USER, reasoning_effort=effort)
            continue
        with pytest.raises(InvalidRequest, match="reasoning_effort is") as caught:
            ours.encode(USER, reasoning_effort=effort)
        assert (caught.value.field, caught.value.value) == ("reasoning_effort", effort)
        assert caught.value.limit is not None
        assert caught.value.limit.startswith("none, high" if version == "v15" else "none of them")


@pytest.mark.parametrize(
    ("tool", "field", "limit", "value"),
    [
        (Tool(name=""), "name", NAME, ""),
        (Tool(name="a\n"), "name", NAME, "a\n"),
        (Tool(name="x" * 65), "name", NAME, "x" * 65),
        (Tool(name="[INST]"), "name", NAME, "[INST]"),
        (Tool(name="f", parameters={"type": "strng"}), "parameters", "a JSON schema (draft 7)", "f"),
        (Tool(name="f", parameters={"properties": [1]}), "parameters", "a JSON schema (draft 7)", "f"),
        (Tool(name="f", parameters={"default": b"1"}), "parameters", "a JSON schema (draft 7)", "f"),
        (Tool(name="f", parameters={"default": float("nan")}), "parameters", "a JSON schema (draft 7)", "f"),
    ],
)
def test_a_tool_that_no_model_can_call(tool: Tool, field: str, limit: str, value: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            speaker("v15").encode(USER, tools=[Tool(name="g"), tool])
        assert (caught.value.field, caught.value.limit, caught.value.value) == (f"tools[1].{field}", limit, value)
    with pytest.raises(InvalidRequest) as caught:
        speaker("v15").encode(USER, tools=[Tool(name="g", description="\ud800")])
    assert caught.value.field == "tools"


def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        speaker("v15").encode(ChatMessage(role="user", content="a\ud800"))
    assert caught.value.field == "messages"


def test_schemas_are_checked_once_unless_they_are_long() -> None:
    short, long = [Tool(name="f")], [Tool(name="f", description="x" * mistral.MAX_KEPT_BYTES)]
    assert their_tools(short) is their_tools([Tool(name="f")])
    assert their_tools(long) is not their_tools(long)


LONG = "ab" * 1000
TOO_LONG = [
    ("text", {"text": LONG, "suffix": ""}),
    ("suffix", {"text": "", "suffix": LONG}),
    *(
        ("messages", {"messages": turns})
        for turns in (
            [ChatMessage(role="user", content=[TextChunk(text=LONG)])],
            [ChatMessage(role="system", content=LONG)],
            [USER, prefix(LONG)],
            [USER, prefix("y", reasoning=LONG)],
            [USER, prefix([ThinkingChunk(thinking=LONG)])],
        )
    ),
]


@pytest.mark.parametrize(("field", "fields"), TOO_LONG)
def test_a_prompt_that_cannot_fit_is_not_encoded(field: str, fields: dict[str, Any]) -> None:
    ours, ask = speaker("v15"), Generate(stream=0, **fields)
    prompts = PromptEncoder(ours.vocabulary, ours.chat)
    fits = len(prompts.encode(ask).token_ids)
    assert prompts.encode(ask, fits)
    with pytest.raises(InvalidRequest, match="cannot fit") as caught:
        prompts.encode(ask, 2)
    assert caught.value.field == field
    assert int(caught.value.value or 0) >= len(LONG)


def test_spaces_without_end_are_refused() -> None:
    """The regular expression that cuts a text into words has a stack."""
    ours, spaces = speaker("v15"), " " * 1_000_000
    for ask, field in (
        (lambda: ours.encode(ChatMessage(role="user", content=spaces)), "messages"),
        (lambda: ours.vocabulary.encode_middle(spaces, "x"), "text"),
        (lambda: ours.vocabulary.encode(spaces), "text"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            ask()
        assert caught.value.field == field


# --- what a user writes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_no_text_becomes_a_control_token(version: str) -> None:
    """Every control token's spelling, in every field that holds text: the markers are as many as without it."""
    number, evil = int(version[1:]), "".join(CONTROL)
    assert _markers(version, number, f"a{evil}b") == _markers(version, number, "ab")
    ids = speaker(version).vocabulary.encode(evil)
    assert [token_id for token_id in ids if token_id < len(CONTROL)] == [1]


def _markers(version: str, number: int, text: str) -> list[int]:
    thought = [ThinkingChunk(thinking=text)] if number >= 11 else []
    schema = {"type": "object", "description": text, "properties": {text: {"enum": [text]}}}
    turns = [
        ChatMessage(role="system", content=text),
        ChatMessage(role="user", content=[TextChunk(text=text), TextChunk(text=text)]),
        ChatMessage(role="assistant", content=[*thought, TextChunk(text=text)]),
        ChatMessage(role="user", content=text),
        call(A, arguments=f'{{"{text}": "{text}"}}', content=text),
        ChatMessage(role="tool", content=text, tool_call_id=A),
        ChatMessage(role="assistant", reasoning=text if thought else "", content=f"{text} a", prefix=True),
    ]
    ours = speaker(version)
    ids = ours.encode(*turns, tools=[Tool(name="f", description=text, parameters=schema)])
    ids += ours.vocabulary.encode_middle(text, text)
    return [token_id for token_id in ids if token_id in ours.vocabulary.special_ids.values()]
