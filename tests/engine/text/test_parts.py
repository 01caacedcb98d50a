"""The parts of an answer as its tokens come, against a slow parser of the whole."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.part_answers import IDS, SYNTAXES, Pieces, answers, joined, random_answer, read
from support.parts_reference import parse

from cierzo.engine.messages import Part
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.parts import PartsReader, numbered
from cierzo.engine.text.reader_state import ReaderState

NAMES = st.sampled_from(list(SYNTAXES))
LENGTHS = st.lists(st.integers(1, 6), max_size=20)
CASES = NAMES.flatmap(lambda name: st.tuples(st.just(name), answers(name)))


@settings(deadline=None)
@given(CASES, LENGTHS, st.booleans())
def test_however_the_tokens_come_the_parts_are_those_of_the_whole(case, lengths, in_thinking):
    name, (vocabulary, token_ids) = case
    _like_the_whole(name, vocabulary, token_ids, lengths, in_thinking)


def test_random_answers_have_the_parts_of_the_whole():
    rng = random.Random(17)
    for _ in range(1500):
        name = rng.choice(list(SYNTAXES))
        vocabulary, token_ids = random_answer(rng, name)
        lengths = [rng.choice((1, 1, 1, 2, 5, 20)) for _ in token_ids]
        _like_the_whole(name, vocabulary, token_ids, lengths, rng.random() < 0.2)


def _like_the_whole(name, vocabulary, token_ids, lengths, in_thinking):
    reader = PartsReader(vocabulary, SYNTAXES[name], in_thinking=in_thinking)
    text, pieces = read(reader, token_ids, lengths)
    whole = parse(token_ids, vocabulary.token_bytes, SYNTAXES[name], numbered, in_thinking)
    assert joined(pieces) == whole.parts
    assert text == whole.text
    assert (reader.broken_calls, reader.in_thinking) == (whole.broken, whole.in_thinking)
    assert reader.num_calls == len({part.call for part in whole.parts if part.kind == "call"})
    assert reader.num_tokens == sum(piece.num_tokens for piece in pieces) == len(token_ids)


@settings(deadline=None)
@given(CASES, LENGTHS, st.integers(0, 30), st.booleans())
def test_one_that_goes_on_after_a_state_reads_the_same(case, lengths, place, in_thinking):
    name, (vocabulary, token_ids) = case
    first, rest = token_ids[:place], token_ids[place:]

    def new():
        return PartsReader(
            vocabulary, SYNTAXES[name], ("a", "€"), 3, {IDS["[IMG]"]: "[IMG]"}, in_thinking=in_thinking
        )

    reader, resumed, caught_up = new(), new(), new()
    reader.push(first)
    if reader.stop is not None:
        return
    packed = msgspec.msgpack.encode(reader.state())
    assert len(packed) < 300 + sum(len(vocabulary.token_bytes(token)) for token in first)
    resumed.go_on_after(len(first), msgspec.msgpack.decode(packed, type=ReaderState))
    caught_up.catch_up(token_ids, len(first))
    assert resumed.state() == reader.state() == caught_up.state()
    fork = reader.fork()
    expected = read(reader, rest, lengths)
    for other in (fork, resumed, caught_up):
        assert _same(read(other, rest, lengths)) == _same(expected)
        assert (other.stop, other.num_tokens, other.broken_calls) == (
            *(reader.stop, reader.num_tokens, reader.broken_calls),
        )


def test_many_readers_in_turn_read_a_random_answer():
    rng = random.Random(17)
    for _ in range(500):
        name = rng.choice(list(SYNTAXES))
        vocabulary, token_ids = random_answer(rng, name)
        reader, text, pieces = PartsReader(vocabulary, SYNTAXES[name], ("zzz",)), "", []
        for token_id in token_ids:
            text += reader.push([token_id])
            pieces += reader.parts or [Part(kind="text", text=" ", num_tokens=1)]
            if rng.random() < 0.5:
                reader.fork().push([token_id, *token_ids])
                packed = msgspec.msgpack.encode(reader.state())
                num_tokens, reader = reader.num_tokens, PartsReader(vocabulary, SYNTAXES[name], ("zzz",))
                reader.go_on_after(num_tokens, msgspec.msgpack.decode(packed, type=ReaderState))
        text += reader.flush()
        pieces += reader.parts
        whole = parse(token_ids, vocabulary.token_bytes, SYNTAXES[name], numbered)
        assert (text, reader.broken_calls, reader.num_tokens) == (whole.text, whole.broken, len(token_ids))
        assert [_unsaid(part) for part in joined(pieces)] == [_unsaid(part) for part in whole.parts]


def _unsaid(part):
    """The part, but for the text of a text, which is compared on its own."""
    return msgspec.structs.replace(part, text="") if part.kind == "text" else part


def _same(answer):
    text, pieces = answer
    return text, joined(pieces)


@settings(deadline=None)
@given(
    CASES,
    st.lists(st.text('ab<{ \n"€', min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 12),
    LENGTHS,
)
def test_stop_strings_are_looked_for_in_text_alone(case, stops, min_tokens, lengths):
    name, (vocabulary, token_ids) = case
    _stops_in_text(name, vocabulary, token_ids, lengths, stops, min_tokens)


def test_stop_strings_in_random_answers():
    rng = random.Random(17)
    for _ in range(1000):
        name = rng.choice(list(SYNTAXES))
        vocabulary, token_ids = random_answer(rng, name)
        stops = rng.sample(["b  ", "get", "€\n", "<a", ";", "f {", "aa", "\ufffd", '": 1', "<"], rng.randint(1, 3))
        lengths = [rng.choice((1, 1, 1, 2, 5, 20)) for _ in token_ids]
        _stops_in_text(name, vocabulary, token_ids, lengths, stops, rng.randint(0, 40))


def _stops_in_text(name, vocabulary, token_ids, lengths, stops, min_tokens):
    syntax = SYNTAXES[name]
    reader = PartsReader(vocabulary, syntax, tuple(stops), min_tokens)
    text, pieces = read(reader, token_ids, lengths)
    whole = parse(token_ids, vocabulary.token_bytes, syntax, numbered)
    expected, stop, number = _stopped(whole.texts, stops, min_tokens)
    assert (text, reader.stop) == (expected, stop)
    assert reader.num_tokens == sum(piece.num_tokens for piece in pieces)
    if stop is None:
        assert joined(pieces) == whole.parts
    elif not syntax.spelled and not syntax.bare_calls:  # else what is a stop string is known later
        assert reader.num_tokens == number
        before = parse(token_ids[: number - 1], vocabulary.token_bytes, syntax, numbered)
        calls = [part for part in joined(pieces) if part.kind != "text"]
        assert [part for part in before.parts if part.kind != "text"] == calls


def _stopped(texts, stops, min_tokens):
    """Text before the stop string, that string, and the number of the token that completes it."""
    given_out = ""
    for chars in texts:
        text = "".join(char for char, _ in chars)
        for end in range(1, len(text) + 1):
            number = chars[end - 1][1] + 1
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found and number >= min_tokens:
                longest = max(found, key=len)
                return given_out + text[: end - len(longest)], longest, number
        given_out += text
    return given_out, None, None


def test_without_parallel_calls_what_opens_a_second_one_stops():
    rng, num_stopped = random.Random(17), 0
    for _ in range(1000):
        name = rng.choice(list(SYNTAXES))
        vocabulary, token_ids = random_answer(rng, name)
        reader = PartsReader(vocabulary, SYNTAXES[name], parallel=False)
        assert reader.watches
        _, pieces = read(reader, token_ids, [rng.choice((1, 1, 1, 2, 5, 20)) for _ in token_ids])
        whole = parse(token_ids, vocabulary.token_bytes, SYNTAXES[name], numbered).parts
        first = next((at for at, part in enumerate(whole) if part.kind == "call" and part.call == 1), len(whole))
        if reader.stop is None:
            assert (joined(pieces), first) == (whole, len(whole))
            continue
        num_stopped += 1
        assert (reader.stop, reader.num_calls) == (SYNTAXES[name].call_marker, 1)
        assert reader.num_tokens == sum(piece.num_tokens for piece in pieces)
        said, expected = _said(joined(pieces)), _said(whole[:first])
        if first < len(whole):
            assert said == expected
        else:  # what opened one was none after all
            assert said[:-1] == expected[: len(said) - 1]
            assert expected[len(said) - 1][1].startswith(said[-1][1])
    assert num_stopped > 50


def _said(parts):
    return [(part.kind, part.text, part.name) for part in parts if part.text or part.kind == "call"]


def test_the_token_that_opens_a_second_call_is_not_taken():
    vocabulary = Pieces()
    token_ids = _tokens(vocabulary, "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}")
    for lengths in ([1] * 20, [20]):
        reader = PartsReader(vocabulary, SYNTAXES["mistral"], parallel=False)
        _, pieces = read(reader, token_ids, lengths)
        assert (reader.stop, reader.num_tokens) == ("[TOOL_CALLS]", 5)
        assert joined(pieces) == [Part(kind="call", name="f", id="000000000", text="{}", num_tokens=5)]


def test_a_second_call_in_the_same_token_is_none():
    vocabulary = Pieces()
    text = b'[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    reader = PartsReader(vocabulary, SYNTAXES["mistral"], parallel=False)
    _, pieces = read(reader, [IDS["[TOOL_CALLS]"], vocabulary.add(text)])
    assert (reader.stop, reader.num_tokens, reader.num_calls) == ("[TOOL_CALLS]", 2, 1)
    assert joined(pieces) == [Part(kind="call", name="f", id="000000000", text="{}", num_tokens=2)]


def _tokens(vocabulary, text, markers=IDS):
    """Tokens of a character each, and of the markers in the text."""
    token_ids = []
    while text:
        marker = next((marker for marker in markers if text.startswith(marker)), "")
        token_ids.append(IDS[marker] if marker else vocabulary.add(text[0].encode()))
        text = text[len(marker) or 1 :]
    return token_ids


def _parts(name, text, **options):
    vocabulary, syntax = Pieces(), SYNTAXES[name]
    token_ids = _tokens(vocabulary, text, [marker for marker in IDS if IDS[marker] in syntax.tokens])
    reader = PartsReader(vocabulary, syntax, **options)
    _, pieces = read(reader, token_ids, [1] * len(token_ids))
    return [
        (part.kind, part.text) if part.kind != "call" else (part.name, part.text) for part in joined(pieces)
    ], reader


ENDINGS = {
    "thinking that is not closed": ("mistral", "[THINK]hm", [("thinking", "hm")], []),
    "a thought within a thought": ("mistral", "[THINK]a[THINK]b[/THINK]c", [("thinking", "ab"), ("text", "c")], []),
    "an end without a beginning": ("mistral", "a[/THINK]b", [("text", "ab")], []),
    "a call ends a thought": ("mistral", "[THINK]a[TOOL_CALLS]f[ARGS]{}", [("thinking", "a"), ("f", "{}")], []),
    "a thought ends a call": ("mistral", "[TOOL_CALLS]f{[THINK]a", [("f", "{"), ("thinking", "a")], [0]),
    "a call cut in its name": ("mistral", "[TOOL_CALLS]get_w", [("get_w", "")], [0]),
    "a call cut in its arguments": ("mistral", '[TOOL_CALLS]f[ARGS]{"x', [("f", '{"x')], [0]),
    "no [ARGS]": ("mistral", '[TOOL_CALLS]f {"x": 1} ', [("f", '{"x": 1} ')], []),
    "spaces around": ("mistral", "[TOOL_CALLS] f \n[ARGS] {} \n", [("f", " {} \n")], []),
    "no name": ("mistral", "[TOOL_CALLS][ARGS]{}", [("", "{}")], [0]),
    "no call": ("mistral", "[TOOL_CALLS][]", [("text", "")], []),
    "nothing behind a marker": ("mistral", "a[TOOL_CALLS]", [("text", "a")], []),
    "broken JSON in a list": (
        "mistral",
        '[TOOL_CALLS][{"name":"f","arguments":{"x":1,}},{"name":"g","arguments":{}}]',
        [("f", '{"x":1,}'), ("g", "{}")],
        [0],
    ),
    "a list of something else": ("mistral", "[TOOL_CALLS][1, 2]", [("", "1, 2]")], [0]),
    "arguments that are no object": ("mistral", "[TOOL_CALLS]f[ARGS][1]", [("f", "[1]")], [0]),
    "text behind arguments": ("mistral", "[TOOL_CALLS]f[ARGS]{} ok", [("f", "{} ok")], [0]),
    "text behind a list": (
        "mistral",
        '[TOOL_CALLS][{"name":"f","arguments":{}}] ok',
        [("f", "{}"), ("text", "ok")],
        [],
    ),
    "a call cut before its arguments": ("tags", '<tool_call>{"name": "f"', [("f", '{"name": "f"')], [0]),
    "a call that is no JSON": ("tags", "<tool_call>\nf()\n</tool_call>", [("", "f()\n")], [0]),
    "a brace that is missing": ("tags", '<tool_call>{"name": "f", "arguments": {}</tool_call>', [("f", "{}")], []),
    "arguments before the name": ("tags", '<tool_call>{"arguments": {}, "name": "f"}', [("f", "{}")], []),
    "a call within a call": (
        "tags",
        '<tool_call>{"name": "f", "arguments": {<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [("f", "{"), ("g", "{}")],
        [0],
    ),
    "a call that is not closed": (
        "tags",
        '<tool_call>\n{"name": "f", "arguments": {}}\nok',
        [("f", "{}"), ("text", "ok")],
        [],
    ),
    "a marker that is cut": ("tags", "a<tool_ca", [("text", "a<tool_ca")], []),
    "JSON that is no call": ("llama", '{"name": "Ann", "age": 3}', [("text", '{"name": "Ann", "age": 3}')], []),
    "a call without a marker": ("llama", '{"name": "f", "parameters": {"x": 1}}', [("f", '{"x": 1}')], []),
    "two calls without markers": (
        "llama",
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        [("f", "{}"), ("g", "{}")],
        [],
    ),
    "a call behind a thought": (
        "llama",
        '<think>hm</think>\n\n{"name": "f", "parameters": {}}',
        [("thinking", "hm"), ("text", "\n\n"), ("f", "{}")],
        [],
    ),
    "JSON behind text": (
        "llama",
        'so: {"name": "f", "parameters": {}}',
        [("text", 'so: {"name": "f", "parameters": {}}')],
        [],
    ),
    "code behind a marker": ("llama", "<|python_tag|>f.call(x=1)", [("", "f.call(x=1)")], [0]),
}


@pytest.mark.parametrize("what", ENDINGS)
def test_what_is_not_as_it_should_be_ends_so(what):
    name, text, expected, broken = ENDINGS[what]
    parts, reader = _parts(name, text)
    assert (parts, reader.broken_calls) == (expected, broken)


NEXT = numbered(1)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "aaaaaaaaa"}]', ["aaaaaaaaa"]),
        ('[TOOL_CALLS][{"name": "f", "id": "aaaaaaaaa", "arguments": {}, "id": "bbbbbbbbb"}]', ["aaaaaaaaa"]),
        (
            '[TOOL_CALLS][{"arguments": {}, "name": "f", "id": "aaaaaaaaa"}, {"name": "g"',
            ["aaaaaaaaa", "000000001"],
        ),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "no id"}]', ["000000000"]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1', ["000000000"]),
        (
            "[TOOL_CALLS]f[CALL_ID]aaaaaaaaa[ARGS]{}[TOOL_CALLS]f[CALL_ID]aaaaaaaaa[ARGS]{}",
            ["aaaaaaaaa", "000000001"],
        ),
        ('[TOOL_CALLS]{"name": "f", "arguments": {}, "id": "aaaaaaaaa"}', ["000000000"]),
    ],
)
def test_a_call_has_the_model_s_id_unless_another_call_has_it(text, ids):
    """In a list it may come behind the arguments, as v3 and v7 write it: then it is in the call's last piece."""
    vocabulary, syntax = Pieces(), SYNTAXES["mistral"]
    token_ids = _tokens(vocabulary, text)
    for place in range(len(token_ids)):
        reader, again = PartsReader(vocabulary, syntax), PartsReader(vocabulary, syntax)
        first = [part for token_id in token_ids[:place] if reader.push([token_id]) == "" for part in reader.parts]
        again.go_on_after(place, reader.state())
        _, rest = read(again, token_ids[place:])
        assert [part.id for part in joined([*first, *rest]) if part.kind == "call"] == ids


