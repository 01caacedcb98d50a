"""Markers that a model writes, found out from its vocabulary and template."""

from __future__ import annotations

import pytest

from cierzo.engine.text.syntax import CALL_TAGS, LLAMA_CALL, MISTRAL, THINK_TAGS, syntax_of


class Words:
    """A vocabulary's control tokens: those without a text, and those that have one."""

    def __init__(self, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> None:
        self.special_ids = {spelling: 500 + place for place, spelling in enumerate(special)}
        self.control_ids = self.special_ids | {spelling: 600 + place for place, spelling in enumerate(added)}


QWEN = "{%- for tool_call in message.tool_calls %}<tool_call>\n{{ tool_call }}\n</tool_call>{%- endfor %}"
LLAMA = '{{ \'Respond in the format {"name": function name, "parameters": dictionary of arguments}\' }}'
REASONING = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}<think>\n"


def test_a_mistral_vocabulary_says_what_its_version_has():
    v15 = syntax_of(Words(tuple(MISTRAL)), None, "v15")
    assert v15 is not None
    assert (v15.think_open_id, v15.think_close_id, v15.call_open_id) == (500, 501, 502)
    assert (set(v15.tokens.values()), v15.spelled, v15.named_calls) == ({*MISTRAL.values()}, {}, True)
    v7 = syntax_of(Words(("[TOOL_CALLS]",)), None, "v7")
    assert v7 is not None
    assert (v7.tokens, v7.spelled, v7.think_open_id) == ({500: "call"}, {}, None)


def test_pitfall_25_a_marker_that_the_vocabulary_lacks_has_no_id():
    """A reader that took ids of markers for granted failed when the server started."""
    without = syntax_of(Words(("[TOOL_CALLS]", "[ARGS]")), None, "v13")
    assert without is not None
    assert (without.think_open_id, without.think_close_id, without.call_open_id) == (None, None, 500)


def test_reasoning_models_of_version_11_spell_their_think_tags():
    v11 = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    magistral = syntax_of(Words(v11), None, "v11")
    assert magistral is not None
    assert (magistral.spelled, magistral.think_open_id, magistral.call_open_id) == (THINK_TAGS, None, 500)
    small = syntax_of(Words(v11), "[SYSTEM_PROMPT]", "v11")
    assert small is not None
    assert small.spelled == {}
    as_published_in_the_other_layout = syntax_of(Words(v11), "Write it between <think> and </think>", None)
    assert as_published_in_the_other_layout == magistral


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_tokens_are_looked_for_as_tokens(special):
    tags = (*THINK_TAGS, *CALL_TAGS)
    syntax = syntax_of(Words(tags) if special else Words((), tags), QWEN + REASONING, None)
    assert syntax is not None
    first = 500 if special else 600
    assert (syntax.think_open_id, syntax.think_close_id, syntax.call_open_id) == (first, first + 1, first + 2)
    assert (syntax.spelled, syntax.named_calls, syntax.bare_calls) == ({}, False, False)
    assert syntax.call_marker == "<tool_call>"


def test_a_vocabulary_that_knows_no_other_control_tokens_has_its_special_ones():
    vocabulary = Words(("[TOOL_CALLS]",))
    del vocabulary.control_ids
    syntax = syntax_of(vocabulary, None, "v7")
    assert syntax is not None
    assert syntax.call_open_id == 500


def test_tags_that_are_no_tokens_are_looked_for_in_the_text():
    syntax = syntax_of(Words(), QWEN, None)
    assert syntax is not None
    assert (syntax.spelled, syntax.tokens, syntax.call_open_id) == (CALL_TAGS, {}, None)
    syntax = syntax_of(Words(), REASONING, None)
    assert syntax is not None
    assert (syntax.spelled, syntax.call_marker) == (THINK_TAGS, "")


def test_llama_calls_without_a_marker():
    syntax = syntax_of(Words((LLAMA_CALL,)), LLAMA, None)
    assert syntax is not None
    assert (syntax.tokens, syntax.bare_calls, syntax.call_marker) == ({500: "call"}, True, LLAMA_CALL)
    reasoning = syntax_of(Words((LLAMA_CALL,), ("<think>", "</think>")), LLAMA + REASONING, None)
    assert reasoning is not None
    assert (reasoning.think_open_id, reasoning.bare_calls) == (600, True)
    spelled = syntax_of(Words((LLAMA_CALL,)), LLAMA + REASONING, None)
    assert spelled is not None
    assert (spelled.spelled, spelled.bare_calls, spelled.call_open_id) == (THINK_TAGS, False, 500)


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (Words(), QWEN + REASONING),
        (Words((LLAMA_CALL,)), LLAMA),
        (Words((*THINK_TAGS, *CALL_TAGS)), QWEN),
        (Words(("[TOOL_CALLS]",)), ""),
    ],
)
def test_without_spelled_calls_thoughts_and_tokens_are_left(words, source):
    syntax = syntax_of(words, source, None)
    assert syntax is not None
    without = syntax.without_spelled_calls()
    assert (without.tokens, without.marks_thinking) == (syntax.tokens, syntax.marks_thinking)
    assert not without.bare_calls
    assert not {"call", "/call"}.intersection(without.spelled.values())
    assert without.without_spelled_calls() is without


def test_a_model_that_marks_nothing_has_no_syntax():
    assert syntax_of(Words(("<s>", "</s>")), "{{ messages[0].content }}", None) is None
    assert syntax_of(Words(), None, None) is None
    assert syntax_of(Words(), None, "v1") is None
