"""Chat templates render as in transformers, and fail where they fail there: transformers itself is the oracle."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage
from cierzo.engine.text.chat import ChatTemplate

TURNS = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße,\n  Welt"},
    {"role": "assistant", "content": "héllo 🙂", "reasoning": "a\tthought"},
    {"role": "user", "content": ""},
]
MESSAGES = [ChatMessage(**turn) for turn in TURNS]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "image_token": "<img>"}

GENERATION = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}\n  {% generation %}\n    {{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n end",
    "{% for m in messages %} a {%- generation -%} \n {{ m.content }} \n {%- endgeneration -%} b {% endfor %}",
    "{% for m in messages %} a {%+ generation -%} x {%+ endgeneration +%}\n b {% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{% generation %}{{ loop.index }}{{ c }}{% endgeneration %}"
    "{% endfor %}{% endfor %}",
    "{% for m in messages %}{% generation %}{% for c in m.content %}{{ loop.index0 }}{{ c }}{% endfor %}"
    "{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{% set y = 3 %}{{ x }}{{ y }}{% endgeneration %}{{ x }}{{ y }}",
    "{% set ns = namespace(x=1) %}{% generation %}{% set ns.x = 2 %}{% endgeneration %}{{ ns.x }}",
    "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
    "{% generation %}{% if nothing is defined %}a{% else %}b{% endif %}{{ nothing }}{% endgeneration %}",
    "{% generation %}{{ nothing.at_all }}{% endgeneration %}",
    "{% generation %}{{ raise_exception('no') }}{% endgeneration %}",
    "{% for m in messages %}{% generation %}{% if true %}{% break %}{% endif %}{% endgeneration %}{% endfor %}",
    "{% generation %}{% for m in messages %}{% if m.content %}{% continue %}{% endif %}!{% endfor %}"
    "{% endgeneration %}",
    "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1]) %}called{% endcall %}",
    "{% generation %}{{ caller is defined }}{% endgeneration %}",
    "{% generation %}<a> & {{ messages[0].content }}{{ messages[0].content | e }}{% endgeneration %}",
    "{% generation %}{% endgeneration %}|{{ generation }}|{{ endgeneration is defined }}",
    "{% set generation = 3 %}{{ generation }}",
    "{% generation %}never closed",
    "never opened{% endgeneration %}",
    "{% generation messages %}an argument{% endgeneration %}",
    "{% filter upper %}{% generation %}abc{% endgeneration %}{% endfilter %}",
    "{% set text %}{% generation %}abc{% endgeneration %}{% endset %}{{ text | length }}",
]
VARIABLES = [
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ image_token }}{{ pad_token is defined }}{{ pad_token }}",
    "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing }}",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools | length if tools else 'none' }}",
    "{{ pad_token + 'x' }}",
    "{{ messages | tojson }}",
    "{% for m in messages %}{{ m.keys() | join(',') }}{{ m.thinking }}{{ m.reasoning_content }};{% endfor %}",
]
HELPERS = [
    "{{ {'b': '<é>', 'a': [1, 2.5, none, true]} | tojson }}",
    "{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(true, none, [',', ':'], true) }}",
    "{{ {'a': 1} | tojson(ensure_ascii=true, separators=(', ', '= '), sort_keys=true) | safe }}",
    "{{ messages[1].content | tojson(colour='red') }}",
    "{{ namespace | tojson }}",
    "{{ strftime_now('%d %B %Y') }}",
    "{{ strftime_now() }}",
    "{{ raise_exception('not this') }}",
    "{{ dict(a=1, b=dict.fromkeys('xy', 2)) | tojson }}{{ dict.copy is defined }}{{ dict([['k', 1]]).k }}",
    "{{ dict(a=1).update(b=2) }}",
    "{{ namespace(_hidden=1)._hidden }}",
    "{% set ns = namespace(found=false, self=1) %}{% for m in messages %}{% set ns.found = true %}{% endfor %}"
    "{{ ns.found }}{{ ns.self }}",
    "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns.b is defined }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% set ns = namespace(3) %}",
]
HOSTILE = [
    "{% for m in messages %}{% if loop.index is even %}{% continue %}{% endif %}[{{ m.content }}]{% endfor %}",
    "  {% if true %}\n    a\n  {% endif %}\n  b {#- c -#} \n d\n\n",
    "\n{% raw %}{% generation %}{{ x }}{% endraw %}\n",
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}{{ messages.__len__ }}",
    "{{ dict.__class__.__mro__ }}{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].content.format(1) }}{{ '{0.__class__}'.format(1) }}",
    "{% for i in range(200000) %}{% endfor %}",
    "{% include 'other' %}",
    "{% extends 'other' %}",
    "{{ messages | map(attribute='content') | join('|') }}{{ messages[9].role }}",
    "{{ messages[0].content + 1 }}",
    "{{ 1 / 0 }}",
    "{{ messages | no_such_filter }}",
    "{% if false %}{{ messages | no_such_filter }}{% endif %}ok",
    "{% macro loop_for_ever(n) %}{{ loop_for_ever(n + 1) }}{% endmacro %}{{ loop_for_ever(0) }}",
    "{{ joiner('x')() }}{{ cycler(1, 2).next() }}",
    "{% for %}",
    "{{",
]
REFUSED = None


def _theirs(source: str, **more: object) -> str | None:
    try:
        (text,), _ = render_jinja_template(
            [TURNS], chat_template=source, add_generation_prompt=True, **TOKENS, **more
        )
    except Exception:
        return REFUSED
    return text


def _ours(source: str, effort: str | None = None) -> str | None:
    try:
        return ChatTemplate(source, special_tokens=TOKENS).render(MESSAGES, effort)
    except (CheckpointError, InvalidRequest):
        return REFUSED


@pytest.mark.parametrize("source", [*GENERATION, *VARIABLES, *HELPERS, *HOSTILE])
def test_templates_render_as_in_transformers(source):
    assert _ours(source) == _theirs(source)


def test_the_oracle_both_renders_and_refuses():
    outcomes = [_theirs(source) is REFUSED for source in (*GENERATION, *VARIABLES, *HELPERS, *HOSTILE)]
    assert 20 <= sum(outcomes) <= len(outcomes) - 30


def test_a_reasoning_effort_is_a_variable_where_it_is_asked_for():
    source = "{{ reasoning_effort is defined }}{{ reasoning_effort }}"
    assert _ours(source) == _theirs(source) == "False"
    assert _ours(source, "high") == _theirs(source, reasoning_effort="high") == "Truehigh"
