"""The log of an answer: whoever reads it, in whatever pieces and from wherever, gets what a reader of all gets."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.answer import Answer, in_order
from cierzo.engine.frontend.logprob_log import LogprobLog
from cierzo.engine.frontend.sample import STATE_TOKENS, Sample, most_token_bytes, require_bounded
from cierzo.engine.messages import Finish, SamplingParams, Submit, TokenDelta, TokenLogprobs
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.syntax import Syntax

PIECES = [b"a", b"b", b"ab", b"", b" ", "€".encode(), b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x99\x82", b"\xff"]
STOPS = ["ab", "ba b", "€a", "\ufffd\ufffd", "🙂", "bb"]


THINK, UNTHINK, CALL, ARGS = range(len(PIECES), len(PIECES) + 4)
JSON = [b"{", b"}", b'"a"', b":", b"[1, ", b"1"]
MARKED = [*PIECES, *[b""] * 4, *JSON]
SYNTAX = Syntax(
    tokens={THINK: "think", UNTHINK: "/think", CALL: "call", ARGS: "args"},
    call_marker="[TOOL_CALLS]",
    named_calls=True,
)


class Pieces:
    """A tokenizer of a dozen tokens, whole characters and parts of some; and of markers, and what JSON takes."""

    def __init__(self, strip_leading_space=False):
        self.strip_leading_space = strip_leading_space

    def token_bytes(self, token_id):
        return MARKED[token_id]


def finish(reason="length"):
    return Finish(reason, "", None, 1, 1, 0, 0, 0.0, 0.0, 0.0)


def logprobs(token_ids):
    return [TokenLogprobs(t, -0.1 * t, list(range(t % 3)), [-1.0 / 3] * (t % 3)) for t in token_ids]


def as_sent(entries):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(entries), type=list[TokenLogprobs])


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=60)
stops = st.lists(st.sampled_from(STOPS), max_size=2, unique=True).map(tuple)


def test_a_detokenizer_that_caught_up_knows_the_beginning_of_a_stop_string():
    token_ids = [0, 1, 0, 4, 1, 0]  # "aba ba", and "ba b" stops
    fresh = Detokenizer(Pieces(), ("ba b",))
    fresh.catch_up(token_ids, 4)
    assert (fresh.push(token_ids[4:]), fresh.stop) == ("", "ba b")


@given(tokens, stops, st.integers(0, 5), st.booleans(), st.data())
def test_a_detokenizer_catches_up_with_one_that_saw_all(token_ids, stop, min_tokens, strips, data):
    seen = Detokenizer(Pieces(strips), stop, min_tokens)
    offset = data.draw(st.integers(0, len(token_ids)))
    seen.push(token_ids[:offset])
    if seen.stop is not None:
        return
    fork, fresh = seen.fork(), Detokenizer(Pieces(strips), stop, min_tokens)
    fresh.catch_up(token_ids, offset)
    ends = []
    for detokenizer in (seen, fork, fresh):
        text = detokenizer.push(token_ids[offset:])
        ends.append((text + detokenizer.flush(), detokenizer.stop, detokenizer.num_tokens))
    assert ends[0] == ends[1] == ends[2]


def test_catching_up_looks_at_the_end_alone():
    asked = []

    class Counting(Pieces):
        def token_bytes(self, token_id):
            asked.append(token_id)
            return b"x"

    Detokenizer(Counting(), ("stop",)).catch_up([0] * 100_000, 100_000)
    assert len(asked) < 100


class Reader:
    """A client's copy of an answer, which may go back to any token that it has."""

    def __init__(self, stop):
        self.stop = stop
        self.token_ids, self.text, self.tail, self.logprobs = [], "", "", []

    def take(self, part):
        """Add a delta; text without tokens stands apart."""
        if part is None:
            return
        token_ids, text, entries, _ = part
        self.token_ids += token_ids
        self.logprobs += as_sent(entries or [])
        if token_ids:
            self.text += text
        else:
            self.tail += text

    def go_back(self, offset, sample):
        """Forget all from token `offset` on, and resume there."""
        del self.token_ids[offset:], self.logprobs[offset:]
        detokenizer = Detokenizer(Pieces(), self.stop)
        self.text, self.tail = detokenizer.push(self.token_ids), ""
        if sample.finish is not None and offset == len(sample.token_ids) and not sample.tail_apart:
            self.text += detokenizer.flush()
        sample.seek(offset, Detokenizer(Pieces(), self.stop))