def test_pitfall_20_markers_without_text_are_read_as_tokens():
    """Control tokens are deleted from the text before anyone could look for them there."""
    vocabulary = Pieces()
    token_ids = _tokens(vocabulary, '[THINK]hm[/THINK]ok[TOOL_CALLS]f[ARGS]{"x": 1}')
    plain = Detokenizer(vocabulary)
    assert plain.push(token_ids) == 'hmokf{"x": 1}'
    parts, _ = _parts("mistral", '[THINK]hm[/THINK]ok[TOOL_CALLS]f[ARGS]{"x": 1}')
    assert parts == [("thinking", "hm"), ("text", "ok"), ("f", '{"x": 1}')]


def test_pitfall_21_a_streamed_call_leaves_no_marker_and_no_name_in_the_text():
    vocabulary = Pieces()
    reader = PartsReader(vocabulary, SYNTAXES["mistral"])
    pushed = []
    for token_id in _tokens(vocabulary, 'a[TOOL_CALLS]f[ARGS]{"x":1}[TOOL_CALLS]g[ARGS]{}'):
        assert reader.push([token_id]) == ("a" if not pushed else "")
        pushed.append([(part.kind, part.name, part.text) for part in reader.parts])
    assert pushed[:5] == [[], [("text", "", "")], [("text", "", "")], [("call", "f", "")], [("call", "", "{")]]
    assert reader.flush() == ""


