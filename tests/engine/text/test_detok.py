"""Tokens to text, one at a time, against the whole text at once; stop strings against a brute-force search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cierzo.engine.text.detok import Detokenizer, stop_matcher


class Bytes:
    """Token ids are bytes; with SentencePiece's leading space on demand."""

    def __init__(self, strip_leading_space: bool = False) -> None:
        self.strip_leading_space = strip_leading_space

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=20), st.booleans())
def test_pieces_add_up_to_the_whole_text(data, cuts, strip):
    detokenizer, texts, start = Detokenizer(Bytes(strip)), [], 0
    for length in [*cuts, len(data)]:
        texts.append(detokenizer.push(list(data[start : start + length])))
        start += length
    texts.append(detokenizer.flush())
    whole = data.decode("utf-8", errors="replace")
    assert "".join(texts) == (whole.removeprefix(" ") if strip else whole)
    assert detokenizer.num_tokens == len(data)


def test_text_waits_for_whole_characters_only():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


ALPHABET = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def _brute_force(text, stops, min_tokens):
    """(text before the stop, stop, characters taken), searching every end from the left."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and end >= min_tokens:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest, end
    return text, None, len(text)


@given(ALPHABET, STOPS, st.integers(0, 8), st.integers(1, 4))
def test_stop_strings(text, stops, min_tokens, width):
    detokenizer, texts = Detokenizer(Bytes(), tuple(stops), min_tokens), []
    for start in range(0, len(text), width):
        texts.append(detokenizer.push(list(text[start : start + width].encode())))
        certain = "".join(texts)
        assert text.startswith(certain)
        if detokenizer.stop is not None:
            break
    texts.append(detokenizer.flush())
    expected, stop, taken = _brute_force(text, stops, min_tokens)
    assert ("".join(texts), detokenizer.stop, detokenizer.num_tokens) == (expected, stop, taken)


@given(ALPHABET, STOPS)
def test_no_more_is_held_back_than_could_become_a_stop(text, stops):
    detokenizer, seen, given_out = Detokenizer(Bytes(), tuple(stops)), "", ""
    for char in text:
        seen += char
        given_out += detokenizer.push([ord(char)])
        if detokenizer.stop is not None:
            return
        longest = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert given_out == seen[: len(seen) - longest]


def test_the_matcher_visits_each_character_a_bounded_number_of_times(monkeypatch):
    """The worst text for a naive search: the stop string almost matches, everywhere."""
    stop = "a" * 255 + "b"
    matcher, looks = stop_matcher((stop,)), 0

    class Counting(dict):
        def __contains__(self, key):
            nonlocal looks
            looks += 1
            return super().__contains__(key)

    monkeypatch.setattr(matcher, "_next", [Counting(entry) for entry in matcher._next])
    state = 0
    for char in "a" * 5000:
        state = matcher.step(state, char)
    assert matcher.depth[state] == 255
    assert looks <= 2 * 5000


@given(
    st.lists(st.sampled_from([97, 98, 300, 301, 0xE2]), max_size=12), STOPS, st.integers(0, 6), st.integers(1, 4)
)
def test_special_tokens_stop_like_strings(token_ids, stops, min_tokens, width):
    """Against stop strings in the text alone, cut at the first special token: whichever comes first."""
    special = {300: "<a>", 301: "<b>"}
    strings = (*stops, *special.values())
    first = next((i for i, token in enumerate(token_ids) if token in special and i + 1 >= min_tokens), None)
    expected = Detokenizer(Bytes(), strings, min_tokens)
    text = expected.push(token_ids[:first])
    text += expected.flush()
    stop, taken = expected.stop, expected.num_tokens
    if stop is None and first is not None:
        stop, taken = special[token_ids[first]], first + 1
    detokenizer, texts = Detokenizer(Bytes(), strings, min_tokens, special), []
    for start in range(0, len(token_ids), width):
        texts.append(detokenizer.push(token_ids[start : start + width]))
        if detokenizer.stop is not None:
            break
    texts.append(detokenizer.flush())
    assert ("".join(texts), detokenizer.stop, detokenizer.num_tokens) == (text, stop, taken)


def test_special_tokens_are_no_text():
    detokenizer = Detokenizer(Bytes(), ("<s>",))
    assert detokenizer.push([300, 65, 301, 66]) + detokenizer.flush() == "AB"


PIECES = st.lists(st.sampled_from([*b"abc ", *"\u20ac\ufffd".encode(), 0xC3, 300]), max_size=60)


@given(PIECES, PIECES, STOPS | st.just(["\ufffda", "c\u20ac"]), st.booleans(), st.integers(0, 80), st.booleans())
def test_the_tail_of_a_long_answer_is_enough_to_go_on(before, after, stops, with_stops, min_tokens, strip):
    stops = tuple(stops) if with_stops else ()
    tokens = Bytes(strip)
    whole = Detokenizer(tokens, stops, min_tokens)
    whole.push(before)
    if whole.stop is not None:
        return
    short = Detokenizer(tokens, stops, min_tokens)
    short.catch_up(before, len(before))
    assert short.push(after) == whole.push(after)
    assert (short.stop, short.num_tokens) == (whole.stop, whole.num_tokens)
    assert short.flush() == whole.flush()


def test_a_tail_is_no_longer_than_it_must_be():
    detokenizer = Detokenizer(Bytes(), ("abc",))
    assert detokenizer.tail([97] * 100_000 + [300] * 1000, 101_000) == [97] * 20
    assert detokenizer.tail([300] * 50, 50) == []


def test_a_character_that_the_tail_cuts_is_no_stop_string():
    before, stop = [*"€a".encode(), *b"b" * 13], "\ufffda"
    detokenizer = Detokenizer(Bytes(), (stop,))
    tail = detokenizer.tail(before, len(before))
    assert tail == before[1:]
    detokenizer.go_on_after(len(before), tail)
    assert (detokenizer.push([97]), detokenizer.stop, detokenizer.num_tokens) == ("a", None, 18)
