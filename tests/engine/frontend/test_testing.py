"""`cierzo.testing`, as somebody uses it who tests a program of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from streams import tokens_of

from cierzo.engine import errors
from cierzo.engine.errors import (
    CierzoError,
    ConfigError,
    ConnectionLost,
    CoreFailed,
    Draining,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.messages import Generate
from cierzo.testing import FakeAnswer, FakeServer, ManualClock

TURN = {"role": "user", "content": "Wind?"}
TOOL = {"name": "wind", "parameters": {"type": "object"}}


@pytest.fixture
def server():
    with FakeServer("Hello.") as server:
        yield server


@pytest.fixture
def client(server):
    with SyncClient(server.address, reconnect=True) as client:
        yield client


# --- answers -------------------------------------------------------------------------------------------------


def test_a_text_is_the_answer_to_everything(server, client):
    for ask in ({"text": "Hi"}, {"messages": [TURN]}, {"token_ids": [1, 2]}):
        assert client.ask(**ask).text == "Hello."
    assert "".join(delta.text for delta in client.generate(text="Hi")) == "Hello."
    final = client.complete(text="Hi", n=2)
    assert [sample.text for sample in final.samples] == ["Hello.", "Hello."]
    assert final.samples[0].finish_reason == "stop"
    assert final.usage.output_tokens == 2 * len("Hello.") + 2


def test_what_was_asked(server, client):
    client.ask(text="Hi", max_tokens=3, priority=2)
    client.ask(messages=[TURN])
    first, second = server.requests
    assert isinstance(first, Generate)
    assert (first.text, first.sampling.max_tokens, first.priority) == ("Hi", 3, 2)
    assert second.messages[0].content == "Wind?"
    with pytest.raises(InvalidRequest):
        client.ask(text="")
    assert len(server.requests) == 3, "empty, which the front end sees when it is encoded"


@pytest.mark.parametrize("length", [10, 100_000, 5_000_000])
def test_prompts_of_any_length(length):
    with FakeServer("Yes", max_model_len=6_000_000) as server, SyncClient(server.address) as client:
        assert client.ask(text="x" * length).text == "Yes"
        assert len(server.requests[0].text) == length


def test_answers_in_turn():
    answers = ["one", [104, 105], FakeAnswer(thinking="hm", text="€"), Overloaded("no", retry_after_s=3.0)]
    with FakeServer(answers) as server, SyncClient(server.address) as client:
        assert client.ask(text="a").text == "one"
        assert client.complete(text="b").samples[0].token_ids == [104, 105, 257]
        third = client.ask(text="c")
        assert (third.thinking, third.text) == ("hm", "€")
        with pytest.raises(Overloaded, match="no") as caught:
            client.ask(text="d")
        assert caught.value.retry_after_s == 3.0
        with pytest.raises(InvalidRequest, match="has given all its 4 answers"):
            client.ask(text="e")


def test_answers_by_prompt():
    answers = {"Hi": "text", "Wind?": "turn", (1, 2): "ids"}
    with FakeServer(answers) as server, SyncClient(server.address) as client:
        assert client.ask(text="Hi").text == "text"
        assert client.ask(messages=[{"role": "user", "content": "Hi"}, TURN]).text == "turn"
        assert client.ask(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).text == "text"
        assert client.ask(token_ids=[1, 2]).text == "ids"
        with pytest.raises(InvalidRequest, match="no answer to 'Bye'"):
            client.ask(text="Bye")
    with FakeServer({**answers, None: "other"}) as server, SyncClient(server.address) as client:
        assert client.ask(text="Bye").text == "other"


def test_a_function_of_the_request():
    threads = []

    def answer(message):
        threads.append(threading.get_ident())
        if message.text == "bad":
            raise KeyError("lost")
        if message.text == "none":
            return None
        if message.text == "refused":
            raise NotFound("nothing here")
        return message.text.upper()

    with FakeServer(answer) as server, SyncClient(server.address) as client:
        assert client.ask(text="hi").text == "HI"
        with pytest.raises(CierzoError, match="raised KeyError: 'lost'"):
            client.ask(text="bad")
        with pytest.raises(CierzoError, match="answers must be a text"):
            client.ask(text="none")
        with pytest.raises(NotFound, match="nothing here"):
            client.ask(text="refused")
        assert client.ask(text="still there").text == "STILL THERE"
    assert threading.get_ident() not in threads


def test_thoughts_and_calls_of_tools():
    said = FakeAnswer(thinking="let me see", text="It blows.", calls=[("wind", {"at": "Zaragoza"}), ("rain", "{}")])
    with FakeServer([said, "done"]) as server, SyncClient(server.address) as client:
        answer = client.ask(messages=[TURN], tools=[TOOL])
        assert (answer.thinking, answer.text, answer.finish_reason) == ("let me see", "It blows.", "tool_calls")
        assert [(call.name, call.arguments) for call in answer.tool_calls] == [
            ("wind", '{"at": "Zaragoza"}'),
            ("rain", "{}"),
        ]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in answer.tool_calls]
        assert client.ask(messages=[TURN, answer.turn, *results], tools=[TOOL]).text == "done"


def test_limits_and_stops_of_a_request_count(server, client):
    assert client.complete(text="Hi", max_tokens=3).samples[0].finish_reason == "length"
    assert client.ask(text="Hi", stop="lo").text == "Hel"
    assert client.ask(text="Hi", ignore_eos=True, max_tokens=12).text == "Hello.Hello"
    assert client.ask(text="Hi", min_tokens=10, max_tokens=40).text == "Hello.Hello."
    assert client.ask(text="Hi", output_token_ids=[*b"Say"], seed=1).text == "lo."
    assert client.ask(text="Hi", output_token_ids=[*b"Say it all"], seed=1).text == "lo."


def test_what_no_answer_is_is_refused_where_it_is_given():
    for answers in (None, 3, [], [1, None], {"a": 1}, [300], FakeAnswer, b"bytes", [["a"]], True):
        with pytest.raises(ConfigError, match="answers must be") as caught:
            FakeServer(answers)
        assert caught.value.field == "answers"
    for name, value in (
        ("first_token_s", -1),
        ("token_s", float("nan")),
        ("health", "well"),
        ("max_samples", 0),
        ("max_sample", 1),
        ("max_model_len", 0),
        ("metrics", "127.0.0.1:0"),
    ):
        with pytest.raises(ConfigError) as caught:
            FakeServer(**{name: value})
        assert caught.value.field == name


# --- time ----------------------------------------------------------------------------------------------------


def test_no_token_comes_before_its_time():
    clock = ManualClock()
    with FakeServer("abcd", first_token_s=10.0, token_s=2.0, clock=clock) as server:
        with SyncClient(server.address) as client:
            generation = client.generate(text="Hi")
            generation.accepted()
            clock.advance(9.5)
            with pytest.raises(TimeoutError):
                generation.next(timeout_s=0.05)
            clock.advance(0.5)
            assert generation.next(timeout_s=10).text == "a"
            with pytest.raises(TimeoutError):
                generation.next(timeout_s=0.05)
            clock.advance(4.0)
            assert "".join(generation.next(timeout_s=10).text for _ in "bc") == "bc"
            clock.advance(100.0)
            assert "".join(delta.text for delta in generation) == "d"
        with pytest.raises(ValueError, match="forward"):
            clock.advance(-1)


def test_requests_have_times_of_their_own():
    clock = ManualClock()
    with FakeServer("ab", first_token_s=10.0, clock=clock) as server, SyncClient(server.address) as client:
        first = client.generate(text="Hi")
        first.accepted()
        clock.advance(9.0)
        second = client.generate(text="Hi")
        second.accepted()
        clock.advance(1.0)
        assert "".join(delta.text for delta in first) == "ab"
        with pytest.raises(TimeoutError):
            second.next(timeout_s=0.05)
        clock.advance(9.0)
        assert "".join(delta.text for delta in second) == "ab"


def test_delays_in_seconds_of_the_machine():
    with FakeServer("abcd", first_token_s=0.05, token_s=0.01) as server, SyncClient(server.address) as client:
        final = client.complete(text="Hi")
        assert final.timings.total_s >= 0.05 + 4 * 0.01 - 0.005


def test_a_cancelled_answer_ends(server):
    with FakeServer("a" * 50, token_s=3600.0) as server, SyncClient(server.address) as client:
        generation = client.generate(text="Hi")
        assert generation.next().text == "a"
        generation.cancel()
        assert [*generation] == []
        assert generation.final.samples[0].finish_reason == "cancelled"
        assert client.stats().streams == 0


# --- faults --------------------------------------------------------------------------------------------------


def test_refusals(server, client):
    server.refuse(Overloaded, times=2, retry_after_s=0.25)
    server.refuse(Draining("not now"), times=None, when=lambda message: message.text == "Hi")
    for _ in range(2):
        with pytest.raises(Overloaded) as caught:
            client.ask(text="Bye")
        assert caught.value.retry_after_s == 0.25
    assert client.ask(text="Bye").text == "Hello."
    for _ in range(3):
        with pytest.raises(Draining, match="not now"):
            client.ask(text="Hi")
    server.accept()
    assert client.ask(text="Hi").text == "Hello."
    assert len(server.requests) == 7


def test_every_error_can_be_had(server, client):
    for code, kind in errors.BY_CODE.items():
        server.refuse(kind)
        with pytest.raises(CierzoError) as caught:
            client.ask(text="Hi")
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("field", "order"),
    [
        ("error", lambda server: server.refuse(ValueError)),
        ("error", lambda server: server.refuse("overloaded")),
        ("times", lambda server: server.refuse(Overloaded, times=0)),
        ("when", lambda server: server.refuse(Overloaded, when="always")),
        ("after_deltas", lambda server: server.reset(after_deltas=-1)),
        ("times", lambda server: server.reset(times=0)),
        ("down_s", lambda server: server.restart(down_s=-1)),
        ("health", lambda server: setattr(server, "health", "well")),
    ],
)
def test_bad_orders(server, field, order):
    with pytest.raises(ConfigError) as caught:
        order(server)
    assert caught.value.field == field


@pytest.mark.parametrize("after_deltas", [0, 1, 4])
def test_a_reset_in_the_middle_of_an_answer(server, after_deltas):
    server.reset(after_deltas=after_deltas, times=2)
    with SyncClient(server.address, reconnect=False) as client:
        generation, got = client.generate(text="Hi", seed=1), []
        with pytest.raises(ConnectionLost):
            got.extend(generation)
        assert "".join(delta.text for delta in got) == "Hello."[:after_deltas]
    with SyncClient(server.address, reconnect=False) as client:
        rest = client.resume(generation.request_id, received=[after_deltas])
        assert "".join(delta.text for delta in rest) == "Hello."[after_deltas:]
        lost = client.generate(text="Hi")
        with pytest.raises(ConnectionLost):
            got.extend(lost)
    with SyncClient(server.address, reconnect=True) as client:
        assert client.ask(text="Hi").text == "Hello."
        server.reset(after_deltas=after_deltas)
        assert "".join(delta.text for delta in client.generate(text="Hi")) == "Hello."


@pytest.mark.parametrize("after_deltas", [0, 3, 100])
def test_a_reset_of_an_answer_that_comes_at_once_is_before_its_last_record(server, after_deltas):
    for wants in ({"deltas": False}, {"deltas": after_deltas < 100}, {"deltas": True}):
        server.reset(after_deltas=after_deltas)
        with SyncClient(server.address, reconnect=False) as client:
            generation = client.generate(text="Hi", **wants)
            with pytest.raises(ConnectionLost):
                list(generation)
        with SyncClient(server.address) as client:
            server.reset(after_deltas=after_deltas)
            assert client.ask(text="Hi").text == "Hello.", "resumed"
    assert len(server.requests) == 6


def test_a_reset_before_a_last_record_that_is_sent_in_pieces():
    long = "x" * 50_000
    with FakeServer(long, max_model_len=100_000) as server, SyncClient(server.address, reconnect=False) as client:
        server.reset(after_deltas=1)
        with pytest.raises(ConnectionLost):
            client.ask(text="Hi", max_tokens=60_000)
        with SyncClient(server.address) as other:
            assert other.ask(text="Hi", max_tokens=60_000).text == long


def test_a_reset_without_the_feature_resume(server, run):
    async def body():
        for after_deltas in (0, 2):
            server.reset(after_deltas=after_deltas)
            async with await Client.connect(server.address, features=()) as client:
                generation = client.generate(text="Hi")
                for letter in "Hello."[:after_deltas]:
                    assert (await generation.next()).text == letter
                with pytest.raises(ConnectionLost):
                    await generation.next()

    run(body())


def test_a_refused_request_leaves_the_reset_to_the_next_one(server):
    server.reset()
    server.refuse(Overloaded)
    with SyncClient(server.address, reconnect=False) as client:
        with pytest.raises(Overloaded):
            client.ask(text="Hi")
        with pytest.raises(ConnectionLost):
            client.ask(text="Hi")


def test_a_restart_forgets_the_requests():
    with FakeServer("ab", token_s=3600.0) as server:
        address = server.address
        with SyncClient(address, reconnect=True) as client:
            generation = client.generate(text="Hi", idempotency_key="k")
            request_id = generation.accepted().request_id
            assert generation.next().text == "a"
            assert server.num_connections == 1
            server.restart()
            assert server.address == address
            with pytest.raises(CierzoError):
                generation.next(timeout_s=10)
        with SyncClient(address) as client, pytest.raises(NotFound):
            [*client.resume(request_id, received=[1])]


def test_all_connections_are_cut(server, client):
    client.ping()
    with SyncClient(server.address, reconnect=False) as other:
        other.ping()
        server.disconnect()
        with pytest.raises(ConnectionLost):
            other.ping()
    assert client.ask(text="Hi").text == "Hello."


def test_health(server, client):
    server.health = "loading"
    assert client.health().state == server.health == "loading"
    with pytest.raises(Overloaded, match="loading"):
        client.ask(text="Hi")
    server.health = "draining"
    with pytest.raises(Draining):
        client.ask(text="Hi")
    server.health = "failed"
    with pytest.raises(CoreFailed):
        client.ask(text="Hi")
    server.health = "ready"
    assert client.ask(text="Hi").text == "Hello."
    with FakeServer(health="loading") as loading, SyncClient(loading.address) as waiting:
        with pytest.raises(TimeoutError):
            waiting.wait_ready(timeout_s=0.06)
        loading.health = "ready"
        waiting.wait_ready(timeout_s=10)


@pytest.mark.parametrize("state", ["loading", "stalled"])
def test_open_answers_wait_for_a_core_that_is_gone_or_hangs(state):
    clock = ManualClock()
    with FakeServer("abc", token_s=1.0, clock=clock) as server, SyncClient(server.address) as client:
        generation = client.generate(text="Hi")
        assert generation.next(timeout_s=10).text == "a"
        server.health = state
        clock.advance(5.0)
        with pytest.raises(TimeoutError):
            generation.next(timeout_s=0.05)
        server.health = "ready"
        clock.advance(5.0)
        assert "".join(delta.text for delta in generation) == "bc"


# --- its life ------------------------------------------------------------------------------------------------


def test_limits_are_those_of_a_real_server():
    given = {"max_samples": 2, "max_model_len": 50, "model": "small"}
    with FakeServer(**given) as server, SyncClient(server.address) as client:
        assert client.welcome.model == "small"
        assert client.welcome.limits.max_samples == 2
        with pytest.raises(InvalidRequest, match="a context of 50"):
            client.ask(text="x" * 60)


def test_with_asyncio(run):
    async def body():
        async with FakeServer("Hello.") as server, await Client.connect(server.address) as client:
            assert len(await tokens_of(client.generate(text="Hi"))) == 7
            answers = await asyncio.gather(*(client.ask(text="Hi") for _ in range(50)))
            assert {answer.text for answer in answers} == {"Hello."}

    run(body())


def test_it_says_when_it_does_not_run():
    server = FakeServer()
    for use in (lambda: server.address, lambda: server.health, server.restart, server.disconnect):
        with pytest.raises(RuntimeError, match="does not run"):
            use()
    before = threading.active_count()
    with server, pytest.raises(RuntimeError, match="runs already"), server:
        pass
    assert threading.active_count() == before
    with server:
        address = server.address
        SyncClient(address).close()
    with pytest.raises(ConnectionLost):
        SyncClient(address)
    with FakeServer() as other, pytest.raises(ConfigError, match="cannot listen"):
        FakeServer(address=other.address).__enter__()
    assert threading.active_count() == before


def test_a_function_that_would_wait_for_its_own_server():
    def answer(message):
        server.health = "draining"
        return "no"

    with FakeServer(answer) as server, SyncClient(server.address) as client:
        asked = client.generate(text="Hi")
        with pytest.raises(CierzoError, match="cannot wait for it"):
            asked.next()


def test_it_starts_fast_and_needs_neither_torch_nor_pytest():
    code = (
        "import sys, time; t = time.process_time()\n"
        "from cierzo.testing import FakeServer\n"
        "with FakeServer() as server: pass\n"
        "assert not {'torch', 'pytest', 'transformers', 'mistral_common'} & set(sys.modules)\n"
        "print(time.process_time() - t)"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    assert min(float(each.stdout) for each in told) < 1.0