@pytest.mark.parametrize(
    "arguments", ['{"n": 12}', '{"s": "say \\"hi\\""}', '{"a": {"b": [1, 2, {"c": "]}"}]}}', "{}"]
)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        (
            "mistral",
            '[TOOL_CALLS][{{"name": "f", "arguments": {0}}}, {{"name": "f", "arguments": {0}, "id": "x"}}]',
        ),
        ("mistral", "[TOOL_CALLS]f[ARGS]{0}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{0}"),
        (
            "tags",
            '<tool_call>{{"name":"f","arguments":{0}}}</tool_call><tool_call>{{"arguments":{0},"name":"f"}}</tool_call>',
        ),
    ],
)
def test_pitfall_23_numbers_quotes_and_parallel_calls_are_streamed_as_they_are_written(name, form, arguments):
    parts, reader = _parts(name, form.format(arguments))
    assert (parts, reader.broken_calls) == ([("f", arguments)] * 2, [])


def test_a_model_s_id_counts_if_it_comes_before_the_arguments_and_has_the_form_of_one():
    vocabulary = Pieces()
    token_ids = _tokens(vocabulary, "[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}[TOOL_CALLS]g[CALL_ID]no id[ARGS]{}")
    reader = PartsReader(vocabulary, SYNTAXES["mistral"], call_id=lambda call: f"made{call}")
    _, pieces = read(reader, token_ids)
    assert [part.id for part in joined(pieces)] == ["abc123XYZ", "made1"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "<", "<t", "<th", "</", "ink>", " "]), max_size=20))
