"""The end of a server: lame duck, no admission, what is left interrupted; undone; by message and by signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time

import msgspec
import pytest
from fake_core import FakeCores
from streams import generate, tokens_of, until

from cierzo.engine.errors import Draining, Interrupted
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.frontend import interruption
from cierzo.engine.frontend.rpc import LINGER_S
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.messages import (
    Abort,
    Done,
    Drain,
    Drained,
    Failure,
    Final,
    Generate,
    Hello,
    Ping,
    Pong,
    SamplingParams,
    ServerMessage,
)

DEADLINE_S = 20


async def _read(generation, tokens):
    async for delta in generation:
        tokens += delta.token_ids


def test_a_lame_duck_says_so_and_takes_requests_until_its_time_is_over(run, serving, cores):
    async def body():
        async with serving(cores=cores, lame_duck_s=0.05) as house, await Client.connect(house.address) as client:
            house.frontend.drain()
            house.frontend.drain()  # asked for twice: once
            assert (await client.health()).state == "draining"
            assert (await client.complete(token_ids=[1], max_tokens=2)).usage.output_tokens == 2
            assert not house.frontend._drain._over.is_set()  # nothing is open, and something may still come
            await house.frontend.drained()
            with pytest.raises(Draining) as caught:
                await client.complete(token_ids=[1])
            assert caught.value.retry_after_s == 1.0

    run(body())


def test_what_is_left_when_the_time_is_over_can_be_resumed_elsewhere(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, drain_s=0.05) as house, await Client.connect(house.address) as client:
            arguments = {"token_ids": [3], "max_tokens": 8, "temperature": 1.0}
            cut, orphan = client.generate(**arguments), client.generate(token_ids=[4])
            await cores.until(lambda: len(cores.now.submits) == 2)
            for _ in range(3):
                cores.now.step()
            drained = asyncio.create_task(client.drain())
            tokens = []
            with pytest.raises(Interrupted, match="with this seed") as caught:
                await _read(cut, tokens)
            assert caught.value.retry
            await drained
            await cores.until(lambda: len(cores.now.aborts) == 2)  # the core works no more for them
            assert cores.now.aborts[0] == Abort(request_id=0)
            with pytest.raises(Interrupted):
                await _read(orphan, [])
        async with serving(cores=cores) as other, await Client.connect(other.address) as client:
            cores.free = True
            seed = int(caught.value.value)
            rest = client.generate(**arguments, seed=seed, output_token_ids=tokens)
            tokens += await tokens_of(rest)
            assert tokens == [(3 + seed + 7 * position) % 256 for position in range(8)]

    run(body())


def test_the_client_goes_on_elsewhere_by_itself(run, serving):
    """Text too: what the first server held back, as it may begin the stop string, comes from the other one once."""
    first_cores, second_cores = FakeCores(), FakeCores()
    first_cores.free = False
    arguments = {"token_ids": [97], "max_tokens": 8, "seed": 0, "stop": ["vw"]}

    async def body():
        async with (
            serving(cores=first_cores, drain_s=0.05) as first,
            serving(cores=second_cores) as second,
            await Client.connect([first.address, second.address]) as client,
            await Client.connect(second.address) as direct,
        ):
            cut = client.generate(**arguments)
            await first_cores.until(lambda: first_cores.now.submits)
            for _ in range(4):
                first_cores.now.step()  # the fourth token is a "v"
            parts = [await anext(cut)]
            await client.drain(first.address)
            parts += [part async for part in cut]
            whole = (await direct.complete(**arguments)).samples[0]
            assert [token for part in parts for token in part.token_ids] == whole.token_ids
            assert "".join(part.text for part in parts) == whole.text
            assert cut.final.samples[0].output_tokens == len(whole.token_ids) == 8
            (again, _) = second_cores.now.submits
            assert again.output_token_ids[:1] == [97]

    run(body())


def test_a_drain_can_be_undone(run, serving, cores, peering):
    cores.free = False

    async def body():
        async with serving(cores=cores, drain_s=0.05) as house, peering(house) as peer, peering(house) as other:
            sampling = SamplingParams(max_tokens=2)
            peer.say(Generate(stream=1, token_ids=[1], sampling=sampling))
            await cores.until(lambda: cores.now.submits)
            peer.say(Drain(stream=2))
            peer.say(Generate(stream=3, token_ids=[1]))
            refusal = await peer.hear_until(Failure)
            assert (refusal.stream, refusal.code) == (3, "draining")
            other.say(Drain(stream=9, undo=True))
            assert await other.hear() == Done(stream=9)
            undone = await peer.hear_until(Failure)
            assert (undone.stream, undone.code, "undone" in undone.message) == (2, "draining", True)
            assert house.frontend.health == "ready"
            peer.say(Generate(stream=4, token_ids=[1], sampling=sampling))
            await cores.until(lambda: len(cores.now.submits) == 2)
            await asyncio.sleep(0.1)  # the drain's timer would have ended them
            assert len(house.frontend.streams) == 2
            other.say(Drain(stream=9))  # and again
            cores.go_on()
            assert await other.hear() == Drained(stream=9)

    run(body())


def test_the_log_counts_each_request_once(run, serving, cores, peering, caplog):
    cores.free = False
    caplog.set_level("INFO")

    async def body():
        async with serving(cores=cores, drain_s=0.05, lame_duck_s=0.05) as house, peering(house) as peer:
            for stream in (1, 2):
                peer.say(generate(stream, max_tokens=2))
            async with await Client.connect(house.address) as client:
                await client.generate(token_ids=[1]).accepted()
                orphaned = client._session.link
                orphaned._inboxes.clear()  # its end says nothing to the server
                orphaned._transport.abort()
                await until(lambda: house.frontend.streams.num_read <= 2)
            house.frontend.drain()
            house.frontend.undo_drain()
            house.frontend.undo_drain()
            house.frontend.drain()
            await house.frontend.drained()

    run(body())
    duck = "a lame duck for 0.05 s: 3 requests are open, and others are taken"
    said = [record.getMessage() for record in caplog.records if record.name.endswith((".drain", ".frontend"))]
    assert said == [
        duck,
        "the drain is undone: requests are taken",
        duck,
        "draining 3 requests, at most 0.05 s; no others are taken",
        "interrupted 3 requests",
    ]


def test_a_request_that_was_not_begun_has_no_seed_to_go_on_with():
    stream = Stream(
        *(1, 1, None, True, 1, 0, 0.0, 1.0),
    )
    error = interruption(stream)
    assert (error.retry, error.field, error.value) == (True, None, None)
    stream.sampling = SamplingParams(seed=7)
    assert (interruption(stream).field, interruption(stream).value) == ("seed", "7")


ENDLESS = {"token_ids": [1], "max_tokens": 10**6, "ignore_eos": True, "temperature": 1.0}


def test_sigterm_drains_and_interrupts_what_does_not_end(start, tmp_path):
    server, _ = start("--drain-s", "1", "--lame-duck-s", "0.3")
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        while client.health().state != "draining":
            pass
        assert client.complete(token_ids=[1], max_tokens=2).usage.output_tokens == 2  # a lame duck
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
        assert time.monotonic() - signalled_s >= 1.3
    assert server.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain_sooner(start, tmp_path, second):
    with (tmp_path / "log").open("wb") as log:
        server, _ = start("--drain-s", "600", stderr=log)
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        server.send_signal(signal.SIGTERM)
        while client.health().state != "draining":
            pass
        server.send_signal(second)
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
    assert server.wait(DEADLINE_S) == 0
    lines = [line.partition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[-5:] == [
        "SIGTERM: the server drains",
        "draining 1 requests, at most 600 s; no others are taken",
        f"{second.name}: the drain ends before its time",
        "interrupted 1 requests",
        "the server exits with status 0",
    ]


def test_a_drain_ends_in_time_while_the_core_hangs(start, tmp_path):
    server, core = start("--drain-s", "0.5")
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        os.kill(core, signal.SIGSTOP)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
        assert server.wait(DEADLINE_S) == 0
        assert time.monotonic() - signalled_s < 0.5 + 2


@contextlib.contextmanager
def behind(tmp_path, max_tokens):
    """A connection that asked for an answer and does not read yet."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "rpc.sock"))
        peer.settimeout(DEADLINE_S)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        for message in (Hello(features=["resume"]), Generate(stream=1, token_ids=[1], sampling=sampling)):
            body = msgspec.msgpack.encode(message)
            peer.sendall(len(body).to_bytes(4, "big") + body)
        yield peer


