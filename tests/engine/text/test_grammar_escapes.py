"""JSON escapes in grammars of schemas: a text that a schema forbids does not come about by how it is spelled."""

from __future__ import annotations

import contextlib
import json
import time
from random import Random

import pytest
from grammar_walks import Walker
from structured.judge import fault

from cierzo.engine.errors import InvalidRequest

SOUND = (
    *("[^a]", r"[^\s\"]", r"[^\"\x00-\x1f]", r"[\x20-\x7e]", r"\W", ".", r"[\s\S]", r"[^\r\"]", r"[\n\"]"),
    r"[a\\]",
)
UNSOUND = (
    *(r"[^\"]", r"[^\"\n]", r"[^\\]", "[^ -~]", r"[\x00-\x1f]", r"a|[^\"b]", r"[^\p{Lu}\"]", r"[^]\"]"),
    r"[\x00-\x21]",
)


@pytest.fixture(scope="module")
def walker():
    return Walker()


@pytest.mark.parametrize(
    "text", ['{"\\u0061":"x"}', '{"q\\u0022":"x"}', '{"\\u000a":"x"}', '{"\\/":"x"}', '{"a":"x"}']
)
def test_a_listed_name_does_not_come_as_another_one(walker, text):
    listed = {name: {"type": "integer"} for name in ("a", 'q"', "\n", "/")}
    schema = {"type": "object", "properties": listed, "additionalProperties": {"type": "string"}}
    assert fault(schema, text)
    matcher = walker.matcher(walker.written("json_schema", json.dumps(schema)))
    assert matcher.try_consume_tokens([*text.encode()]) < len(text)


@pytest.mark.parametrize("pattern", SOUND)
def test_classes_take_what_pythons_take(walker, pattern):
    schema = {"type": "string", "pattern": f"^({pattern})$"}
    matcher = walker.matcher(walker.written("json_schema", json.dumps(schema)))
    for char in ('"', "\\", "a", " ", "\n", "\t"):
        text = json.dumps(char)
        copy = matcher.deep_copy()
        is_taken = copy.try_consume_tokens([*text.encode()]) == len(text) and copy.is_accepting()
        assert is_taken == (not fault(schema, text)), char


@pytest.mark.parametrize("pattern", UNSOUND)
@pytest.mark.parametrize("is_name", [False, True])
def test_classes_that_would_take_a_quote_or_backslash_are_refused(walker, pattern, is_name):
    schema = {"type": "object", "patternProperties": {pattern: True}} if is_name else {"pattern": pattern}
    with pytest.raises(InvalidRequest, match="would take what it leaves out") as refused:
        walker.written("json_schema", json.dumps({"items": schema}))
    assert refused.value.field == "grammar.value"


@pytest.mark.parametrize("pattern", [r"\[^\"]", r"[\p{L}]", r"[^", "[]"])
def test_what_is_no_such_class_is_left_to_the_compiler(walker, pattern):
    walker.written("json_schema", json.dumps({"pattern": pattern}))


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a\x00b"},
        {"enum": [1, ["\x1f"]]},
        {"const": {"\x7f": 1}},
        *({"pattern": pattern} for pattern in ("^\x01a$", r"^\x01a$", r"\u0001", r"\x{1}", r"\a[a]", r"[a]\x1f")),
        *({"pattern": pattern} for pattern in (r"\cA", r"\0")),
        {"properties": {"a": {"patternProperties": {r"\x0b": True}}}},
    ],
)
def test_a_control_character_that_no_string_can_hold_is_not_left_out(walker, schema):
    with pytest.raises(InvalidRequest, match="would not hold: there are n"):
        walker.written("json_schema", json.dumps(schema))


@pytest.mark.parametrize("schema", [{"const": "a\n\t\b\f\r"}, {"pattern": r"^\t\x0a\\x01\x41\u00e9$"}])
def test_those_that_one_can_hold_are_taken(walker, schema):
    grammar = walker.written("json_schema", json.dumps({"type": "string", **schema}))
    text, is_whole = walker.walk(grammar, Random(1))
    assert is_whole
    assert not fault(schema, text.decode())


@pytest.mark.parametrize("pattern", ["[" * 60_000, "[a" * 30_000, "[^a]" * 15_000, "\\[" * 20_000, "[]" * 30_000])
def test_patterns_are_looked_at_in_time_that_grows_with_their_length(walker, pattern):
    start = time.thread_time()
    with contextlib.suppress(InvalidRequest):
        walker.written("json_schema", json.dumps({"pattern": pattern}))
    assert time.thread_time() - start < 0.2


def test_a_schema_of_too_many_classes_is_refused(walker):
    schema = {"allOf": [{"pattern": f"[{chr(0x4E00 + number)}]"} for number in range(101)]}
    with pytest.raises(InvalidRequest, match="too many classes"):
        walker.written("json_schema", json.dumps(schema))