def test_no_more_is_held_back_than_could_become_a_marker(texts):
    vocabulary, seen, out = Pieces(), "", ""
    reader = PartsReader(vocabulary, SYNTAXES["tags"])
    markers = list(SYNTAXES["tags"].spelled)
    for text in texts:
        seen += text
        if any(marker in seen for marker in markers):
            return
        out += reader.push([vocabulary.add(text.encode())])
        longest = max((n for marker in markers for n in range(len(marker)) if seen.endswith(marker[:n])), default=0)
        assert out == seen[: len(seen) - longest]


def test_a_json_answer_is_held_back_until_it_is_no_call():
    vocabulary = Pieces()
    reader = PartsReader(vocabulary, SYNTAXES["llama"])
    texts = [reader.push([token]) for token in _tokens(vocabulary, ' {"name": "Ann", "age": 3}')]
    assert [text for text in texts if text] == [" ", '{"name": "Ann", "ag', *'e": 3}']


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", " ", "<think>", "</think>", "<tool_call>", "</tool_call>", '{"x": 1}']), max_size=12
    )
)
def test_no_marker_leaks_into_a_part(texts):
    for name in ("tags", "tag tokens"):
        parts, _ = _parts(name, "".join(texts))
        assert not [text for _, text in parts if "<" in text or ">" in text]