def read_all(peer):
    """The messages up to the end of the connection."""
    with peer.makefile("rb") as incoming:
        while len(head := incoming.read(4)) == 4:
            size = int.from_bytes(head, "big")
            body = incoming.read(size)
            assert len(body) == size, "a frame is cut"
            yield msgspec.msgpack.decode(body, type=ServerMessage)


def until_behind(tmp_path):
    """Wait until the answer has ended; what the kernel does not take of it waits in the front end."""
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        while client.stats().finished == 0:
            pass


def test_a_drain_waits_until_what_was_put_is_sent(run, serving, cores, tmp_path):
    async def body():
        async with serving(cores=cores, address=f"unix:{tmp_path / 'rpc.sock'}") as house:
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "rpc.sock"), limit=1024)
            for message in (Hello(), Ping(stream=1)):
                body = msgspec.msgpack.encode(message)
                writer.write(len(body).to_bytes(4, "big") + body)
            await reader.readexactly(4)
            (sink,) = house.frontend.streams._sinks
            while not sink.unsent_bytes:
                writer.write((len(body).to_bytes(4, "big") + body) * 100)  # pings; nobody reads the answers
                await asyncio.sleep(0)
            house.frontend.drain()
            assert not house.frontend._drain._over.is_set()
            reading = asyncio.create_task(reader.read())
            await house.frontend.drained()
            assert not sink.unsent_bytes
            writer.close()
            await reading

    run(body())


