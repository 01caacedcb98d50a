"""Texts at random that grammars of schemas allow, judged by jsonschema; and what structured.md says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from grammar_walks import Walker
from random_schemas import Schemas
from structured.judge import fault

from cierzo.engine.errors import InvalidRequest

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "structured.md").read_text(encoding="utf-8")
JSON_PART = DOCS.partition("\n## 3. JSON\n")[2].partition("\n## 4.")[0]
TAKEN, _, REFUSED = JSON_PART.partition("Refused by name")
# A schema for each word of JSON Schema that the page has, in which the word says something.
EXAMPLES = {
    "type": {"type": ["string", "null"]},
    "enum": {"enum": [1, "a", None]},
    "const": {"const": {"a": [1]}},
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 1}, {"maximum": 3}]},
    "oneOf": {"oneOf": [{"type": "null"}, {"type": "integer"}]},
    "$ref": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
    "$defs": {"$ref": "#/$defs/a", "$defs": {"a": {"const": 1}}},
    "properties": {"type": "object", "properties": {"a": {"const": 1}}},
    "required": {"type": "object", "required": ["a"]},
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "null"}},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {"type": "null"}}},
    "minProperties": {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 1},
    "maxProperties": {"type": "object", "maxProperties": 1},
    "items": {"type": "array", "items": {"const": 1}},
    "prefixItems": {"type": "array", "prefixItems": [{"const": 1}]},
    "minItems": {"type": "array", "minItems": 1},
    "maxItems": {"type": "array", "maxItems": 1},
    "minLength": {"type": "string", "minLength": 1},
    "maxLength": {"type": "string", "maxLength": 1},
    "pattern": {"type": "string", "pattern": "^a+$"},
    "format": {"type": "string", "format": "date"},
    "minimum": {"type": "number", "minimum": 1},
    "maximum": {"type": "number", "maximum": 1},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 1},
    "exclusiveMaximum": {"type": "integer", "exclusiveMaximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "not": {"not": {"const": 1}},
    "if": {"if": {"const": 1}, "then": {"type": "integer"}},
    "then": {"then": {"type": "integer"}},
    "else": {"else": {"type": "integer"}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#a"},
}


@pytest.fixture(scope="module")
def walker():
    return Walker()


@pytest.mark.parametrize(
    "seeds", [range(start, start + 25) for start in range(0, 150, 25)], ids=lambda seeds: seeds[0]
)
def test_random_schemas(walker, seeds):
    whole = 0
    for seed in seeds:
        schema = Schemas(seed).schema()
        try:
            grammar = walker.written("json_schema", json.dumps(schema))
            walks = [walker.walk(grammar, Random(3 * seed + number)) for number in range(3)]
        except (InvalidRequest, ValueError):
            continue  # a schema that nothing holds, or that is known not to be held
        for text, is_whole in walks:
            whole += is_whole
            assert not (is_whole and fault(schema, text.decode())), (schema, text)
    assert whole > 2 * len(seeds)


@pytest.mark.parametrize("word", re.findall(r"\*\*([$\w]+)\*\*", TAKEN))
def test_words_that_the_page_says_are_held(walker, word):
    schema = EXAMPLES[word]
    grammar, whole = walker.written("json_schema", json.dumps(schema)), 0
    for number in range(10):
        text, is_whole = walker.walk(grammar, Random(number))
        whole += is_whole
        assert not (is_whole and fault(schema, text.decode())), text
    assert whole > 3


@pytest.mark.parametrize("word", [word for word in re.findall(r"\*\*([$\w]+)\*\*", REFUSED) if word != "$ref"])
def test_words_that_the_page_says_are_refused(walker, word):
    with pytest.raises(ValueError, match="Unimplemented keys"):
        walker.matcher(walker.written("json_schema", json.dumps(EXAMPLES[word])))


def test_the_page_has_every_word_that_is_tried():
    assert {*re.findall(r"\*\*([$\w]+)\*\*", JSON_PART)} == {*EXAMPLES}


@pytest.mark.parametrize("name", re.findall(r"\w[\w-]*", TAKEN.partition("and **format**: ")[2].partition(".")[0]))
def test_formats_that_the_page_names(walker, name):
    walker.matcher(walker.written("json_schema", json.dumps({"type": "string", "format": name})))


@pytest.mark.parametrize(
    "reference", ["http://127.0.0.1:9/a.json", "file:///etc/passwd", "other.json", "#/$defs/b"]
)
def test_a_reference_to_anything_else_is_never_fetched(walker, reference):
    with pytest.raises(ValueError, match="failed to compile"):
        walker.matcher(walker.written("json_schema", json.dumps({"$ref": reference})))