@settings(deadline=None)
@given(answers("mistral"), LENGTHS)
def test_text_without_markers_is_read_as_a_detokenizer_reads_it(answer, lengths):
    vocabulary, token_ids = answer
    token_ids = [token for token in token_ids if token not in SYNTAXES["mistral"].tokens]
    stops = ("ab", "€", "[IMG]")
    reader = PartsReader(vocabulary, SYNTAXES["mistral"], stops, 2, {IDS["[IMG]"]: "[IMG]"})
    plain = Detokenizer(vocabulary, stops, 2, {IDS["[IMG]"]: "[IMG]"})
    assert read(reader, token_ids, lengths)[0] == plain.push(token_ids) + plain.flush()
    assert (reader.stop, reader.num_tokens) == (plain.stop, plain.num_tokens)


def test_a_marker_that_does_nothing_cuts_no_character():
    vocabulary = Pieces()
    first, rest = vocabulary.add("€".encode()[:2]), vocabulary.add("€".encode()[2:])
    think, end = IDS["[THINK]"], IDS["[/THINK]"]
    token_ids = [first, end, rest, think, first, think, rest, IDS["[TOOL_CALLS]"], first, end, rest]
    _, pieces = read(PartsReader(vocabulary, SYNTAXES["mistral"]), token_ids)
    assert [(part.kind, part.text or part.name) for part in joined(pieces)] == [
        *(("text", "€"), ("thinking", "€"), ("call", "€"))
    ]


