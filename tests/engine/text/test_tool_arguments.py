"""Arguments of past tool calls reach each kind of template in the form it wants.

The oracle is transformers: a prompt must be what it renders of the arguments' text, or of the mapping that the text
stands for, and each template here says which of the two. The templates are of our own wording, in the manner of the
models they are named after.
"""

from __future__ import annotations

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, ToolCall
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.tool_arguments import Arguments

TURNS = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}CALL{% endfor %}{% endif %}"
)
TURNS += "[{{ m.role }}]{{ m.content }}{% endfor %}"


def _around(call: str) -> str:
    """A template that writes each call as `call` does; `c` is the call, `f` its function."""
    return TURNS.replace("CALL", "{% set f = c.function %}" + call)


MAPPING = {
    "Mistral v3, Nemo": "{% set out = c.function | tojson %}{{ out[:-1] }}{{ ', \"id\": \"' + c.id + '\"}' }}",
    "the whole call": "{{ c | tojson }}",
    "all calls": "{{ m.tool_calls | tojson(indent=2) }}",
    "a new mapping": "{{ {'name': f.name, 'arguments': f.arguments} | tojson }}",
    "Llama 3.1": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "Llama 3.1, built-in tools": '{{ f.name }}.call({% for k, v in f.arguments | items %}{{ k }}="{{ v }}"{% if not'
    " loop.last %}, {% endif %}{% endfor %})",
    "Qwen 2.5, Hermes": '{% if c.function is defined %}{% set c = c.function %}{% endif %}<tool_call>\n{"name": "'
    '{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>',
    "Qwen 3 coder": "<function={{ f.name }}>\n{% if f.arguments is defined %}{% for k, v in f.arguments|items %}"
    "<parameter={{ k }}>\n{% set v = v | tojson | safe if v is mapping or (v is sequence and v is not string) else "
    "v | string %}{{ v }}\n</parameter>\n{% endfor %}{% endif %}</function>",
    "Qwen 3 coder, if it is a mapping": "{% if f.arguments is mapping %}{% for k in f.arguments %}<{{ k }}>"
    "{{ f.arguments[k] }}{% endfor %}{% endif %}",
    "native notation of a mapping, else its text": "{% if f.arguments is mapping %}{% for k, v in f.arguments | "
    "dictsort %}{{ k }}:<{{ v }}>{% endfor %}{% elif f.arguments is string %}{{ f.arguments }}{% endif %}",
    "text first, else native notation": "{% if f.arguments is string %}{{ f.arguments }}{% else %}{% for k, v in "
    "f.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endif %}",
    "the method of a mapping": "{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}",
    "or an empty one": "{% set a = f.arguments or {} %}{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}",
    "only if there are any": "{% if f.arguments %}, {{ f.arguments | tojson }}{% endif %}",
    "one argument by name": "{{ f.arguments.city }}{{ f.arguments['b'] }}{{ f.arguments.get('a', '-') }}",
    "keys": "{{ f.arguments | list | join(',') }}{{ f.arguments.keys() | list | length }}",
    "safe and indented": "{{ f.arguments | tojson(indent=4) | safe }}",
    "text, or indented": "{% if f.arguments is string %}{{ f.arguments}}{% else %}{{ f.arguments | tojson(indent=4)"
    "}}{% endif %}",
    "a macro": "{% macro say(call) %}{{ call.name }}({{ call.arguments | tojson }}){% endmacro %}{{ say(f) }}",
    "a variable": "{%- set args = f.arguments %}{%- set ns = namespace(a=args) %}{{ ns.a | tojson }}",
    "refuses text": "{% if f.arguments is string %}{{ raise_exception('a mapping, please') }}{% endif %}"
    "{{ f.arguments | tojson }}",
    "parses text by no known filter": "{% if f.arguments is string %}{{ f.arguments | fromjson | tojson }}"
    "{% else %}{{ f.arguments | tojson }}{% endif %}",
    "length": "{{ f.arguments | length }}",
}
TEXT = {
    "Small 3.1": "[TOOL_CALLS]{{ f.name }}[ARGS]{% if f.arguments is string %}{{ f.arguments }}{% else %}"
    "{{ f.arguments | tojson }}{% endif %}",
    "Small 4": "{% set a = f['arguments'] %}{% if a is not string%}{% set a = a | tojson | safe %}{% elif a == ''%}"
    "{% set a = '{}' %}{% endif %}{{ '[TOOL_CALLS]' + f['name'] + '[ARGS]' + a }}",
    "Qwen 3": '{"arguments": {% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}'
    "{% endif %}}",
    "a mapping first, as the same JSON": "{% if f.arguments is mapping %}{{ f.arguments | tojson }}{% else %}"
    "{{ f.arguments }}{% endif %}",
    "bare": "{{ f.name }}({{ f.arguments }})",
    "bare, only if there are any": "{% if f.arguments %}{{ f.arguments }}{% endif %}",
    "plus": "{{ '```json\\n' + f.arguments + '\\n```' }}",
    "plus, after": "{{ f.arguments + '!' }}",
    "tilde": "{{ f.name ~ ': ' ~ f.arguments }}",
    "trimmed": "{{ f.arguments | trim }}",
    "a string's method": "{{ f.arguments.strip() }}",
    "formatted": "{{ '%s: %s' | format(f.name, f.arguments) }}",
    "as a string": "{{ f.arguments | string }}",
    "a macro": "{% macro say(call) %}{{ call.name }}({{ call.arguments }}){% endmacro %}{{ say(f) }}",
    "refuses a mapping": "{% if f.arguments is mapping %}{{ raise_exception('text, please') }}{% endif %}"
    "{{ f.arguments }}",
    "not told apart from none": "{% if f.arguments is none %}{{ '{}' }}{% else %}{{ f.arguments }}{% endif %}",
}
OBJECTS = [
    '{"city": "Zaragoza"}',
    '{"b": 1,  "a": 2}',
    '{"b":1,"a":[1,{"z":null,"y":true}]}',
    "{}",
    " {\n} ",
    '{"a": 1.0, "b": 36893488147419103232, "c": -0.0, "d": 1e-7, "e": 12345678901234567890123456789}',
    '{"a": "gr\\u00fcn <b> & \'c\' \\" \\\\ \\n", "é": "🙂", "f": "\\ud83d\\ude42"}',
    '{"a": 1, "b": 2, "a": 3}',
    '{"items": 1, "keys": 2, "get": "x", "name": {}}',
]


