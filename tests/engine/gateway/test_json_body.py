"""Bodies that are JSON to one reader and not to another: refused, with the place."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.gateway.json_body import read_object

DEPTH = 8
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**64), 2**64),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("body", "place", "words"),
    [
        (b"", "body", "not JSON"),
        (b"{", "body", "line 1, column 2"),
        (b"{} {}", "body", "extra data"),
        (b"{'a': 1}", "body", "not JSON"),
        (b'{"a": 1,}', "body", "not JSON"),
        (b'{"a": 01}', "body", "not JSON"),
        (b'{"a": "\n"}', "body", "control character"),
        (b"[]", "body", "must be a JSON object"),
        (b"null", "body", "must be a JSON object"),
        (b'"text"', "body", "must be a JSON object"),
        (b'{"a": "\xff"}', "body", "not UTF-8 at byte 7"),
        (b'\xef\xbb\xbf{"a": 1}', "body", "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "body", "not UTF-8"),
        (b'{"a": %s}' % (b"1" * 5000), "body", "too many digits"),
        (b'{"a": NaN}', "a", "finite"),
        (b'{"a": [1, {"b": -Infinity}]}', "a[1].b", "finite"),
        (b'{"a": [0.5, 1e999]}', "a[1]", "finite"),
        (b'{"a": 1, "a": 1}', "a", "twice"),
        (b'{"a": {"b": [0, {"c": 1, "d": 2, "c": 1}]}}', "a.b[1].c", "twice"),
        (b'{"a": {"x y": 1, "x y": 2}}', "a['x y']", "twice"),
        (rb'{"a": 1, "\u0061": 2}', "a", "twice"),
        (rb'{"a": ["ok", "\ud83d!"]}', "a[1]", "lone surrogate, U.D83D, as character 0"),
        (rb'{"a": "\uDE00\uD83D"}', "a", "lone surrogate"),
        (rb'{"a": {"\ud800": 1}}', "a name in a", "lone surrogate"),
        (b'{"a": %s%s}' % (b"[" * 8, b"]" * 8), "a" + "[0]" * 7, "nested too deeply, allowed: 8 levels"),
        (b'{"a": %s1%s}' % (b'{"b": ' * 8, b"}" * 8), "a" + ".b" * 7, "nested too deeply"),
        (b'{"%s": NaN}' % (b"x" * 10_000), f"['{'x' * 50}...']", "finite"),
        (b"[" * 100_000, "body", "nested too deeply"),
        (b'{"a": ' * 100_000, "body", "nested too deeply"),
    ],
)
def test_what_is_refused(body, place, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        read_object(body, DEPTH)
    assert caught.value.field == place


def test_what_looks_like_it_and_is_sound():
    body = {"a": 'NaN [[[[[[[[[[ {{{{{{ \\ud800 "', "b": "😀", "c": [[[[[[1.5, 10**20]]]]]], "d": {"a": {"a": 0}}}
    for text in (json.dumps(body), json.dumps(body, ensure_ascii=False)):
        assert read_object(text.encode(), DEPTH) == body


def test_the_deepest_that_is_taken():
    body = b'{"a": %s%s}' % (b"[" * 7, b"]" * 7)
    assert read_object(body, DEPTH) == json.loads(body)


def test_a_name_that_a_dropped_object_has_twice_is_not_told_of_another():
    """The first value of a name that comes twice is gone, and its memory may be another object's."""
    dropped = b'{"b": 1, "b": 2},' * 100
    with pytest.raises(InvalidRequest) as caught:
        read_object(b'{"x": [{"a": [%s0], "a": 0}]}' % dropped, DEPTH)
    assert caught.value.field == "x[0].a"


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
@example({"a": math.pi, "": [True, None]}, True)
def test_all_that_json_can_write_is_read_as_it_was_written(values, ascii_only):
    body = json.dumps(values, ensure_ascii=ascii_only).encode()
    assert read_object(body, 64) == values


@given(st.binary(max_size=60))
def test_bytes_are_read_or_refused(body):
    try:
        values = read_object(body, DEPTH)
    except InvalidRequest:
        return
    assert json.loads(body) == values


def test_a_long_body_is_read_at_once():
    """Work in proportion to the body: each of these would take minutes, were it the square."""
    names = ",".join(f'"{number}": 0' for number in range(200_000))
    assert len(read_object(f"{{{names}}}".encode(), DEPTH)) == 200_000
    with pytest.raises(InvalidRequest, match="199999 is there twice"):
        read_object(f'{{{names}, "199999": 0}}'.encode(), DEPTH)
    ids = list(range(300_000))
    assert read_object(json.dumps({"prompt": [ids], "a": [[]] * 9}).encode(), DEPTH)["prompt"] == [ids]
