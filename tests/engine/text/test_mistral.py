"""Prompts of Mistral's models: the ids are those of mistral-common, for each version of its tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.fim.request import FIMRequest
from mistral_speakers import speaker
from tekken_folders import CONTROL, NUM_SPECIAL, VERSIONS, tekken, write_tekken

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text.tekken import load_tekken

HI = ChatMessage(role="user", content="Hi")
WORDS = st.text(st.sampled_from('ab \n\t{}":,é日\U0001f642'), max_size=10)
TEXTS = WORDS | st.builds("".join, st.tuples(WORDS, st.sampled_from(CONTROL), WORDS))
IDS = st.text(st.sampled_from("aZ09"), min_size=9, max_size=9)
NAMES = st.text(st.sampled_from("az-_09"), min_size=1, max_size=6)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | WORDS, lambda inner: st.lists(inner, max_size=2))
ARGUMENTS = st.dictionaries(WORDS, VALUES, max_size=2).map(lambda value: json.dumps(value, ensure_ascii=False))
CONTENTS = TEXTS | st.lists(st.builds(TextChunk, text=TEXTS), min_size=1, max_size=3)
PARAMETERS = st.sampled_from([{}, {"type": "object", "properties": {"é": {"type": "string"}, "a": {}}}])
TOOLS = st.lists(st.builds(Tool, name=NAMES, description=TEXTS, parameters=PARAMETERS), max_size=2)


@st.composite
def answers(draw: st.DrawFn, number: int) -> list[ChatMessage]:
    """An answer of the assistant, and the results of its calls in any order."""
    ids = draw(st.lists(IDS, unique=True, max_size=3))
    calls = [ToolCall(id=call_id, name=draw(NAMES), arguments=draw(ARGUMENTS)) for call_id in ids]
    content = "" if calls and (number < 7 or draw(st.booleans())) else draw(CONTENTS.filter(_says_something))
    reasoning = ""
    if number >= 13 and draw(st.booleans()):
        if isinstance(content, str):
            reasoning = draw(TEXTS)
        else:
            content = [ThinkingChunk(thinking=draw(TEXTS)), *content]
    turn = ChatMessage(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)
    results = [
        ChatMessage(role="tool", tool_call_id=call_id, content=draw(CONTENTS), name=draw(st.just("") | NAMES))
        for call_id in draw(st.permutations(ids))
    ]
    return [turn, *results]


@st.composite
def conversations(draw: st.DrawFn, number: int) -> list[ChatMessage]:
    """Turns that a model of this version of the tokenizer can go on with."""
    turns = [ChatMessage(role="system", content=content) for content in draw(st.lists(CONTENTS, max_size=2))]
    for _ in range(draw(st.integers(0 if turns else 1, 3))):
        turns += [ChatMessage(role="user", content=draw(CONTENTS)) for _ in range(draw(st.integers(1, 2)))]
        for _ in range(draw(st.integers(0, 2))):
            more = draw(answers(number))
            if number >= 7 or turns[-1].role != "assistant" or not more[0].tool_calls:
                turns += more
    if turns[-1].role == "assistant":
        turns.append(HI)
    if len(turns) > 1 and draw(st.booleans()):
        turns.append(ChatMessage(role="assistant", prefix=True, content=draw(TEXTS) + "a"))
        if number >= 13 and draw(st.booleans()):
            thought = ThinkingChunk(thinking=draw(TEXTS) + "a", closed=False)
            turns[-1] = ChatMessage(role="assistant", prefix=True, content=[thought])
    return turns


def _says_something(content: str | list[TextChunk]) -> bool:
    return any(content) if isinstance(content, str) else any(chunk.text for chunk in content)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ids_of_conversations_are_mistral_commons(version: str, data: st.DataObject) -> None:
    turns, tools = data.draw(conversations(int(version[1:]))), data.draw(TOOLS)
    effort = data.draw(st.sampled_from([None, "none", "high"])) if version == "v15" else None
    ours = speaker(version).encode(*turns, tools=tools, reasoning_effort=effort)
    assert ours == speaker(version).encode_theirs(*turns, tools=tools, reasoning_effort=effort)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=40, deadline=None)
@given(prefix=TEXTS, suffix=TEXTS)
def test_ids_to_fill_in_the_middle_are_mistral_commons(version: str, prefix: str, suffix: str) -> None:
    ours = speaker(version).vocabulary.encode_middle(prefix, suffix)
    assert ours == speaker(version).theirs.encode_fim(FIMRequest(prompt=prefix, suffix=suffix)).tokens
    assert (ours[:2], ours.count(14)) == ([1, 16], 1)


def test_a_suffix_that_a_vocabulary_would_spoil_is_refused(tmp_path: Path) -> None:
    """mistral-common cuts off two tokens before it, which stand for one character in the published vocabulary."""
    small, full = speaker("v7"), speaker("v15", full=True)
    for ours in (small, full):
        ids = ours.vocabulary.encode_middle("def f(", "(self):\n")
        assert ours.spell(ids) == "<s>[SUFFIX](self):\n[PREFIX]def f("
    short = tekken("v7")["vocab"][:-1]
    config = tekken("v7")["config"] | {"default_vocab_size": len(short) + NUM_SPECIAL}
    for changes in ({"vocab": short, "config": config}, {"special_tokens": tekken("v7")["special_tokens"][:16]}):
        vocabulary = load_tekken(write_tekken(tmp_path, "v7", **changes))
        with pytest.raises(InvalidRequest, match="fill in the middle") as caught:
            vocabulary.encode_middle("a", "b")
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("suffix", "left out", "b")


# --- Small 4, id by id, in the published vocabulary --------------------------------------------------------

NONE = [36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429, 17670, 46005, 37]
HIGH = [24871 if token_id == 17670 else token_id for token_id in NONE]


def test_settings_stand_before_the_first_turn_of_the_user() -> None:
    small4 = speaker("v15", full=True)
    assert small4.encode(HI) == [1, *NONE, 3, 37133, 4]
    assert small4.encode(HI, reasoning_effort="none") == [1, *NONE, 3, 37133, 4]
    assert small4.encode(HI, reasoning_effort="high") == [1, *HIGH, 3, 37133, 4]
    assert small4.vocabulary.encode("Hello, world!") == [1, 22177, 1044, 4304, 1033]


def test_each_part_stands_where_the_model_learned_it() -> None:
    small4 = speaker("v15", full=True)
    tool = Tool(name="now", description="The time", parameters={"type": "object", "properties": {}})
    turns = [
        ChatMessage(role="system", content="Be short."),
        ChatMessage(role="user", content=[TextChunk(text="What "), TextChunk(text="time?")]),
        ChatMessage(role="user", content="Now!"),
        ChatMessage(
            role="assistant",
            reasoning="Ask.",
            content="Two clocks.",
            tool_calls=[
                ToolCall(name="now", arguments='{"x":  1}', id="a"),
                ToolCall(name="now", arguments="", id="b"),
            ],
        ),
        ChatMessage(role="tool", content="two", tool_call_id="b"),
        ChatMessage(role="tool", content="one", tool_call_id="a"),
        ChatMessage(role="assistant", content=[ThinkingChunk(thinking="So", closed=False)], prefix=True),
    ]
    ids, in_thinking = small4.chat.encode(
        Generate(stream=0, messages=turns, tools=[tool], reasoning_effort="high"), None
    )
    assert in_thinking
    assert small4.spell(ids) == (
        "<s>[SYSTEM_PROMPT]Be short.[/SYSTEM_PROMPT]"
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "now", "description": "The time", '
        '"parameters": {"type": "object", "properties": {}}}}][/AVAILABLE_TOOLS]'
        '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]'
        "[INST]What time?\n\nNow![/INST]"
        '[THINK]Ask.[/THINK]Two clocks.[TOOL_CALLS]now[ARGS]{"x":  1}[TOOL_CALLS]now[ARGS]{}</s>'
        "[TOOL_RESULTS]one[/TOOL_RESULTS][TOOL_RESULTS]two[/TOOL_RESULTS]"
        "[THINK]So"
    )


@pytest.mark.parametrize(
    ("last", "in_thinking", "end"),
    [
        (HI, False, "[INST]Hi\n\nHi[/INST]"),
        (ChatMessage(role="assistant", prefix=True, content="So"), False, "[/INST]So"),
        (ChatMessage(role="assistant", prefix=True, reasoning="So"), False, "[/INST][THINK]So[/THINK]"),
        (ChatMessage(role="assistant", prefix=True, content=[ThinkingChunk(thinking="So")]), False, "So[/THINK]"),
        (
            ChatMessage(role="assistant", prefix=True, content=[ThinkingChunk(thinking="", closed=False)]),
            True,
            "[/INST][THINK]",
        ),
    ],
)
def test_an_answer_goes_on_within_the_last_turn(last: ChatMessage, in_thinking: bool, end: str) -> None:
    small4 = speaker("v15")
    ids, within = small4.chat.encode(Generate(stream=0, messages=[HI, last]), None)
    assert within == in_thinking
    assert small4.spell(ids).endswith(end)