@settings(max_examples=300, deadline=None)
@example([0, 0], ("ab",), False, False, 2)  # an empty delta, while the reader has everything
@example([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], ("ab",), False, True, 15998)  # read again behind the end
def live(sample, reader, token_ids, draw, end, *, keeps, logprobs_of=None):
    """Have a sample get its tokens and its end, and its reader read, in pieces and an order that `draw` decides."""
    rest, ends_apart = list(token_ids), draw.random() < 0.5
    while sample.finish is None or sample.unsent:
        if keeps and draw.random() < 0.1:
            reader.go_back(draw.randint(0, len(reader.token_ids)), sample)
        if sample.finish is not None or draw.random() < 0.3:
            reader.take(sample.read(draw.randint(1, 9)))
            continue
        count = draw.randint(0, 4)
        new, rest = rest[:count], rest[count:]
        is_last = not rest and not (ends_apart and new)
        delta = TokenDelta(0, 0, new, logprobs_of and logprobs_of(new), end if is_last else None)
        if not sample.cut:
            if sample.unsent or draw.random() < 0.5:
                sample.append(delta)
            else:
                reader.take(sample.take(delta))
        if is_last:
            sample.end(delta.finish)


@given(tokens, stops, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_a_reader_gets_the_reference_in_any_pieces(token_ids, stop, asks_logprobs, keeps, seed):
    """Deltas of any length, taken or only logged, read in any pieces, and now and then resumed from any token."""
    reference, draw = Detokenizer(Pieces(), stop), random.Random(seed)
    text = reference.push(token_ids) + reference.flush()
    whole = token_ids[: reference.num_tokens]
    sample, reader = Sample(0, Detokenizer(Pieces(), stop), keeps=keeps), Reader(stop)
    live(sample, reader, token_ids, draw, finish(), keeps=keeps, logprobs_of=logprobs if asks_logprobs else None)
    assert (reader.token_ids, reader.text + reader.tail, sample.stop) == (whole, text, reference.stop)
    assert reader.logprobs == (logprobs(whole) if asks_logprobs else [])


@given(tokens, stops, st.integers(0, 3))
def test_an_answer_without_deltas_is_the_reference(token_ids, stop, num_brought):
    brought, rest = token_ids[:num_brought], token_ids[num_brought:]
    reference = Detokenizer(Pieces(), stop)
    reference.push(brought)
    if reference.stop is not None:
        return
    live = reference.fork()
    text = reference.push(rest) + reference.flush()
    sample = Sample(0, live, brought, whole=True)
    for token_id in rest:
        if not sample.cut:
            sample.append(TokenDelta(0, 0, [token_id], logprobs([token_id]), None))
    if not sample.cut:
        sample.append(TokenDelta(0, 0, [], None, finish()))
    sample.end(finish())
    assert sample.read_whole(Detokenizer(Pieces(), stop)) == (text, [])
    assert sample.token_ids.tolist() == token_ids[: reference.num_tokens]
    if rest:
        assert as_sent(sample.all_logprobs()) == logprobs(sample.token_ids[num_brought:])


# --- answers in parts -----------------------------------------------------------------------------------------

marked = st.lists(
    st.one_of(
        st.integers(0, len(MARKED) - 1).map(lambda token_id: [token_id]),
        st.sampled_from([[CALL, 0, ARGS, len(PIECES) + 4, len(PIECES) + 5], [THINK, 0, 6], [UNTHINK]]),
    ),
    max_size=25,
).map(lambda runs: [token_id for run in runs for token_id in run])


def parts_reader(stop=(), parallel=True):
    return PartsReader(Pieces(), SYNTAX, stop, parallel=parallel, call_id=lambda number: f"call{number:05}")


class PartsCopy(Reader):
    """A client's copy of an answer in parts."""

    def __init__(self, stop, parallel):
        super().__init__(stop)
        self.parallel, self.pieces, self.rest = parallel, [], []

    def take(self, part):
        if part is None:
            return
        token_ids, text, _, parts = part
        assert text == "".join(piece.text for piece in parts if piece.kind == "text") or not parts
        self.token_ids += token_ids
        (self.pieces if token_ids else self.rest).append((parts, text, len(token_ids)))

    def go_back(self, offset, sample):
        del self.token_ids[offset:]
        reader = parts_reader(self.stop, self.parallel)
        text, parts, self.rest = reader.push(self.token_ids), reader.parts, []
        if (sample.finish or sample.cut) and offset == len(sample.token_ids) and not sample.tail_apart:
            held = reader.flush()
            text, parts = text + held, in_order(parts, text, offset, reader.parts, held)
        self.pieces = [(parts, text, offset)]
        sample.seek(offset, parts_reader(self.stop, self.parallel))

    @property
    def answer(self):
        return joined_of(self.pieces + self.rest)


def joined_of(pieces):
    """The parts of pieces, but for text that is none."""
    answer = Answer()
    for parts, text, num_tokens in pieces:
        answer.take(parts, text, num_tokens)
    return [part for part in answer.parts if part.text or part.num_tokens or part.name]


@settings(max_examples=400, deadline=None)
@given(marked, stops, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_a_reader_gets_the_parts_of_the_reference_in_any_pieces(token_ids, stop, parallel, keeps, seed):
    reference, draw = parts_reader(stop, parallel), random.Random(seed)
    text, parts = reference.push(token_ids), reference.parts
    held = reference.flush()
    in_all = in_order(parts, text, reference.num_tokens, reference.parts, held)
    right = joined_of([(in_all, text + held, reference.num_tokens)])
    whole = token_ids[: reference.num_tokens]
    sample, reader = Sample(0, parts_reader(stop, parallel), keeps=keeps), PartsCopy(stop, parallel)
    live(sample, reader, token_ids, draw, finish("stop"), keeps=keeps)
    assert (reader.token_ids, sample.stop) == (whole, reference.stop)
    assert reader.answer == right
    assert sum(part.num_tokens for part in right) == len(whole)
    has_whole_call = reference.num_calls > len(reference.broken_calls)
    assert sample.outcome(sample.finish) == ("tool_calls" if has_whole_call else "stop", reference.broken_calls)
    assert joined_of([(*sample.read_whole(parts_reader(stop, parallel))[::-1], len(whole))]) == right


def test_what_a_second_call_lets_out_comes_again_after_a_resume_before_the_core_knows():
    """The marker that ends the answer is no token of it, so nothing counts what came with it."""
    sample = Sample(0, parts_reader(parallel=False), keeps=True)
    tokens = [CALL, 0, 1]  # a call without arguments
    sample.take(TokenDelta(0, 0, tokens, None, None))
    *rest, parts = sample.take(TokenDelta(0, 0, [CALL], None, None))
    assert (rest, sample.cut, sample.stop) == ([[], "", None], True, "[TOOL_CALLS]")
    assert [part.kind for part in parts] == ["call"]
    assert not sample.unsent
    sample.seek(len(tokens), parts_reader(parallel=False))
    assert sample.unsent
    assert sample.read(10) == ([], "", None, parts)
    assert not sample.unsent


@given(marked, st.integers(0, 8), st.booleans())
@example([CALL], 1, False)  # a token that was brought, and counts for nothing before the end
def test_an_answer_in_parts_without_deltas_begins_behind_what_was_brought(token_ids, num_brought, parallel):
    brought, rest = token_ids[:num_brought], token_ids[num_brought:]
    live = parts_reader(parallel=parallel)
    live.push(brought)
    if live.stop is not None:
        return
    reference = live.fork()
    text, parts = reference.push(rest), reference.parts
    held = reference.flush()
    whole = rest[: reference.num_tokens - len(brought)]
    right = joined_of([(in_order(parts, text, len(whole), reference.parts, held), text + held, len(whole))])
    sample = Sample(0, live, brought, whole=True, states=[live.state()] if brought else [])
    for token_id in rest:
        if not sample.cut:
            sample.append(TokenDelta(0, 0, [token_id], None, None))
    if not sample.cut:
        sample.append(TokenDelta(0, 0, [], None, finish()))
    sample.end(finish())
    text_again, parts_again = sample.read_whole(parts_reader(parallel=parallel))
    assert (text_again, sample.token_ids.tolist()) == (text + held, brought + whole)
    if all(part.kind == "text" for part in right):
        assert parts_again == []
    else:
        assert joined_of([(parts_again, text_again, len(whole))]) == right


def test_where_a_reader_of_parts_stood_is_kept_within_what_a_token_may_take():
    """Also while a call's head is as long as a reader keeps; then states may be further apart."""
    for tokens in ([THINK] + [0] * 20_000, [CALL] + [0] * 20_000, [CALL, ARGS] + [len(PIECES) + 8] * 20_000):
        sample = Sample(0, parts_reader(), whole=True)
        for start in range(0, len(tokens), 32):
            sample.append(TokenDelta(0, 0, tokens[start : start + 32], None, None))
            sample.remember()
        assert sample.num_bytes <= len(tokens) * most_token_bytes(None)
        assert sample.num_bytes > 4 * len(tokens)
        offsets = [offset for offset, _ in sample._states]
        assert all(before + STATE_TOKENS <= offset for before, offset in pairwise(offsets))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_a_log_of_logprobs_gives_back_what_it_has_not_forgotten(token_ids, data):
    log, entries, first = LogprobLog(7), logprobs(token_ids), 7
    assert as_sent(msgspec.Raw(log.add(entries))) == entries
    for _ in range(3):
        first = max(first, data.draw(st.integers(0, 7 + len(entries))))
        log.forget(first)
        start = data.draw(st.integers(first, 7 + len(entries)))
        end = data.draw(st.integers(start, 7 + len(entries)))
        assert log.read(start, end) == entries[start - 7 : end - 7]
    log.add(entries)
    assert log.read(first, 7 + 2 * len(entries)) == (entries * 2)[first - 7 :]
    assert log.num_bytes < 80 * 2 * len(entries)
    token, room = data.draw(st.integers(first, 7 + 2 * len(entries))), data.draw(st.integers(0, 300))
    sizes = [len(msgspec.msgpack.encode(entry)) for entry in (entries * 2)[first - 7 : token - 7]]
    fitting = [count for count in range(len(sizes) + 1) if sum(sizes[len(sizes) - count :]) <= room]
    assert log.before(token, room) == token - fitting[-1]


def test_log_probabilities_take_no_more_than_the_bound_says():
    entry = TokenLogprobs(2**31 - 1, -1.0 / 3, [2**31 - 1] * 20, [-1.0 / 3] * 20)
    log = LogprobLog(0)
    log.add([entry] * 10)
    assert log.num_bytes <= 10 * (most_token_bytes(20) - most_token_bytes(None))


def test_an_answer_without_deltas_must_fit():
    submit = Submit(request_id=1, prompt_token_ids=[1], sampling=SamplingParams(n=16, max_tokens=1000, logprobs=20))
    needed = 16 * 1000 * most_token_bytes(20)
    require_bounded(submit, 1, needed)
    with pytest.raises(InvalidRequest, match="max_answer_bytes") as caught:
        require_bounded(submit, 1, needed - 1)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("sampling.max_tokens", "999", "1000")
