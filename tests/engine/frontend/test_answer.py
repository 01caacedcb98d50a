"""An answer joined from pieces: the same however it was cut; and the turn that it is."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cierzo.engine.frontend.answer import Answer, Answers, as_turn, in_order, joined, tool_calls
from cierzo.engine.messages import (
    Delta,
    Final,
    Part,
    SampleEnd,
    TextChunk,
    ThinkingChunk,
    Timings,
    ToolCall,
    Usage,
)

THOUGHT = Part(kind="thinking", text="let me see", num_tokens=4)
TEXT = Part(kind="text", text="It blows.", num_tokens=5)
WIND = Part(kind="call", text='{"at":  "Zaragoza"}', name="wind", id="abcdefghi", num_tokens=9)
RAIN = Part(kind="call", text='{"at"', call=1, name="rain", id="jklmnopqr", num_tokens=3)

parts = st.lists(st.sampled_from([THOUGHT, TEXT, WIND, RAIN]), max_size=6).map(
    lambda chosen: [part for part, before in zip(chosen, [None, *chosen], strict=False) if part is not before]
)


def cut(draw: random.Random, whole: list[Part]) -> list[Delta]:
    """Deltas of any length that the parts may come in."""
    pieces = []
    for part in whole:
        ends = sorted(draw.choices(range(len(part.text) + 1), k=draw.randint(0, 3)))
        counts = sorted(draw.choices(range(part.num_tokens + 1), k=len(ends)))
        letters = zip([0, *ends], [*ends, None], strict=True)
        tokens = zip([0, *counts], [*counts, part.num_tokens], strict=True)
        for (start, end), (low, high) in zip(letters, tokens, strict=True):
            pieces.append(msgspec.structs.replace(part, text=part.text[start:end], num_tokens=high - low))
    deltas, rest = [], pieces
    while rest:
        count = draw.randint(1, len(rest))
        now, rest = rest[:count], rest[count:]
        text = "".join(piece.text for piece in now if piece.kind == "text")
        is_plain = all(piece.kind == "text" for piece in now) and draw.random() < 0.5
        token_ids = [0] * sum(piece.num_tokens for piece in now)
        deltas.append(Delta(stream=1, token_ids=token_ids, text=text, parts=[] if is_plain else now))
    return deltas


@given(parts, st.integers(0, 2**32))
def test_however_an_answer_is_cut_its_parts_are_the_same(whole, seed):
    answer = Answer()
    for delta in cut(random.Random(seed), whole):
        answer.add(delta)
    assert answer.parts == whole
    assert answer.text == "".join(part.text for part in whole if part.kind == "text")
    assert answer.thinking == "".join(part.text for part in whole if part.kind == "thinking")


def test_a_piece_that_is_nothing_is_no_part():
    """A reader has seen what may become a marker, within a thought."""
    answer = Answer()
    answer.take([Part(kind="thinking", text="a", num_tokens=1)], "", 1)
    answer.take([Part(kind="text")], "", 1)
    answer.take([Part(kind="thinking", text="<b", num_tokens=2)], "", 1)
    assert answer.parts == [Part(kind="thinking", text="a<b", num_tokens=3)]


def test_it_can_be_looked_at_while_it_comes():
    answer = Answer()
    assert (answer.parts, answer.text, answer.thinking, answer.tool_calls) == ([], "", "", [])
    answer.take([], "It ", 1)
    answer.take([], "", 1)
    assert answer.parts == [Part(kind="text", text="It ", num_tokens=2)]
    answer.take([], "blows.", 1)
    assert (answer.text, answer.parts[0].num_tokens) == ("It blows.", 3)


def test_broken_calls_are_parts_and_no_calls():
    answer = Answer()
    answer.take([THOUGHT, WIND, RAIN], "", 16)
    assert (answer.finish_reason, answer.broken_calls) == (None, [])
    answer.end(SampleEnd(sample=0, finish_reason="length", output_tokens=16, broken_calls=[1]))
    assert (answer.finish_reason, answer.broken_calls) == ("length", [1])
    assert answer.tool_calls == [ToolCall(name="wind", arguments='{"at":  "Zaragoza"}', id="abcdefghi")]
    assert answer.parts == [THOUGHT, WIND, RAIN]
    assert answer.turn.tool_calls == answer.tool_calls
    assert tool_calls([WIND], [0]) == [], "the server knows what stood around the arguments"


def test_why_it_failed_is_told():
    answer = Answer()
    assert answer.message == ""
    answer.end(
        SampleEnd(sample=0, finish_reason="failed", output_tokens=0, message="nothing left", incomplete=True)
    )
    assert (answer.finish_reason, answer.message, answer.incomplete) == ("failed", "nothing left", True)


def test_a_call_is_one_when_nothing_can_be_added_to_it():
    answer = Answer()
    answer.take([WIND], "", 9)
    assert (answer.tool_calls, answer.turn.tool_calls) == ([], []), "more may come: {} behind it would break it"
    answer.take([TEXT], "", 5)
    assert [call.name for call in answer.tool_calls] == ["wind"]
    assert answer.turn.tool_calls == answer.tool_calls
    answer.take([RAIN], "", 3)
    assert [call.name for call in answer.tool_calls] == ["wind"]
    whole = Answer()
    whole.take([WIND], "", 9)
    whole.end(SampleEnd(sample=0, finish_reason="tool_calls", output_tokens=9))
    assert [call.name for call in whole.tool_calls] == ["wind"]


@pytest.mark.parametrize("change", [{"name": ""}, {"name": "w n"}, {"text": ""}, {"text": "[1]"}, {"text": "{}}"}])
def test_what_is_no_whole_call_is_a_part_alone(change):
    """The first part of a resumed answer may be the end of a call."""
    part = msgspec.structs.replace(WIND, **change)
    assert (tool_calls([part]), as_turn([TEXT, part]).tool_calls) == ([], [])


def test_the_turn_says_the_same_letter_by_letter():
    turn = as_turn([THOUGHT, TEXT, WIND])
    assert (turn.role, turn.reasoning, turn.content) == ("assistant", "let me see", "It blows.")
    assert [call.arguments for call in turn.tool_calls] == ['{"at":  "Zaragoza"}']
    assert as_turn([TEXT]).content == "It blows."
    assert as_turn([]).content == ""


def test_a_thought_that_is_not_first_stays_in_its_place():
    turn = as_turn([TEXT, THOUGHT, TEXT, WIND])
    assert turn.content == [
        TextChunk(text="It blows."),
        ThinkingChunk(thinking="let me see"),
        TextChunk(text="It blows."),
    ]
    assert (turn.reasoning, len(turn.tool_calls)) == ("", 1)


def test_samples_have_an_answer_each_and_a_final_may_hold_all_of_it():
    answers = Answers()
    answers.add(Delta(stream=1, sample=1, text="b", token_ids=[1]))
    answers.add(Delta(stream=1, text="a", token_ids=[1]))
    assert [answers.of(sample, None).text for sample in range(3)] == ["a", "b", ""]
    whole = SampleEnd(sample=0, finish_reason="stop", output_tokens=3, token_ids=[1, 2, 3], text="abc")
    final = Final(
        stream=1,
        samples=[whole],
        usage=Usage(prompt_tokens=1, output_tokens=3, cached_tokens=0),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0, total_s=0.0),
        seed=0,
    )
    answers = Answers()
    assert answers.of(0, final).parts == [Part(kind="text", text="abc", num_tokens=3)]
    assert answers.of(0, final).text == "abc", "once"


@pytest.mark.parametrize(
    ("first", "more", "held", "right"),
    [
        ([], [], "x", []),
        ([THOUGHT], [], "", [THOUGHT]),
        ([THOUGHT], [], "x", [THOUGHT, Part(kind="text", text="x")]),
        ([], [THOUGHT], "", [Part(kind="text", text="ab", num_tokens=2), THOUGHT]),
    ],
)
def test_what_was_held_back_comes_behind_the_rest(first, more, held, right):
    assert in_order(first, "ab", 2, more, held) == right


def test_text_alone_is_no_list_of_parts():
    assert joined([TEXT, TEXT]) == []
    assert joined([THOUGHT, THOUGHT]) == [Part(kind="thinking", text="let me see" * 2, num_tokens=8)]
