"""Prompts to token ids: what is refused, and by which name."""

from __future__ import annotations

import msgspec
import pytest

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.frontend import failure
from cierzo.engine.messages import ChatMessage, Generate, SamplingParams, Tool, ToolCall
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PART_CHARS, TOOL_CHARS, PromptEncoder
from cierzo.engine.text.template_chat import TemplateChat

LONE = "a\ud800b"


def test_prompts_that_cannot_be_encoded(tokenizer):
    for encoder, message, field in (
        (PromptEncoder(), Generate(stream=0, text="x"), "text"),
        (PromptEncoder(), Generate(stream=0, messages=[]), "messages"),
        (PromptEncoder(tokenizer), Generate(stream=0, messages=[]), "messages"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            encoder.encode(message)
        assert caught.value.field == field
    assert PromptEncoder().encode(Generate(stream=0, token_ids=[5])).token_ids == [5]


def test_without_a_default_chat_template_the_others_are_named(tokenizer):
    with pytest.raises(InvalidRequest, match="no default chat template, only rag, tool_use") as caught:
        PromptEncoder(tokenizer, None, ("rag", "tool_use")).encode(Generate(stream=0, messages=[]))
    assert (caught.value.field, caught.value.limit) == ("messages", "text, token_ids")


def test_a_lone_surrogate_in_a_text_is_refused(tokenizer):
    for text in (LONE, "\udc80", "x" * 5000 + "\ud83d"):
        with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
            PromptEncoder(tokenizer).encode(Generate(stream=0, text=text))
        assert caught.value.field == "text"
        _sent(caught.value)
    assert PromptEncoder(tokenizer).encode(Generate(stream=0, text="\U0001f642"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ '\\ud800' }}",
        "{{ raise_exception('\\ud800' * 5000) }}",
        "{{ messages['\\ud800'].x }}",
        "{{ 'x' * 10 ** 30 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ raise_exception() }}",
        "{{ [1] | tojson(default=3) }}",
        "{{ messages[0] ** 2 }}",
        "{{ (1).__class__.__mro__ }}",
        "{{ '%c' | format(55296) }}",
    ],
)
def test_whatever_a_template_does_the_request_is_refused(tokenizer, source):
    message = Generate(stream=0, messages=[ChatMessage(role="user", content="hi")])
    with pytest.raises(InvalidRequest) as caught:
        PromptEncoder(tokenizer, TemplateChat(ChatTemplate(source), tokenizer)).encode(message)
    assert caught.value.field == "messages"
    assert None not in (caught.value.limit, caught.value.value)
    assert len(caught.value.message) < 100 + 6 * 500  # a surrogate is spelled out in six characters
    _sent(caught.value)


def test_stop_strings_reach_the_reader(prompts):
    detokenizer = prompts.reader(SamplingParams(stop=("b", "<s>"), min_tokens=2))
    assert (detokenizer.push([256, 97, 256, 98]), detokenizer.stop, detokenizer.num_tokens) == ("a", "<s>", 3)
    assert PromptEncoder().reader(SamplingParams()) is None
    assert PromptEncoder().special_ids == {}


def _sent(error: InvalidRequest) -> None:
    """An answer that could not be packed would end its connection."""
    assert msgspec.msgpack.encode(failure(1, error))


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(prompts, monkeypatch):
    most = prompts.max_text_bytes(10)
    assert most == 10 * len("<two words>")
    monkeypatch.setattr(type(prompts.tokenizer), "_encode", lambda *_, **__: [1])
    fits, too_long = "\u20ac" * 36, "\u20ac" * 37
    turn = [ChatMessage(role="user", content="x" * 200)]
    assert prompts.encode(Generate(stream=0, text=fits), 10).token_ids == [256, 1]
    assert prompts.encode(Generate(stream=0, text=too_long)).token_ids == [256, 1]
    for field, message in (("text", {"text": too_long}), ("messages", {"messages": turn})):
        with pytest.raises(InvalidRequest, match="cannot fit") as caught:
            prompts.encode(Generate(stream=0, **message), 10)
        assert (caught.value.field, caught.value.limit) == (field, "110 bytes")


def test_turns_calls_and_output_tokens_are_work_too(prompts):
    call = ToolCall(name="f", arguments="{}")
    turn = ChatMessage(role="assistant", content="abc", reasoning="de", tool_calls=[call])
    assert prompts.weight(Generate(stream=0, text="abc", output_token_ids=[1] * 5)) == 8
    assert prompts.weight(Generate(stream=0, messages=[turn] * 2)) == 2 * (5 + 2 + 2 * PART_CHARS)
    assert prompts.weight(Generate(stream=0, token_ids=[1] * 1000)) == 0
    assert prompts.weight(Generate(stream=0, text="abc", suffix="de")) == 5
    tools = [Tool(name="f", description="d" * 1000, parameters={"properties": {"a" * 500: {}}})] * 2
    weight = prompts.weight(Generate(stream=0, messages=[turn], tools=tools))
    assert 2 * (TOOL_CHARS + 1500) < weight - (5 + 2 + 2 * PART_CHARS) < 2 * (TOOL_CHARS + 1600)
