"""Reading JSON that is still being written, against json.loads of the whole."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cierzo.engine.text.json_scan import MAX_DEPTH, MAX_NUMBER_CHARS, JsonScan
from cierzo.engine.text.tool_arguments import canonical_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
NOISE = st.text('{}[],:"\\ \n0123-+.eEtrufalsn\x01x/', max_size=25)


def _is_json(text):
    def refuse(word):
        raise ValueError(word)

    try:
        canonical_json(json.loads(text, parse_constant=refuse)).encode()
    except ValueError:
        return False
    return True


def _scanned(text, cuts=()):
    """The state after `text`, and where the value ended in it."""
    scan, at, places = JsonScan(), 0, sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    for place in places:
        at += scan.feed(text[at:place])
        scan = msgspec.msgpack.decode(msgspec.msgpack.encode(scan), type=JsonScan)
        if scan.is_done:
            break
    scan.end()
    return scan, at


CUTS = st.lists(st.integers(0, 60), max_size=5)


@settings(deadline=None)
@given(VALUES, CUTS, st.booleans(), st.sampled_from(["", " ", ",", "}", "x"]))
def test_a_value_ends_where_it_ends(value, cuts, ascii_only, behind):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=2)
    scan, end = _scanned(text + behind, cuts)
    assert (scan.is_valid, scan.is_done, end) == (True, True, len(text))
    assert scan.is_object == isinstance(value, dict)


@settings(deadline=None)
@given(
    NOISE
    | st.builds(
        lambda value, place, char: json.dumps(value)[:place] + char + json.dumps(value)[place:],
        VALUES,
        st.integers(0, 40),
        st.text('{}[],:"\\ 0.e', max_size=1),
    ),
    CUTS,
)
@example("-", [])
@example("1.", [])
@example("01", [])
@example("[1,]", [])
@example('{"a":1,}', [])
@example('"\\u12"', [])
@example("[tru]", [])
@example("", [])
def test_what_is_json_is_what_a_decoder_takes(text, cuts):
    scan, end = _scanned(text, cuts)
    assert (scan.is_valid and scan.is_done and not text[end:].strip(" \t\n\r")) == _is_json(text)


@settings(deadline=None)
@given(VALUES, st.sampled_from([",", "tru", "\n", "\\x", "1 2"]), CUTS)
def test_the_end_of_a_broken_object_is_told_by_its_brackets(value, fault, cuts):
    text = (
        '{"a": '
        + json.dumps(value)
        + ', "b": "'
        + fault.replace("\\x", "\\\\")
        + '"'
        + fault.replace("\\x", "")
        + ",}"
    )
    scan, end = _scanned(text + "}]", cuts)
    assert (scan.is_valid, scan.is_done, end) == (False, True, len(text))


@given(
    st.lists(
        st.sampled_from(("\\ud83d", "\\ude00", "\\uDBFF", "\\uD7FF", "\\ue000", "a", "\\n", "é")), max_size=5
    ).map("".join),
    CUTS,
)
def test_halves_of_surrogate_pairs_are_no_json(inner, cuts):
    for text in (f'"{inner}"', f'{{"{inner}":0}}'):
        scan, _ = _scanned(text, cuts)
        assert scan.is_valid == _is_json(text)


@pytest.mark.parametrize(
    "number",
    [
        *("1e999", "-1e999", "1e308", "1.8e308", "1e-999", "0e999", "9" * 400 + ".0", "9" * 308 + ".0"),
        *("1" * MAX_NUMBER_CHARS, "1" * (MAX_NUMBER_CHARS + 1), "1e" + "0" * 400 + "1"),
    ],
)
def test_numbers_that_nobody_could_repeat_are_no_json(number):
    for text in (number, f'{{"a":[{number}]}}'):
        scan, _ = _scanned(text, range(0, 50, 7))
        assert scan.is_valid == _is_json(text)


def test_a_value_that_is_nested_too_deep_is_no_json():
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        scan, _ = _scanned("[" * depth + "]" * depth)
        assert (scan.is_valid and scan.is_done) == (depth == MAX_DEPTH)
    assert len(msgspec.msgpack.encode(_scanned("[" * 100_000)[0])) < 500


def test_the_state_is_small():
    scan, _ = _scanned('{"text": "' + "a" * 100_000)
    assert len(msgspec.msgpack.encode(scan)) < 100