def test_an_interrupt_sends_what_was_put_and_waits_a_little_for_its_reader(start, tmp_path):
    server, _ = start()
    with behind(tmp_path, 3000) as peer:
        until_behind(tmp_path)
        server.send_signal(signal.SIGINT)
        time.sleep(0.5)  # the reader's: less than the server waits
        assert isinstance(list(read_all(peer))[-1], Final | Failure)
    assert server.wait(DEADLINE_S) == 0


def test_a_reader_that_never_reads_ends_with_the_drains_time(start, tmp_path):
    server, _ = start("--drain-s", "0.5")
    with behind(tmp_path, 3000):
        until_behind(tmp_path)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE_S) == 0
        assert 0.5 <= time.monotonic() - signalled_s < 0.5 + LINGER_S + 2


def test_a_drain_by_signal_cannot_be_undone(run, serving, cores, peering):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            peer.say(generate(max_tokens=2))
            await cores.until(lambda: cores.now.submits)
            peer.say(Drain(stream=2))
            house.frontend.drain(for_good=True)  # as SIGTERM does, also when one is under way
            peer.say(Drain(stream=3, undo=True))
            refusal = await peer.hear()
            assert (refusal.stream, refusal.code, refusal.field) == (3, "draining", "undo")
            assert house.frontend.health == "draining"
            cores.go_on()
            assert await peer.hear_until(Drained) == Drained(stream=2)
            await house.frontend.drained()

    run(body())


def test_a_connection_may_ask_for_as_many_ends_of_drains_as_for_streams(run, serving, cores, peering):
    cores.free = False

    async def body():
        limits = {"max_streams_per_connection": 1000}
        async with serving(cores=cores, **limits) as house, peering(house) as peer, peering(house) as other:
            peer.say(generate(max_tokens=2))
            await cores.until(lambda: cores.now.submits)
            for stream_id in (*range(2, 1001), 2, 2):
                peer.say(Drain(stream=stream_id))
            peer.say(Drain(stream=1001))
            refusal = await peer.hear()
            assert (refusal.stream, refusal.code, refusal.field) == (
                *(1001, "overloaded"),
                "max_streams_per_connection",
            )
            other.say(Drain(stream=9, undo=True))
            assert await other.hear() == Done(stream=9)
            heard = [await peer.hear() for _ in range(999)]
            assert [message.stream for message in heard] == [*range(2, 1001)]
            assert {message.code for message in heard} == {"draining"}
            for stream_id in range(2, 1001):
                peer.say(Drain(stream=stream_id))
            peer.say(Ping(stream=0))
            assert await peer.hear() == Pong(stream=0)
            cores.go_on()
            assert await peer.hear_until(Drained) == Drained(stream=2)
            assert not house.frontend._drain._over.is_set()  # they get their answers in turns
            assert [(await peer.hear()).stream for _ in range(998)] == [*range(3, 1001)]
            await house.frontend.drained()

    run(body())


def test_a_drain_under_the_id_of_an_open_stream_is_refused(run, serving, cores, peering):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            peer.say(generate(max_tokens=2))
            await cores.until(lambda: cores.now.submits)
            peer.say(Drain(stream=1))
            refusal = await peer.hear()
            assert (refusal.stream, refusal.code, refusal.field) == (1, "invalid_request", "stream")
            assert house.frontend.health == "ready"

    run(body())
