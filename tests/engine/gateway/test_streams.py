"""Streams: their ends, good and bad; readers that go away, and readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import time

import httpx2
import openai
import pytest
from http_house import CHAT, MESSAGES, events_of, heard, post_of, until

from cierzo.engine.errors import CoreFailed
from cierzo.engine.frontend.encoders import Late
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.gateway.call import Call
from cierzo.engine.gateway.joining import Joining
from cierzo.testing import FakeAnswer, ManualClock

CHATS = "/v1/chat/completions"
LONG = [{"role": "user", "content": "y" * 3000}]  # more than is encoded on the loop


def _asked(house, body):
    """A connection on which a request was sent."""
    sock = house.connect()
    sock.sendall(post_of(body))
    return sock


@contextlib.contextmanager
def _streaming(house, **more):
    """The connection of a stream whose first token has come."""
    with _asked(house, CHAT | {"stream": True} | more) as sock:
        heard(sock, b'"x"')
        yield sock


def _calls():
    """Calls that are in memory."""
    return [each for each in gc.get_objects() if isinstance(each, Call)]


def _num_running(house):
    return len(house.core.running)


def test_done_comes_after_a_good_end_alone(either):
    house = either("Hello")
    answer = house.post(CHATS, CHAT | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])


def test_a_deadline_ends_a_stream_with_an_error(either):
    house = either("x" * 100, token_s=0.02)
    events = events_of(house.post(CHATS, CHAT | {"stream": True, "deadline_s": 0.2}).text)
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["param"]) == ("deadline", "deadline_s")
    assert json.loads(events[1])["choices"][0]["delta"]["content"] == "x"
    whole = house.post(CHATS, CHAT | {"deadline_s": 0.2})
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline")
    assert whole.headers["x-should-retry"] == "false"


def test_a_failure_ends_a_stream_with_an_error_that_the_client_raises(either):
    house = either("x" * 100, token_s=60.0)
    with house.openai() as client:
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        assert next(stream).choices[0].delta.content == "x"
        house.health = "failed"
        with pytest.raises(openai.APIError) as failed:
            for _ in stream:
                pass
    assert failed.value.code == "core_failed"


def test_an_end_of_the_server_ends_streams_with_an_error(opening):
    house = opening("x" * 100, token_s=60.0)
    with _streaming(house) as sock:
        house._do(house.frontend.interrupt)
        rest = heard(sock, b"0\r\n\r\n")
    assert b'"code":"interrupted"' in rest
    assert b"[DONE]" not in rest


def test_an_end_of_the_door_tells_whoever_still_waits(either, caplog):
    """A gateway that ends cannot have the server tell it."""
    house = either("x" * 100, token_s=60.0)
    with _streaming(house) as stream, _asked(house, CHAT) as whole:
        until(lambda: _num_running(house) == 2)
        house._ask(lambda: house.door.close(0.0))
        rest, told = heard(stream, b"0\r\n\r\n"), heard(whole, b"}}")
    assert b'"code":"interrupted"' in rest
    assert b"[DONE]" not in rest
    assert b" 503 " in told
    assert b"x-should-retry: false" in told
    assert b"the server stopped before the answer was complete" in told
    assert not caplog.records


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_goes_away_cancels_at_once(either, stream):
    clock = ManualClock()
    house = either("x" * 100, token_s=1.0, clock=clock)
    sock = _asked(house, CHAT | {"stream": stream, "max_tokens": 100})
    if stream:
        heard(sock, b'"x"')
    until(lambda: _num_running(house) == 1)
    sock.close()
    until(lambda: _num_running(house) == 0)  # and the clock stands still
    assert house.frontend.counters.finished == 1
    until(lambda: not house.door.state.tasks)


class HeldEncoder:
    """An encoder that has no time: a long prompt waits in it for ever, or until it is late."""

    def __init__(self, encoder, late_s=None):
        self.budget = encoder.budget
        self.waiting = []
        self._late_s = late_s

    def submit(self, job, body, attached, deadline_at_s, tenant="", images=()):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append(answer)
        if self._late_s is not None:
            asyncio.get_running_loop().call_later(self._late_s, answer.set_exception, Late())
        return answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_goes_away_before_its_prompt_is_encoded(either, stream):
    house = either("x")
    held = house.frontend._arrivals._encoders = HeldEncoder(house.frontend._arrivals._encoders)
    with _asked(house, CHAT | {"messages": LONG, "stream": stream}):
        (prompt,) = until(lambda: held.waiting)
    until(prompt.cancelled)
    until(lambda: not house.door.state.tasks)
    assert not house.core.submits


def test_a_stream_that_cannot_begin_is_refused_by_its_status(either):
    house = either("x", health="loading")
    refused = house.post(CHATS, CHAT | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")


def test_comments_keep_a_silent_stream_alive(opening):
    house = opening("x", first_token_s=60.0, http={"comment_s": 0.05})
    with _asked(house, CHAT | {"stream": True}) as sock:
        assert heard(sock, b": \n\n").count(b"data: ") == 1
    silent = opening("x", first_token_s=0.3)
    assert ": \n\n" not in silent.post(CHATS, CHAT | {"stream": True}).text


def _unread(opening, slow_reader_s):
    """A house with a long answer, of which little has room on the way to its reader."""
    limits = {"max_pending_bytes": 16_384, "stream_credit_bytes": 16_384, "high_water_bytes": 4096}
    return opening("x" * 200_000, max_model_len=400_000, slow_reader_s=slow_reader_s, **limits)


def test_a_reader_that_does_not_read_is_bounded_and_hinders_nobody(opening):
    """Its tokens stay in the engine, which stops making them."""
    house = _unread(opening, 60.0)
    with _streaming(house, max_tokens=200_000):
        (stream,) = until(house.frontend.streams.with_readers)
        until(lambda: stream.paused)
        assert stream.num_generated < 100_000
        assert house.post(CHATS, CHAT | {"max_tokens": 10}).status_code == 200
        # The system's buffers on the way may have grown meanwhile, and taken a little more.
        until(lambda: stream.paused)
        assert stream.num_generated < 100_000


def test_a_reader_that_takes_nothing_for_too_long_loses_its_connection(opening):
    house = _unread(opening, 0.5)
    with _streaming(house, max_tokens=200_000):
        until(lambda: not house.door.state.connections)
        until(lambda: not house.frontend.streams.num_read)
    assert house.post(CHATS, CHAT | {"max_tokens": 10}).status_code == 200


def _told_slowly(sock, num_bytes, seconds, end):
    """What comes up to `end`, of which so many bytes at most are taken in each hundredth of the first seconds."""
    told, until_s = bytearray(), time.monotonic() + seconds
    while not told.endswith(end):
        is_slow = time.monotonic() < until_s
        more = sock.recv(num_bytes if is_slow else 65536)
        assert more
        told += more
        if is_slow:
            time.sleep(0.01)
    return told


def test_a_reader_that_is_behind_gets_everything(opening):
    house = opening("y" * 30_000, max_model_len=400_000, slow_reader_s=2.0, high_water_bytes=4096)
    with _asked(house, CHAT | {"stream": True, "max_tokens": 30_000}) as sock:
        told = _told_slowly(sock, 4096, 1.0, b"0\r\n\r\n")
    assert told.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    data = b"".join(line for line in told.split(b"\r\n") if line.startswith(b"data"))
    texts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events_of(data.decode())[:-1]]
    assert "".join(texts) == "y" * 30_000


def test_a_connection_that_is_full_for_long_stays_while_something_is_taken(opening):
    house = opening("y" * 6000, max_model_len=10_000, slow_reader_s=0.5)
    data = post_of(CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 6000})
    with socket.socket() as sock:
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 8192
        )  # lest its kernel take much at a time, and seldom
        sock.connect(house.host)
        sock.sendall(data)
        told = _told_slowly(sock, 1024, 1.5, b"}}}")
    (choice,) = json.loads(told.partition(b"\r\n\r\n")[2])["choices"]
    assert len(choice["logprobs"]["content"]) == 6000


def test_one_prompt_of_several_that_fails_ends_all(either):
    house = either({"one": "1" * 50, "two": CoreFailed("a step failed")}, token_s=0.01)
    body = {"model": "fake", "prompt": ["one", "two"]}
    assert house.post("/v1/completions", body).json()["error"]["code"] == "core_failed"
    assert house.post("/v1/completions", body | {"stream": True}).json()["error"]["code"] == "core_failed"
    until(lambda: _num_running(house) == 0)


def test_what_is_put_together_is_bounded(opening):
    asks = CHAT | {"logprobs": True, "top_logprobs": 2}
    one = opening("x" * 2000, http={"max_whole_bytes": 10_000}).post(CHATS, asks)
    assert (one.status_code, one.json()["error"]["param"]) == (400, "max_whole_bytes")
    house = opening("x" * 2000, http={"max_joined_bytes": 10_000})
    full = house.post(CHATS, asks)
    assert (full.status_code, full.json()["error"]["param"]) == (429, "max_joined_bytes")
    until(lambda: _num_running(house) == 0)
    assert house.post(CHATS, asks | {"max_tokens": 5}).status_code == 200


def test_thoughts_and_calls_count_in_what_is_put_together(opening):
    for says in (FakeAnswer(thinking="x" * 5000, text="So."), FakeAnswer(calls=[("wind", {"at": "x" * 5000})])):
        house = opening(says, max_model_len=400_000, http={"max_whole_bytes": 4000})
        refused = house.post(CHATS, CHAT | {"max_tokens": 300_000})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_whole_bytes")


@pytest.mark.parametrize("body", [{"prompt": "y" * 3000, "n": 5}, {"prompt": ["y" * 3000] * 5}])
def test_all_that_an_answer_repeats_counts(opening, body):
    house = opening("x", http={"max_whole_bytes": 10_000})
    refused = house.post("/v1/completions", body | {"echo": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_whole_bytes")
    until(lambda: house.door._house.joined.used("default") == 0)
    assert house.post("/v1/completions", {"prompt": "y" * 3000, "echo": True, "n": 3}).status_code == 200


def test_log_probabilities_that_come_at_once_do_not_hold_the_loop(opening, monkeypatch):
    """Each delta of them takes a while to write: others have their turn between them."""
    house, turns, turns_at = opening("x", max_model_len=60_000), [], []
    add, next_batch = Joining._add, Generation.next_batch

    async def all_at_once(self):
        found = []
        while deltas := await next_batch(self):
            found += deltas
        return found

    def noted(self, delta):
        asyncio.get_running_loop().call_soon(turns.append, None)
        turns_at.append(len(turns))
        add(self, delta)

    monkeypatch.setattr(Generation, "next_batch", all_at_once)
    monkeypatch.setattr(Joining, "_add", noted)
    body = {"prompt": "y" * 20_000, "echo": True, "logprobs": 5, "max_tokens": 1}
    assert house.post("/v1/completions", body, timeout=60).status_code == 200
    assert len(turns_at) >= 50
    assert len(set(turns_at)) > len(turns_at) / 10


def test_many_streams_at_once(either):
    house = either("Hello there.")

    async def body() -> None:
        async with httpx2.AsyncClient(timeout=60) as client:

            async def one() -> str:
                answer = await client.post(house.url + CHATS, json=CHAT | {"stream": True})
                told = [json.loads(event)["choices"][0]["delta"] for event in events_of(answer.text)[:-1]]
                return "".join(delta.get("content", "") for delta in told)

            assert {*await asyncio.gather(*(one() for _ in range(100)))} == {"Hello there."}

    asyncio.run(body())
    until(lambda: house.frontend.streams.num_read == 0)


def test_what_is_over_leaves_nothing_for_the_cycle_collector(either):
    """A server has it come so rarely that what waits for it would gather for hours."""
    house = either("x" * 50)
    gc.collect()
    others = [id(call) for call in _calls()]
    gc.disable()
    try:
        with httpx2.Client() as client:
            for body, status in ((CHAT, 200), (CHAT | {"stream": True}, 200), (CHAT | {"n": "x"}, 400)):
                assert client.post(house.url + CHATS, json=body).status_code == status
        with _streaming(house, max_tokens=10_000):
            pass
        until(lambda: all(id(call) in others for call in _calls()))
    finally:
        gc.enable()


def test_a_drain_waits_for_answers(opening):
    house = opening("x" * 20, token_s=0.02)
    with _streaming(house) as sock:
        house._do(house.frontend.drain)
        refused = house.post(CHATS, CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert b"[DONE]" in heard(sock, b"0\r\n\r\n")
    house._ask(house.frontend.drained)


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_that_passes_while_the_prompt_is_encoded(opening, stream):
    house = opening("x")
    house.frontend._arrivals._encoders = HeldEncoder(house.frontend._arrivals._encoders, 0.1)
    answer = house.post(CHATS, CHAT | {"messages": LONG, "stream": stream, "deadline_s": 0.1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