def _turns(*arguments: object) -> list[dict]:
    calls = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": f"f{i}", "arguments": each}}
        for i, each in enumerate(arguments)
    ]
    answers = [{"role": "tool", "content": "sun", "tool_call_id": call["id"]} for call in calls]
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}, *answers]


def _theirs(source: str, *arguments: object) -> str:
    (text,), _ = render_jinja_template([_turns(*arguments)], chat_template=source, add_generation_prompt=True)
    return text


def _ours(source: str, *texts: str) -> str:
    user, assistant, *answers = _turns(*texts)
    calls = [ToolCall(id=call["id"], **call["function"]) for call in assistant["tool_calls"]]
    turns = [ChatMessage(**user), ChatMessage(role="assistant", tool_calls=calls)]
    return ChatTemplate(source).render([*turns, *(ChatMessage(**answer) for answer in answers)])


@pytest.mark.parametrize("call", MAPPING.values(), ids=MAPPING)
def test_templates_that_write_a_mapping(call):
    source = _around(call)
    for text in OBJECTS:
        assert _ours(source, text) == _theirs(source, json.loads(text)), text
    assert _ours(source, *OBJECTS) == _theirs(source, *map(json.loads, OBJECTS))


@pytest.mark.parametrize("call", TEXT.values(), ids=TEXT)
def test_templates_that_write_the_text_get_it_letter_by_letter(call):
    source = _around(call)
    for text in (*OBJECTS, ""):
        assert _ours(source, text) == _theirs(source, text), text
        assert text.strip() in _ours(source, text)
    assert _ours(source, *OBJECTS) == _theirs(source, *OBJECTS)


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_text_at_all_is_an_empty_mapping(text):
    assert _ours(_around("{{ f | tojson }}"), text) == _theirs(_around("{{ f | tojson }}"), {})
    assert _ours(_around(MAPPING["Qwen 3 coder"]), text) == _theirs(_around(MAPPING["Qwen 3 coder"]), {})


NO_OBJECTS = [
    '{"city": "Zar',
    "city=Zaragoza",
    "[1, 2]",
    "null",
    "3",
    '"{}"',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    "[" * 100_000,
    '{"a": ' * 2_000 + "1" + "}" * 2_000,
    '{"a": ' + "9" * 5_000 + "}",
]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:20])
def test_what_is_no_object_stays_text(text):
    for call in TEXT.values():
        assert _ours(_around(call), text) == _theirs(_around(call), text)
        assert _ours(_around(call), text, '{"b":1}') == _theirs(_around(call), text, '{"b":1}')
    quoted = _around("{{ f | tojson }}")
    assert _ours(quoted, text, '{"b":1}') == _theirs(quoted, text, {"b": 1})


@pytest.mark.parametrize(
    "kind", ["Llama 3.1, built-in tools", "Qwen 3 coder", "the method of a mapping", "refuses text"]
)
@pytest.mark.parametrize("text", NO_OBJECTS[:4], ids=lambda text: text[:20])
def test_text_for_a_template_that_needs_a_mapping_is_refused_by_name(kind, text):
    with pytest.raises(InvalidRequest, match="no JSON object") as caught:
        _ours(_around(MAPPING[kind]), '{"b": 1}', text, "3")
    assert caught.value.field == "messages[1].tool_calls[1].arguments"
    assert (caught.value.limit, caught.value.value) == ("a JSON object", text)


@pytest.mark.parametrize("call", [MAPPING["Qwen 3 coder"], TEXT["plus"], TEXT["Small 4"]])
@pytest.mark.parametrize("texts", [('{"b": 1}',), ("no object",), ('{"b": 1}', "no object")])
def test_a_template_that_refuses_the_messages_says_its_own_reason(call, texts):
    source = _around(call) + "{{ raise_exception('roles must alternate') }}"
    if call == MAPPING["Qwen 3 coder"] and "no object" in texts:
        source = "{{ raise_exception('roles must alternate') }}" + source
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        _ours(source, *texts)
    assert caught.value.field == "messages"


def test_the_parser_keeps_what_was_written():
    assert Arguments.parse(' {"a":1} ') == Arguments(' {"a":1} ', {"a": 1})
    assert Arguments.parse("") == Arguments("", {})
    assert Arguments.parse("[]") == Arguments("[]", None)
