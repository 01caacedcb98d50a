"""The reader that an answer has, and the names of its calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
from marked import ids

from cierzo.engine.messages import ChatMessage, Generate, SamplingParams, Tool
from cierzo.engine.testing.words import marked_prompts, marked_tokenizer
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import PromptEncoder, call_id
from cierzo.engine.text.syntax import CALL_TAGS, Syntax


def test_a_reader_of_parts_where_they_are_wanted_and_marked():
    marked, unmarked = marked_prompts(), PromptEncoder(marked_tokenizer())
    for encoder, apart, kind in (
        (marked, True, PartsReader),
        (marked, False, Detokenizer),
        (unmarked, True, Detokenizer),
    ):
        assert type(encoder.reader(SamplingParams(), apart=apart)) is kind
    reader = marked.reader(SamplingParams(seed=1), apart=True, in_thinking=True, calls="one")
    assert reader.in_thinking
    reader.push(ids("hm[/THINK][TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]"))
    assert reader.stop == "[TOOL_CALLS]"
    assert reader.parts[-1].id == call_id(1, 0, 0, 0)


def test_who_offers_no_tools_or_wants_no_call_may_get_none():
    turns, tools = [ChatMessage(role="user", content="Hi")], [Tool(name="f")]
    for message, limit in (
        (Generate(stream=1, messages=turns), "none"),
        (Generate(stream=1, messages=turns, tools=tools), "many"),
        (Generate(stream=1, messages=turns, tools=tools, parallel_tool_calls=False), "one"),
        (Generate(stream=1, messages=turns, tools=tools, tool_choice="none"), "none"),
        (Generate(stream=1, text="Hi"), "many"),
        (Generate(stream=1, token_ids=[1], parallel_tool_calls=False), "one"),
    ):
        assert marked_prompts().call_limit(message) == limit


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        (Syntax(bare_calls=True), '{"name": "f", "parameters": {}}'),
        (Syntax(spelled=CALL_TAGS, call_marker="<tool_call>"), '<tool_call>{"name": "f"}</tool_call>'),
    ],
)
def test_what_only_looks_like_a_call_is_text_where_there_may_be_none(syntax, words):
    prompts = replace(marked_prompts(), syntax=syntax)
    for calls, kind in (("many", "call"), ("none", "text")):
        reader = prompts.reader(SamplingParams(), apart=True, calls=calls)
        text = reader.push(ids(words)) + reader.flush()
        assert (text == words, reader.num_calls) == (kind == "text", int(kind == "call"))


def test_the_ids_of_calls_depend_on_seed_prompt_sample_and_number():
    names = [
        call_id(seed, length, sample, number)
        for seed in (None, 0, 1, 2**63 - 1)
        for length in (1, 12)
        for sample in (0, 1)
        for number in (0, 1, 11)
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 9 and name.isalnum() and name.isascii() for name in names)
    assert call_id(1, 12, 0, 0) == call_id(1, 12, 0, 0) == "JL4h5wVNf"


def test_without_a_tokenizer_there_is_none():
    assert PromptEncoder().reader(SamplingParams(), apart=True) is None
