"""Chat templates that change texts, decide by them, or leave calls out; and their efforts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from tempfile import mkdtemp

import pytest
from transformers import AutoTokenizer
from word_folders import FAMILIES, message, ours, write_folder

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, Tool, ToolCall
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PromptEncoder

# --- histories with tools -----------------------------------------------------------------------------------


def _calling(*ids: str, name: str = "f") -> ChatMessage:
    return ChatMessage(role="assistant", tool_calls=[ToolCall(name=name, arguments="{}", id=each) for each in ids])


@pytest.mark.parametrize(
    ("family", "turns", "field"),
    [
        ("thinking", [_calling("a", name="")], "messages[0].tool_calls[0].name"),
        ("thinking", [_calling("a", "b", "a")], "messages[0].tool_calls[2].id"),
        ("thinking", [ChatMessage(role="tool", content="1")], "messages[0].role"),
        ("thinking", [_calling("a"), ChatMessage(role="tool", tool_call_id="b")], "messages[1].tool_call_id"),
        ("thinking", [ChatMessage(role="tool", tool_call_id="a"), _calling("a")], "messages[0].role"),
        ("ChatML", [_calling("a")], "messages[0].tool_calls"),
        ("instructions", [_calling("")], "messages[0].tool_calls"),
    ],
)
def test_calls_and_results_that_a_template_cannot_tell_are_refused(family, turns, field):
    with pytest.raises(InvalidRequest) as caught:
        ours("bytes", family).encode(Generate(stream=0, messages=turns))
    assert caught.value.field == field
    assert caught.value.limit


@pytest.mark.parametrize(
    ("family", "turns"),
    [
        ("thinking", [_calling("a", "b"), *(ChatMessage(role="tool", tool_call_id=each) for each in "ba")]),
        ("thinking", [_calling("", ""), ChatMessage(role="tool", content="1"), _calling("a"), _calling("a")]),
        ("thinking", [_calling(""), ChatMessage(role="tool", tool_call_id="b")]),
        ("ChatML", [ChatMessage(role="tool", content="1")]),
        ("escaping", [_calling("a")]),
    ],
)
def test_other_histories_with_tools_are_taken(family, turns):
    assert ours("bytes", family).encode(Generate(stream=0, messages=turns)).token_ids


def test_a_template_for_tools_writes_the_conversations_that_have_some():
    """As in transformers: the template named tool_use, if there is one."""
    folder = write_folder(Path(mkdtemp()), "bytes", "{% for m in messages %}{{ m.content }}{% endfor %}")
    others = folder / "additional_chat_templates"
    others.mkdir()
    source = (
        "{% for t in tools %}<tool_call>{{ t.function.name }}{% endfor %}{% for m in messages %}<|end|>{% endfor %}"
    )
    (others / "tool_use.jinja").write_text(source)
    encoder, theirs = PromptEncoder.load(folder), AutoTokenizer.from_pretrained(folder)
    turns, tools = [{"role": "user", "content": "Hi"}], [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, []):
        text = theirs.apply_chat_template(turns, tools=given or None, tokenize=False)
        assert (
            encoder.encode(message(turns, given)).token_ids == theirs(text, add_special_tokens=False)["input_ids"]
        )
    assert encoder.syntax.call_marker == "<tool_call>"


LLAMA_LIKE = """{% for m in messages %}{% if m.tool_calls %}
{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
<tool_call>{{ m.tool_calls[0].function | tojson }}</tool_call>{% else %}{{ m.content }}{% endif %}
{% endfor %}{{ tools }}"""


def test_an_answer_holds_no_more_calls_than_a_turn_of_its_template():
    asked = Generate(stream=0, messages=[ChatMessage(role="user", content="a")], tools=[Tool(name="f")])
    for source, limit in ((LLAMA_LIKE, "one"), (FAMILIES["thinking"], "many"), (FAMILIES["ChatML"], "many")):
        encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
        assert encoder.call_limit(asked) == limit
        assert encoder.syntax.marks_calls == (source is not FAMILIES["ChatML"])  # it writes none


def test_calls_of_special_tokens_are_told_apart_and_taken_back_though_no_template_writes_them():
    """As text they would have no markers."""
    folder = write_folder(Path(mkdtemp()), "bytes", FAMILIES["ChatML"])
    file = json.loads((folder / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        token["special"] = token["special"] or "tool_call" in token["content"]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    encoder = PromptEncoder.load(folder)
    assert encoder.syntax.marks_calls
    assert encoder.encode(Generate(stream=0, messages=[_calling("a")])).token_ids


def test_calls_that_are_written_beside_tools_alone_may_be_in_a_history():
    source = "{% for m in messages %}{{ m.content }}{% if tools %}{{ m.tool_calls }}{% endif %}{% endfor %}"
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
    assert encoder.encode(Generate(stream=0, messages=[_calling("a")], tools=[Tool(name="f")])).token_ids


# --- efforts ------------------------------------------------------------------------------------------------

EFFORTS = {
    "{{ messages[0].content }}": (),
    "{{ reasoning_effort }}": ("none", "low", "medium", "high"),
    "{{ reasoning_effort if reasoning_effort is defined else 'medium' }}": ("none", "low", "medium", "high"),
    "{% if reasoning_effort == 'high' %}think{% endif %}": ("high",),
    "{% set effort = reasoning_effort or 'none' %}{% if effort not in ['none', 'high'] %}"
    "{{ raise_exception('no') }}{% endif %}": ("none", "high"),
    "{% set reasoning_effort = reasoning_effort if reasoning_effort is defined else 'low' %}{{ reasoning_effort }}"
    "{% if reasoning_effort == 'xhigh' %}!{% endif %}": ("none", "low", "medium", "high", "xhigh"),
    FAMILIES["thinking"]: ("none", "low", "medium", "high"),
    "{% if thinking %}<think>{% endif %}": ("none", "low", "medium", "high"),
    "{{ raise_exception('always') }}{{ reasoning_effort }}": (),
}


@pytest.mark.parametrize(("source", "efforts"), EFFORTS.items())
def test_the_efforts_of_a_template(source, efforts):
    template = ChatTemplate(source)
    assert template.efforts() == efforts
    for effort in efforts:
        template.render([ChatMessage(role="user", content="a")], effort)


def test_a_template_that_is_switched_thinks_unless_the_effort_is_none():
    template, user = ChatTemplate("{{ enable_thinking }}"), [ChatMessage(role="user", content="a")]
    rendered = [template.render(user, effort) for effort in (None, "none", "low", "high")]
    assert rendered == ["", "False", "True", "True"]


# --- templates that change what they are given --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_in_the_manner_of_known_ones_keep_texts_apart(family):
    assert ours("bytes", family).unsafe_places() == []


USER, DESCRIPTION = "the content of a user's turn", "a tool's description"


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", [USER]),
        ("{{ messages[-1].content.encode('ascii', 'ignore').decode() }}", [USER]),
        ("{{ messages[-1].content | select('ne', 'a') | join | replace('\ufdd0', '') }}", []),
        ("{% for t in tools or [] %}{{ '<' ~ t.function.description[1:] }}{% endfor %}", [DESCRIPTION]),
        ("{% for t in tools or [] %}{{ t.function.description.encode('ascii', 'ignore').decode() }}{% endfor %}",
         [DESCRIPTION]),
        ("{% for m in messages %}{{ m.content | replace('{', '<') }}{% endfor %}", [USER]),
        ("{% for m in messages %}{{ m.content.replace('&lt;', '<').replace('&gt;', '>') }}{% endfor %}", [USER]),
        ("{% for m in messages %}{{ '<|' ~ m.content.split('/')[0] ~ '|>' }}{% endfor %}{# <|end|> #}", [USER]),
        ("{% for t in tools or [] %}{{ '<' ~ t.function.name | lower ~ '>' }}{% endfor %}", ["a tool's name"]),
        ("{% for t in tools or [] %}{% for k in t.function.parameters.properties or {} %}"
         "{{ '<' ~ k | lower ~ '>' }}{% endfor %}{% endfor %}", ["a name in a tool's parameters"]),
        ("{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k in c.function.arguments %}"
         "{{ '<' ~ k | lower ~ '>' }}{% endfor %}{% endfor %}{% endfor %}", ["a name in the arguments of a call"]),
    ],
)  # fmt: skip
def test_a_template_that_makes_control_tokens_of_texts_is_named(source, places):
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
    assert set(places) <= set(encoder.unsafe_places())
    assert bool(places) == bool(encoder.unsafe_places())


CHANGING = {
    "m.content.replace('/think', '')": "<|im_/thinkstart|>",
    "m.content.split('||') | join": "<|im_||start|>",
    "m.content.split() | join('_')": "<|im start|>",
    "m.content[:5] ~ m.content[6:]": "<|im_-start|>",
    "m.content | reverse": ">|trats_mi|<",
    "m.content | lower": "<|IM_START|>",
    "m.content | reject('eq', '-') | join": "<|im_-start|>",
    "'%s%s' % (m.content[4:], m.content[:4])": "rt|><|im_sta",
    "'<|%s|>' % m.content": "im_start",
    "'<{}>'.format(m.content)": "|im_start|",
    "m.content.encode('ascii', 'ignore').decode()": "<|im_\ufdd5start|>",
}


@pytest.mark.parametrize(("expression", "text"), CHANGING.items())
def test_a_template_that_changes_texts_makes_no_control_token_of_them(expression, text):
    source = "{% for m in messages %}<|im_end|>{{ " + expression + " }}{% endfor %}"
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
    ids, end = set(encoder.tokenizer.control_ids.values()), encoder.tokenizer.control_ids["<|im_end|>"]
    for content in (text, "a <b> [c] " + text):
        with contextlib.suppress(InvalidRequest):
            found = encoder.encode(message([{"role": "user", "content": content}])).token_ids
            assert [i for i in found if i in ids] == [end], content
    assert encoder.encode(message([{"role": "user", "content": "a < b[0]: <h1> <|"}])).token_ids


def test_names_ids_and_schemas_that_a_template_changes_make_no_control_token():
    source = (
        "{% for m in messages %}<|im_end|>{% for c in m.tool_calls or [] %}{{ c.function.name | upper }}"
        "{{ c.id | lower }}"
        "{% endfor %}{% endfor %}{% for t in tools or [] %}{% for k in t.function.parameters %}{{ k | lower }}"
        "{% endfor %}{% endfor %}"
    )
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
    user, call = ChatMessage(role="user", content="a"), ToolCall(name="f", arguments="{}", id="<|IM_START|>")
    for turns, tools in (
        ([ChatMessage(role="assistant", tool_calls=[call])], []),
        ([user], [Tool(name="f", parameters={"<|IM_START|>": 1})]),
    ):
        with pytest.raises(InvalidRequest, match="would make the control token") as caught:
            encoder.encode(Generate(stream=0, messages=turns, tools=tools))
        assert (caught.value.field, caught.value.value) == ("messages", "<|im_start|>")


@pytest.mark.parametrize(
    "source",
    [
        "{% if '/no_think' in messages[0].content %}<think>{% endif %}",
        "{% if 'Cutoff' not in messages[0].content %}<|im_start|>{% endif %}",
        "{% for t in tools %}{{ t.function.parameters.properties.city.type }}{% endfor %}",
        "{% for t in tools %}{% if t.function.name == 'python' %}<tool_call>{% endif %}{% endfor %}",
        "{% for c in messages[1].tool_calls %}{{ c.function.arguments.city + '!' }}{% endfor %}",
    ],
)
def test_a_template_may_decide_by_what_it_is_given(source):
    """Keys, names and words of a conversation are the same when it is looked at for control tokens."""
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source + "{{ messages[0].content }}"))
    call = ToolCall(name="python", arguments='{"city": "<b>"}')
    turns = [ChatMessage(role="system", content="/no_think Cutoff: a < b[0]")]
    turns.append(ChatMessage(role="assistant", tool_calls=[call] if "tool_calls" in source else []))
    tools = [Tool(name="python", parameters={"properties": {"city": {"type": "<string>"}}})]
    assert encoder.encode(Generate(stream=0, messages=turns, tools=tools if "tools" in source else [])).token_ids


def test_what_a_template_writes_because_of_a_text_is_its_own():
    """A text that is compared with others, or counted, is no reason to refuse a request."""
    source = (
        "{% for m in messages %}{% if m.content == messages[0].content %}<|im_start|>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{% for k in c.function.arguments %}<city>{% endfor %}"
        "{% endfor %}"
        "{% if m.content | length > 3 %}<|im_end|>{% endif %}"
        "{% if m.content.split() | length > 1 %}<think>{% endif %}{% endfor %}"
    )
    encoder = PromptEncoder.load(write_folder(Path(mkdtemp()), "bytes", source))
    call = ToolCall(name="f", arguments='{"ab": "[", "cd": "<"}')
    turns = [ChatMessage(role="user", content="[a]"), ChatMessage(role="assistant", content="<", tool_calls=[call])]
    turns += [ChatMessage(role="user", content="<a b>"), ChatMessage(role="user", content="[a]")]
    names = {index: token for token, index in encoder.tokenizer.control_ids.items()}
    ids = encoder.encode(Generate(stream=0, messages=turns)).token_ids
    assert [names[i] for i in ids if i in names] == [
        *("<|im_start|>", "<tool_call>", "<city>", "<city>", "<|im_end|>", "<think>", "<|im_start|>")
    ]


def test_every_character_of_private_use_at_once_is_refused():
    every = "".join(map(chr, (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))))
    encoder = ours("bytes", "ChatML")
    assert encoder.encode(Generate(stream=0, messages=[ChatMessage(role="user", content=every[:-2])]))
    with pytest.raises(InvalidRequest, match="private use") as caught:
        encoder.encode(Generate(stream=0, messages=[ChatMessage(role="user", content=every[:-1])]))
    assert caught.value.field == "messages"


def test_tools_nested_too_deeply_are_refused():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"properties": schema}
    tools = [Tool(name="f", parameters=schema)]
    user = [ChatMessage(role="user", content="a")]
    with pytest.raises(InvalidRequest) as caught:
        ours("bytes", "thinking").encode(Generate(stream=0, messages=user, tools=tools))
    assert caught.value.field == "messages"
