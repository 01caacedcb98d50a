"""Prompts that come in several frames: attached bytes are charged, consumed by their `generate`, and never stay."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest

from cierzo.engine.frontend import attachments, frame_reader
from cierzo.engine.frontend.attachments import ENTRY_BYTES, JOIN_BYTES
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import (
    Attach,
    Cancel,
    ChatMessage,
    Failure,
    Final,
    Generate,
    Hello,
    SamplingParams,
    Welcome,
)

encode = msgspec.msgpack.encode
WANTS = Hello(features=["attach"])
ONE = SamplingParams(max_tokens=1)


@pytest.fixture
def attaching(serving, peering):
    """A front end and a connection with the feature."""

    @asynccontextmanager
    async def start(cores=None, **limits):
        async with serving(cores=cores, **limits) as house, peering(house, WANTS) as peer:
            yield house, peer
        assert house.frontend.budget.num_bytes == 0

    return start


CASES = {
    "text": ("hello", [256, *b"hello"]),
    "messages": ([ChatMessage(role="user", content="hi")], [256, *b"[user]hi[assistant]"]),
    "token_ids": ([5, 6, 7], [5, 6, 7]),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_the_pieces_stand_for_the_field(run, attaching, cores, kind, piece):
    value, prompt = CASES[kind]

    async def body():
        async with attaching(cores) as (_, peer):
            data = encode(value)
            for start in range(0, len(data), piece):
                peer.say(Attach(stream=3, data=data[start : start + piece]))
            peer.say(Generate(stream=3, attached=kind, sampling=ONE))
            final = await peer.hear_until(Final)
            assert (final.stream, final.usage.prompt_tokens) == (3, len(prompt))
            assert cores.now.submits[-1].prompt_token_ids == prompt

    run(body())


def test_large_pieces_stay_in_the_frames_that_brought_them(run, attaching, cores):
    async def body():
        async with attaching(cores) as (house, peer):
            data = encode([ChatMessage(role="assistant", reasoning="r" * 500)] * 300)
            pieces = [data[:70_000], data[70_000:70_100], data[70_100:]]
            for piece in pieces:
                peer.say(Attach(stream=3, data=piece))
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == len(data) + ENTRY_BYTES
            peer.say(Generate(stream=3, attached="messages", sampling=ONE))
            assert isinstance(await peer.hear_until(Final), Final)
            assert bytes(cores.now.submits[-1].prompt_token_ids[1:]) == b"[assistant]" * 301
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_data_that_is_named_twice_would_keep_more_than_is_charged(run, attaching):
    async def body():
        async with attaching() as (house, peer):
            head = encode("type") + encode("attach") + encode("stream") + encode(4)
            twice = b"\x84" + head + 2 * (encode("data") + encode(bytes(JOIN_BYTES)))
            peer.frame(twice)
            assert (await peer.hear()).limit == "once"
            assert house.frontend.budget.num_bytes == 0
            peer.say(Cancel(stream=4))
            assert await peer.hear_so_far() == []

    run(body())


REFUSED = {
    "too many bytes": ({"max_attached_bytes": 10}, [b"123456", b"123456"], "max_attached_bytes"),
    "no room": ({"max_unencoded_bytes": ENTRY_BYTES + 10}, [b"123456", b"123456"], "max_unencoded_bytes"),
    "no room for the first": ({"max_unencoded_bytes": ENTRY_BYTES - 1}, [b"1"], "max_unencoded_bytes"),
    "too many streams": ({"max_streams_per_connection": 1}, [b"1"], "max_streams_per_connection"),
    "an open stream": ({}, [b"1"], "stream"),
}


@pytest.mark.parametrize(
    ("case", "is_large"), [*((case, False) for case in REFUSED), ("too many bytes", True), ("an open stream", True)]
)
def test_after_a_refusal_the_rest_of_the_prompt_is_passed_over(run, attaching, cores, monkeypatch, case, is_large):
    limits, pieces, field = REFUSED[case]
    cores.free = case != "an open stream"
    monkeypatch.setattr(frame_reader, "SMALL_FRAME_BYTES", 4000)

    async def body():
        async with attaching(cores, **limits) as (house, peer):
            if case == "too many streams":
                peer.say(Attach(stream=1, data=b"1"))
            if case == "an open stream":
                peer.say(Generate(stream=3, token_ids=[1]))
                await cores.until(lambda: cores.now.submits)
            for piece in pieces:
                peer.say(Attach(stream=3, data=piece))
            failure = await peer.hear()
            assert (failure.stream, failure.field) == (3, field)
            if case == "too many streams":
                peer.say(Cancel(stream=1))  # there is room again
            cores.free = True
            peer.say(Attach(stream=3, data=encode("a whole text")))
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == 0
            num_submits = len(cores.now.submits)
            stop_ids = tuple(range(1, 2000 if is_large else 2))
            peer.say(Generate(stream=3, attached="text", sampling=SamplingParams(stop_token_ids=stop_ids)))
            assert await peer.hear_so_far() == []  # there was no second answer
            while len(house.frontend.streams):
                assert await peer.hear_so_far() == []
            assert await peer.hear_so_far() == []
            assert len(cores.now.submits) == num_submits
            assert house.frontend.budget.num_bytes == 0
            if case != "no room for the first":
                peer.say(Generate(stream=3, token_ids=[1], sampling=ONE))
                assert (await peer.hear_until(Final)).stream == 3

    run(body())


def test_after_a_refusal_the_id_may_be_used_for_another_prompt(run, attaching):
    async def body():
        async with attaching(max_attached_bytes=3) as (_, peer):
            peer.say(Attach(stream=3, data=b"1234"))
            assert isinstance(await peer.hear(), Failure)
            peer.say(Generate(stream=3, text="x", sampling=ONE))
            assert (await peer.hear_until(Final)).stream == 3

    run(body())


WRONG = {
    "attached is not said": (b"\xa1x", Generate(stream=3, text="x"), "attached"),
    "two prompts": (b"\xa1x", Generate(stream=3, text="x", attached="text"), "attached"),
    "nothing is attached": (None, Generate(stream=3, attached="text"), "attached"),
    "no such field": (b"\xa1x", Generate(stream=3, attached="priority"), "attached"),
    "cannot fit": (encode("x" * 50_000), Generate(stream=3, attached="text"), "text"),
    "too many ids": (encode([1] * 37_000), Generate(stream=3, attached="token_ids"), "token_ids"),
    "another type": (b"\x01", Generate(stream=3, attached="text"), "text"),
    "more than a value": (b"\xa1xx", Generate(stream=3, attached="text"), "text"),
    "a wrong parameter": (
        b"\xa1x",
        Generate(stream=3, attached="text", sampling=SamplingParams(top_k=-1)),
        "sampling.top_k",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_generate_that_is_refused_frees_what_is_attached(run, attaching, case):
    data, generate, field = WRONG[case]

    async def body():
        async with attaching() as (house, peer):
            if data is not None:
                peer.say(Attach(stream=3, data=data))
            peer.say(generate)
            failure = await peer.hear()
            assert (failure.stream, failure.code, failure.field) == (3, "invalid_request", field)
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == 0
            assert house.frontend.counters.refused == 1

    run(body())


def test_attached_text_that_cannot_fit_is_never_encoded(run, attaching, prompts, monkeypatch):
    monkeypatch.setattr(type(prompts), "encode", lambda *_: pytest.fail("encoded"))

    async def body():
        async with attaching() as (_, peer):
            peer.say(Attach(stream=3, data=encode("x" * 50_000)))
            peer.say(Generate(stream=3, attached="text"))
            assert "cannot fit" in (await peer.hear()).message

    run(body())


@pytest.mark.parametrize("end", ["cancel", "disconnect", "another message"])
def test_attached_bytes_go_with_their_stream(run, attaching, end):
    async def body():
        async with attaching() as (house, peer):
            peer.say(Attach(stream=3, data=b"x" * 1000))
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == 1000 + ENTRY_BYTES
            if end == "cancel":
                peer.say(Cancel(stream=3))
            elif end == "another message":
                peer.say({"type": "fly", "stream": 3})
                assert isinstance(await peer.hear(), Failure)
            else:
                return
            assert await peer.hear_so_far() == []
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_attached_bytes_are_forgotten_after_a_while(run, attaching, monkeypatch):
    monkeypatch.setattr(attachments, "ATTACHED_S", 0.01)

    async def body():
        async with attaching() as (house, peer):
            peer.say(Attach(stream=3, data=b"x"))
            failure = await peer.hear()
            assert (failure.stream, failure.field) == (3, "attached")
            assert house.frontend.budget.num_bytes == 0
            peer.say(Attach(stream=3, data=encode("the rest")))
            peer.say(Generate(stream=3, attached="text"))
            assert await peer.hear_so_far() == []

    run(body())


def test_a_connection_that_has_too_many_prompts_refused_in_part_ends(run, attaching, monkeypatch):
    """Which prompts they were is remembered; so there is a bound."""
    monkeypatch.setattr(attachments, "MAX_REFUSED", 3)

    async def body():
        async with attaching(max_attached_bytes=3) as (_, peer):
            for stream in range(1, 5):
                peer.say(Attach(stream=stream, data=b"1234"))
                assert (await peer.hear()).field == "max_attached_bytes"
                if stream == 3:
                    peer.say(Generate(stream=1, attached="text"))  # it is remembered no longer
            peer.say(Attach(stream=5, data=b"1234"))
            assert (await peer.hear()).field == "max_attached_bytes"
            failure = await peer.hear()
            assert (failure.stream, failure.code, failure.field) == (-1, "overloaded", "attached")

    run(body())


def test_bytes_are_attached_before_the_stream_is_open(run, attaching, cores):
    cores.free = False

    async def body():
        async with attaching(cores) as (_, peer):
            peer.say(Generate(stream=3, token_ids=[1]))
            await cores.until(lambda: cores.now.submits)
            peer.say(Attach(stream=3, data=b"x"))
            failure = await peer.hear()
            assert (failure.stream, failure.field) == (3, "stream")
            await cores.until(lambda: cores.now.aborts)
            assert await peer.hear_so_far() == []

    run(body())


def test_who_did_not_ask_for_it_may_not_attach(run, serving, peering):
    async def body():
        async with serving() as house, peering(house) as peer:
            for message in (Attach(stream=1, data=b"x"), Generate(stream=1, attached="text")):
                peer.say(message)
                assert "attach" in (await peer.hear()).message
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_the_welcome_tells_how_much_may_be_attached(run, serving, peering):
    async def body():
        async with serving() as house, peering(house, None) as peer:
            peer.say(WANTS)
            welcome = await peer.hear()
            assert isinstance(welcome, Welcome)
            assert welcome.features == ["attach"]
            assert welcome.limits.max_attached_bytes == FrontendConfig().max_attached_bytes

    run(body())


LONG_LAST = {"deadline_s": 0.05, "sampling": {"max_tokens": 1}, "token_ids": [299] * 4000}
DEADLINES = {
    "before the list": LONG_LAST,
    "behind a text": {"text": "x" * 5000, "deadline_s": 0.05},
    "behind a list": dict(reversed(LONG_LAST.items())),
}


@pytest.mark.parametrize("case", DEADLINES)
def test_the_deadline_of_a_large_generate_holds_before_it_is_encoded(run, serving, peering, monkeypatch, case):
    monkeypatch.setattr(frame_reader, "SMALL_FRAME_BYTES", 4000)

    async def body():
        async with serving() as house, peering(house) as peer:
            house.frontend._arrivals._encoders.delay_s = lambda: 1e6
            peer.say({"type": "generate", "stream": 1, **DEADLINES[case]})
            final = await peer.hear()
            assert final.samples[0].finish_reason == "deadline"
            for odd in ("soon", -1, float("nan"), [1], None, 1e9):  # is refused once it is read
                peer.say({"type": "generate", "stream": 2, **DEADLINES[case], "deadline_s": odd})
                while not len(house.frontend.streams):
                    assert await peer.hear_so_far() == []
                (stream,) = house.frontend.streams
                assert stream.deadline_at_s - stream.arrived == pytest.approx(FrontendConfig().default_deadline_s)
                peer.say(Cancel(stream=2))
                await peer.hear()

    run(body())


def test_a_large_generate_says_late_what_it_is(run, serving, peering, cores, monkeypatch):
    """Samples, deltas and deadline of a long message are known once a process has read it."""
    cores.free = False
    monkeypatch.setattr(frame_reader, "SMALL_FRAME_BYTES", 4000)

    async def body():
        async with serving(cores=cores, max_open_samples=3) as house, peering(house) as peer:
            ids = [299] * 4000
            long = {"type": "generate", "stream": 1, "token_ids": ids, "deltas": False, "deadline_s": 50.0}
            padding = {"frequency_penalty": 0.5, "stop_token_ids": list(range(1, 60))}
            peer.say({**long, "sampling": {"n": 2, "max_tokens": 1, **padding}})
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            assert (stream.num_samples, stream.deltas, stream.num_tokens) == (2, False, 4000)
            assert house.frontend.streams.num_samples == 2
            assert stream.deadline_at_s == stream.arrived + 50
            peer.say({**long, "stream": 2, "sampling": {"n": 2, "max_tokens": 1}})
            failure = await peer.hear()
            assert (failure.stream, failure.field, failure.value) == (2, "max_open_samples", "4")
            assert house.frontend.streams.num_samples == 2

    run(body())
