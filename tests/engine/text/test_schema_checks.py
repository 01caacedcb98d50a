"""Schemas that llguidance takes and does not hold: each refused one is shown to be such a schema, by jsonschema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Vocabulary
from cierzo.engine.testing.words import EOS
from cierzo.engine.text.grammar import OPTIONS
from cierzo.engine.text.held_text import json_rule
from cierzo.engine.text.schema_checks import refuse_unheld
from cierzo.engine.text.token_table import grammar_tokenizer

TABLE = Vocabulary(
    tokens=[bytes([each]) for each in range(256)] + [b""] * 2, control_ids=[256, EOS], eos_token_ids=[EOS]
)
TOKENIZER = grammar_tokenizer(TABLE)


def takes(schema: dict[str, Any], text: str) -> bool:
    """Whether llguidance lets a text be written."""
    matcher = LLMatcher(TOKENIZER, f"{OPTIONS}\nstart: %json {json.dumps(schema)}", log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.validate_tokens([*text.encode()]) == len(text) and matcher.consume_tokens([*text.encode()])


@pytest.mark.parametrize(
    ("schema", "text", "keyword"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0", "exclusiveMinimum"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.25}, "0.0", "exclusiveMinimum"),
        ({"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, "-0", "exclusiveMaximum"),
        ({"type": "number", "exclusiveMinimum": 5, "maximum": 5.5}, "5", "exclusiveMinimum"),
        ({"type": "number", "exclusiveMaximum": -2, "minimum": -2.5}, "-2", "exclusiveMaximum"),
        (
            {"type": "number", "exclusiveMinimum": 2, "anyOf": [{"maximum": 2.5}, {"maximum": 2.2}]},
            "2",
            "exclusiveMinimum",
        ),
        (
            {"type": "number", "allOf": [{"allOf": [{"exclusiveMinimum": 1}]}, {"maximum": 1.5}]},
            "1",
            "exclusiveMinimum",
        ),
        ({"enum": [1, 12345678901234567]}, "12345678901234568", "enum"),
        ({"const": {"a": [2**64 + 1]}}, '{"a":[18446744073709552000]}', "const"),
        ({"type": "string", "pattern": "^[a-z&&[^b]]$"}, '"a"', "pattern"),
        ({"type": "string", "pattern": "^[[a]]$"}, '"a"', "pattern"),
        ({"type": "object", "minProperties": 2, "additionalProperties": True}, '{"a":1,"a":1}', "minProperties"),
        (
            {"type": "object", "minProperties": 2, "additionalProperties": False, "patternProperties": {"^a": {}}},
            '{"a":1,"a":1}',
            "minProperties",
        ),
        ({"type": "number", "exclusiveMinimum": True, "minimum": 3}, "3", "exclusiveMinimum"),
    ],
)
def test_what_would_not_hold_is_refused(schema, text, keyword):
    assert takes(schema, text)
    draft4 = isinstance(schema.get("exclusiveMinimum"), bool)
    validator = jsonschema.Draft4Validator if draft4 else jsonschema.Draft202012Validator
    assert not validator(schema).is_valid(json.loads(text))
    within: list[dict[str, Any]] = [
        schema,
        {"properties": {"minProperties": schema}},
        {"items": [schema]},
        {"items": schema},
        {"$defs": {"a": {"anyOf": [{}, schema]}}},
        {"additionalProperties": {"allOf": [schema]}},
    ]
    for each in within:
        with pytest.raises(InvalidRequest, match=keyword) as caught:
            json_rule(json.dumps(each), "grammar.value")
        assert (caught.value.field, caught.value.value) == ("grammar.value", keyword)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/x/1/y~1z%25", "x": [0, {"y/z%": {"exclusiveMinimum": 0, "maximum": 0.5}}]},
        {"$ref": "#/$defs/a", "type": "number", "exclusiveMinimum": 0, "$defs": {"a": {"maximum": 0.5}}},
        {"properties": {"p": {"$ref": "#/q"}}, "q": {"$ref": "#/r"}, "r": {"minProperties": 2}},
    ],
)
def test_what_is_referred_to_is_looked_at_wherever_it_is(schema):
    with pytest.raises(InvalidRequest, match=r"exclusiveMinimum|minProperties"):
        refuse_unheld(schema, "grammar.value")


def test_references_in_circles_come_to_an_end():
    chain = {f"d{n}": {"$ref": f"#/$defs/d{(n + 1) % 5000}", "exclusiveMinimum": n} for n in range(5000)}
    refuse_unheld({"$ref": "#/$defs/d0", "$defs": chain, "allOf": [{"$ref": "#"}, {"$ref": "#/$defs/none/0"}]}, "x")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.5},
        {"type": "number", "exclusiveMinimum": 5, "maximum": 6},
        {"properties": {"a": {"exclusiveMinimum": 5}, "b": {"maximum": 5.5}}},
        {"const": 2**53, "type": "integer", "maximum": 2**63 - 1},
        {"type": "string", "pattern": r"^[\[\]&~-]+[a-z-]$"},
        {"type": "number", "exclusiveMaximum": 0, "minimum": -1},
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a", "b"]},
        {"minProperties": 2, "properties": {"a": {}, "b": {}}, "additionalProperties": False},
        {"properties": {"minProperties": {"const": {"minProperties": 3}}, "exclusiveMinimum": {"type": "boolean"}}},
        {"enum": [{"minProperties": 3, "exclusiveMinimum": True}], "default": {"minProperties": 3}},
        {"minProperties": "2", "properties": [], "items": 3, "anyOf": {}, "required": 3},
        True,
    ],
)
def test_what_holds_is_left_alone(schema):
    refuse_unheld(schema, "grammar.value")


def test_bounds_of_one_number_may_stand_in_two_schemas():
    schema = {"exclusiveMinimum": 0, "allOf": [{"maximum": 0.5}, True]}
    assert takes(schema | {"type": "number"}, "0")
    with pytest.raises(InvalidRequest, match="exclusiveMinimum"):
        refuse_unheld(schema, "f")
