"""Pieces of answers: words for tokens, errors and their headers, names of hosts."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from cierzo.engine.errors import (
    ConnectionLost,
    CoreFailed,
    CoreStalled,
    DeadlineUnreachable,
    Draining,
    Interrupted,
    InvalidRequest,
    Overloaded,
    Unauthorized,
)
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.gateway.answers import (
    ChatEvents,
    CompletionEvents,
    Legacy,
    Told,
    chat_choice,
    completion_choice,
    head,
)
from cierzo.engine.gateway.errors import body_of, headers_of
from cierzo.engine.gateway.guard import allowed_hosts, hostname
from cierzo.engine.gateway.token_words import LOWEST, TokenWords, chat_entry, legacy_top
from cierzo.engine.messages import Final, SampleEnd, Timings, TokenLogprobs, Usage

BYTES = {1: b"a", 2: b"a", 3: b"\xe2\x82", 4: b"", 5: b"b", 6: b"a", 7: "é".encode()}


class Spelling:
    """The part of a backend that knows bytes, and what it was asked."""

    def __init__(self):
        self.asked = []

    async def token_bytes(self, token_ids):
        self.asked += sorted(token_ids)
        return [BYTES[token_id] for token_id in token_ids]


@pytest.fixture
def words():
    words = TokenWords()
    asyncio.run(words.learn(Spelling(), BYTES))
    return words


def test_words_are_asked_for_once():
    words, spelling = TokenWords(), Spelling()
    for _ in range(2):
        asyncio.run(words.learn(spelling, [1, 2, 1]))
    assert spelling.asked == [1, 2]


def test_tokens_in_words(words):
    assert [words.text(token_id) for token_id in BYTES] == [
        "a",
        "a",
        "bytes:\\xe2\\x82",
        "token_id:4",
        "b",
        "a",
        "é",
    ]


def test_texts_that_collide_stay_apart(words):
    entry = TokenLogprobs(2, -2.0, [1, 2, 6, 5], [-1.0, -2.0, -3.0, -4.0])
    assert legacy_top(words, entry) == {"a": -2.0, "token_id:1": -1.0, "token_id:6": -3.0, "b": -4.0}
    told = json.loads(chat_entry(words, entry))
    assert [top["logprob"] for top in told["top_logprobs"]] == [-1.0, -2.0, -3.0, -4.0]


def test_a_chosen_token_is_among_the_likeliest_also_where_it_is_not_one(words):
    assert legacy_top(words, TokenLogprobs(5, -9.0, [1], [-1.0])) == {"b": -9.0, "a": -1.0}
    assert json.loads(chat_entry(words, TokenLogprobs(5, -9.0, [], [])))["top_logprobs"] == []


def test_numbers_are_told_to_the_last_bit(words):
    number = -0.1 - 2.0**-40
    told = json.loads(chat_entry(words, TokenLogprobs(1, number, [1], [number])))
    assert told["logprob"] == told["top_logprobs"][0]["logprob"] == number
    assert json.loads(chat_entry(words, TokenLogprobs(1, -math.inf, [], [])))["logprob"] == LOWEST


def test_offsets_are_counted_in_characters(words):
    legacy = Legacy(words, 10)
    legacy.add([TokenLogprobs(token_id, -1.0, [], []) for token_id in (7, 1, 5)])
    told = json.loads(legacy.encoded())
    assert told["text_offset"] == [10, 11, 12]
    assert told["tokens"] == ["é", "a", "b"]


def test_a_first_token_that_the_text_lacks_takes_no_room(words):
    legacy = Legacy(words)
    legacy.begin(5, "aa")
    legacy.add([TokenLogprobs(1, -1.0, [], [])])
    told = json.loads(legacy.encoded())
    assert told["token_logprobs"] == [None, -1.0]
    assert told["text_offset"] == [0, 0]


@pytest.mark.parametrize(
    ("error", "retry", "after"),
    [
        (Overloaded("x", retry_after_s=0.25), b"true", b"250"),
        (Draining("x", retry_after_s=2.0), b"true", b"2000"),
        (Overloaded("x"), b"true", b"1000"),
        (DeadlineUnreachable("x"), b"false", None),
        (CoreFailed("x"), b"true", None),
        (CoreStalled("x"), b"true", b"1000"),
        (ConnectionLost("x"), b"true", b"1000"),
        (InvalidRequest("x"), b"false", None),
        (Unauthorized("x"), b"false", None),
    ],
)
def test_when_to_try_again(error, retry, after):
    headers = dict(headers_of(error))
    assert headers[b"x-should-retry"] == retry
    assert headers.get(b"retry-after-ms") == after
    assert (b"retry-after" in headers) == (after is not None)


def test_an_answer_that_may_have_run_is_not_asked_for_again_by_itself():
    error = ConnectionLost("x")
    error.may_have_run = True
    assert dict(headers_of(error))[b"x-should-retry"] == b"false"


def test_an_answer_that_is_interrupted_is_told_without_what_only_the_rpc_can_go_on_from():
    error = Interrupted("it goes on elsewhere, with this seed", field="seed", value=17)
    told = body_of(error)["error"]
    assert told == {
        "message": "the server stopped before the answer was complete",
        "type": "server_error",
        "param": None,
        "code": "interrupted",
    }


@pytest.mark.parametrize("incomplete", [True, False])
def test_an_answer_that_was_cut_within_its_form_says_so(words, incomplete):
    end = SampleEnd(sample=0, finish_reason="length", output_tokens=3, incomplete=incomplete)
    told = Told(head=head("chat.completion.chunk", "chatcmpl", "x", "m"), words=words)
    final = Final(
        stream=0, samples=[end], usage=Usage(prompt_tokens=1, output_tokens=3, cached_tokens=0),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0, total_s=0.0), seed=0,
    )  # fmt: skip
    choices = [
        json.loads(b"".join(chat_choice(0, Answer(), end, "reasoning_content", bytearray()))),
        json.loads(b"".join(completion_choice(0, "", end, []))),
        *(
            json.loads(kind(told).end(final).removeprefix(b"data: "))["choices"][0]
            for kind in (ChatEvents, CompletionEvents)
        ),
    ]
    for choice in choices:
        assert choice["finish_reason"] == "length"
        assert choice.get("incomplete") is (True if incomplete else None)


def test_an_error_in_openais_shape():
    told = body_of(InvalidRequest("wrong", field="n", limit=16, value=17))["error"]
    assert told == {
        "message": "wrong",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_request",
        "limit": "16",
        "value": "17",
    }


@pytest.mark.parametrize(
    ("host", "name"),
    [("A.b:80", "a.b"), ("a.b", "a.b"), ("[::1]:8", "::1"), ("[::1]", "::1"), ("::1", "::1"), ("", "")],
)
def test_names_of_hosts(host, name):
    assert hostname(host) == name


def test_hosts_that_are_allowed():
    assert {"localhost", "127.0.0.1", "::1"} <= {*allowed_hosts("127.0.0.1", ())}
    assert "x.example" in allowed_hosts("0.0.0.0", ("x.example",))
    assert not allowed_hosts("0.0.0.0", ())  # others reach it by whatever name
