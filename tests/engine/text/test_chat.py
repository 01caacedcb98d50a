"""Chat templates: what they are given, where they are found, and what becomes of their errors."""

from __future__ import annotations

import json

import pytest

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage, ToolCall
from cierzo.engine.text.chat import ChatTemplate, load_chat_template

USER = ChatMessage(role="user", content="Hi")
CALL = ToolCall(name="add", arguments='{"b": 1,  "a": 2}', id="c1")


def test_the_context_of_a_template():
    template = ChatTemplate(
        "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'skip' %}{% continue %}{% endif %}"
        "[{{ m['role'] }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ eos_token }}"
        "{{ reasoning_effort if reasoning_effort is defined else '-' }}",
        "<s>",
        "</s>",
    )
    assert template.render([USER]) == "<s>[user:Hi]></s>-"
    assert template.render([USER], "high") == "<s>[user:Hi]></s>high"


def test_optional_parts_of_a_message_are_there_or_absent():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.keys() | list | sort | join(',') }};{% for c in m.tool_calls or [] %}"
        "{{ c.id }}:{{ c.type }}:{{ c.function.name }}({{ c.function.arguments }}){% endfor %}{% endfor %}"
    )
    turns = [
        USER,
        ChatMessage(role="assistant", reasoning="hm", tool_calls=[CALL]),
        ChatMessage(role="tool", content="3", tool_call_id="c1"),
    ]
    assert template.render(turns) == (
        "content,role;content,reasoning,reasoning_content,role,thinking,tool_calls;"
        'c1:function:add({"b": 1,  "a": 2})content,role,tool_call_id;'
    )


def test_helpers_are_those_of_transformers():
    template = ChatTemplate(
        "{{ {'a': '<é>'} | tojson }} {{ [1] | tojson(indent=1) }} {{ strftime_now('%Y')|length }}"
    )
    assert template.render([USER]) == '{"a": "<é>"} [\n 1\n] 4'


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('only one system message') }}", "only one system message"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[9].role }}", "no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for x in messages %}{{ messages.append(x) }}{% endfor %}", "unsafe|not safely"),
    ],
)
def test_a_template_that_refuses(source, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.field == "messages"


def test_a_template_that_is_none():
    with pytest.raises(CheckpointError, match="compiled"):
        ChatTemplate("{% for %}")


def test_where_templates_are_found(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert load_chat_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "inside {{ bos_token }}", "bos_token": "<s>"}))
    assert load_chat_template(tmp_path).render([USER]) == "inside <s>"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path).render([USER]) == "d"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert load_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert load_chat_template(tmp_path).render([USER]) == "own file"


def test_a_template_that_is_no_text_is_an_error_of_the_checkpoint(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_chat_template(tmp_path)