def test_a_stop_string_that_is_a_control_token_stops_in_a_thought_too():
    vocabulary = Pieces()
    reader = PartsReader(vocabulary, SYNTAXES["mistral"], ("[IMG]", "b"), 0, {IDS["[IMG]"]: "[IMG]"})
    text, pieces = read(reader, _tokens(vocabulary, "[THINK]abc[IMG]d"), [1] * 5)
    assert (text, reader.stop, reader.num_tokens) == ("", "[IMG]", 5)
    assert joined(pieces) == [Part(kind="thinking", text="abc", num_tokens=5)]


def test_a_stop_string_is_not_found_across_a_thought():
    for name, text in (("mistral", "a[THINK]b[/THINK]bc"), ("tags", "a<think>b</think>bc")):
        parts, reader = _parts(name, text, stop=("ab",))
        assert (parts, reader.stop) == ([("text", "a"), ("thinking", "b"), ("text", "bc")], None)


def test_what_could_have_been_a_marker_is_a_stop_string_at_the_token_that_it_came_with():
    for min_tokens, expected in ((1, "a"), (2, "a"), (3, "a<b")):
        parts, reader = _parts("tags", "a<b", stop=("<",), min_tokens=min_tokens)
        assert (parts, reader.num_tokens) == ([("text", expected)], 3)


def test_a_leading_space_of_a_sentencepiece_vocabulary_is_no_part_of_a_thought():
    vocabulary = Pieces(strip_leading_space=True)
    reader = PartsReader(vocabulary, SYNTAXES["tag tokens"], in_thinking=True)
    _, pieces = read(reader, _tokens(vocabulary, " hm</think> ok"))
    assert [part.text for part in joined(pieces)] == ["hm", " ok"]


def test_what_is_kept_of_a_call_is_bounded():
    vocabulary = Pieces()
    many = 20_000
    for name, text in (
        ("mistral", "[TOOL_CALLS]" + "n" * many),
        ("tags", "<tool_call>{" + " " * many),
        ("tags", '<tool_call>{"arguments": "' + "a" * many),
        ("tags", '<tool_call>{"' + "k" * many),
        ("llama", '{"name": "' + "n" * many),
    ):
        reader = PartsReader(vocabulary, SYNTAXES[name])
        token_ids = _tokens(vocabulary, text, [marker for marker in IDS if IDS[marker] in SYNTAXES[name].tokens])
        reader.push(token_ids[:-1])
        assert len(msgspec.msgpack.encode(reader.state())) < 500
        read(reader, token_ids[-1:])
        assert name == "llama" or reader.broken_calls == [0]


@pytest.mark.parametrize("name", ["w n", "é", "f.g", "a" * 65, "f:"])
def test_a_call_of_what_no_tool_can_be_named_is_broken(name):
    for answer in (f'{name}{{"x": 1}}', f'[{{"name": "{name}", "arguments": {{}}}}]'):
        parts, reader = _parts("mistral", f"[TOOL_CALLS]{answer}")
        assert ([said for said, _ in parts], reader.broken_calls) == ([name], [0])
