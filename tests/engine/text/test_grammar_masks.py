"""Masks beside a brute-force filter of the vocabulary: of each token alone another library says whether a text may
begin so. Token by token, along ways through the grammar."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from grammar_walks import Language, Walker, documents, language_of

TEXTS = ["red", "re", "red red", "größe", "grün", "日本", "日", "😀", "the", '"a"', "\\n", "a\nb", "12", "123"]
PATTERNS = [
    "(foo|bar)(-[a-c]{1,3})?",
    "[0-9]{2,4}",
    "a*b+",
    "(ab|a)(c|bcd)?",
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?",
    r"\d{4}-\d{2}-\d{2}",
    r'"[a-z"]{0,3}"',
    "(red|re|r)(d|ed)?",
    r"x{3,5}|[ab]{0,2}",
]
# A schema, and every text that holds it, sign by sign.
SCHEMAS = [
    ({"enum": ["red", "re", 12, 1.5, None, True]}, [['"red"'], ['"re"'], ["12"], ["1.5"], ["null"], ["true"]]),
    ({"const": {"a": [1, "ñ"]}}, [["{", '"a"', ":", "[", "1", ",", '"ñ"', "]", "}"]]),
    ({"type": "boolean"}, [["true"], ["false"]]),
    (
        {
            "type": "object",
            "properties": {"name": {"enum": ["a", "ab"]}, "größe": {"type": "null"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        [
            ["{", '"name"', ":", value, *more, "}"]
            for value in ('"a"', '"ab"')
            for more in ([], [",", '"größe"', ":", "null"])
        ],
    ),
    (
        {"type": "array", "items": {"enum": [0, 12]}, "minItems": 1, "maxItems": 2},
        [["[", *one, "]"] for one in (["0"], ["12"], *([a, ",", b] for a in ("0", "12") for b in ("0", "12")))],
    ),
    (
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [{"const": 0}, {"const": ["foo"]}]}}},
        [["0"], ["[", '"foo"', "]"]],
    ),
    ({"type": "integer", "minimum": 9, "maximum": 12}, [["9"], ["10"], ["11"], ["12"]]),
    ({"type": "string", "minLength": 1, "maxLength": 1, "pattern": "^[ab]$"}, [['"a"'], ['"b"']]),
    ({"type": "object", "additionalProperties": False}, [["{", "}"]]),
]


@pytest.fixture(scope="module")
def walker():
    return Walker()


def follow(walker: Walker, grammar: str, language: Language, seed: int) -> int:
    """Go through the grammar at random, and hold every mask against the filter. The number of masks."""
    random, matcher, before = Random(seed), walker.matcher(grammar), b""
    for number in range(60):
        if matcher.is_stopped():
            assert language.holds(before)
            assert not any(language.may_begin(before + token) for token in walker.table.tokens if token)
            return number
        mask, wanted = walker.mask(matcher), walker.brute_force(language, before)
        wrong = [walker.table.tokens[token_id] for token_id in np.flatnonzero(mask != wanted)]
        assert not wrong, (before, wrong)
        assert matcher.is_accepting() == language.holds(before)
        choices = [token_id for token_id in np.flatnonzero(mask) if walker.table.tokens[token_id]]
        if not choices:
            return number + 1
        token_id = int(random.choice(choices))
        assert matcher.consume_token(token_id)
        before += walker.table.tokens[token_id]
    return number


@pytest.mark.parametrize("seed", range(8))
def test_choices(walker, seed):
    texts = Random(seed).sample(TEXTS, 1 + seed)
    grammar = walker.written("choice", texts)
    assert sum(follow(walker, grammar, language_of(*texts), number) for number in range(8)) >= 8


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(walker, pattern):
    grammar = walker.written("regex", pattern)
    for number in range(8):
        follow(walker, grammar, Language(pattern.encode()), number)


@pytest.mark.parametrize(("schema", "texts"), SCHEMAS, ids=range(len(SCHEMAS)))
def test_schemas(walker, schema, texts):
    import json

    grammar = walker.written("json_schema", json.dumps(schema))
    for number in range(12):
        follow(walker, grammar, documents(*texts), number)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_texts_match_their_pattern(walker, pattern):
    grammar, found = walker.written("regex", pattern), set()
    for number in range(20):
        text, is_whole = walker.walk(grammar, Random(number))
        if is_whole:
            assert re.fullmatch(pattern, text.decode()), text
            found.add(text)
    assert len(found) > 3


def test_a_control_token_is_in_no_text(walker):
    from grammar_walks import CONTROL

    for grammar in (walker.written("regex", "(?s:.*)"), walker.written("json_object")):
        assert not walker.mask(walker.matcher(grammar))[CONTROL]
