"""A reader that is slow, and one that has stopped: only the second is given up, on both sides of the wire."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from fake_rpc_server import LIMITS, accepted, delta, final, scripted
from streams import answer, final_of, generate, until

from cierzo.engine.errors import SlowReader
from cierzo.engine.frontend import client_link, sync_generation
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.rpc import Connection
from cierzo.engine.messages import (
    Credit,
    Delta,
    Failure,
    Generate,
    Hello,
    TokenLogprobs,
)

CREDIT = Hello(client="test", features=["credit"])
SLOW_S = 10.0


def on(clock, house):
    """Have the readers' time be the clock's; gives a function that lets seconds pass."""
    slow = house.frontend.outlets._slow
    slow._clock = clock

    def passes(seconds):
        clock.now += seconds
        slow._fire()

    return passes


def test_who_gives_credit_is_never_given_up_also_while_the_stream_is_paused(run, serving, peering, cores, clock):
    cores.free = False

    async def body():
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 400, "slow_reader_s": SLOW_S}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            passes = on(clock, house)
            peer.say(generate(max_tokens=1000))
            await cores.until(lambda: cores.now.submits)
            cores.go_on()
            await cores.until(lambda: cores.now.aborts)
            (stream,) = house.frontend.streams
            for _ in range(10):
                passes(0.6 * SLOW_S)
                peer.say(Credit(stream=1, bytes=1))
                await peer.hear_so_far()
                assert stream.paused
                assert stream in house.frontend.streams
            passes(0.9 * SLOW_S)
            assert stream in house.frontend.streams
            passes(0.2 * SLOW_S)
            assert stream.error is not None
            assert (await peer.hear_until(Failure)).code == "slow_reader"

    run(body())


def test_a_pause_does_not_begin_the_time_anew(run, serving, peering, cores, clock):
    cores.free = False

    async def body():
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 400, "slow_reader_s": SLOW_S}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            passes = on(clock, house)
            peer.say(generate(max_tokens=1000))
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            while not stream.unsent:
                cores.now.step()
                await peer.hear_so_far()
            passes(0.6 * SLOW_S)
            while not stream.paused:
                cores.now.step()
                await peer.hear_so_far()
            passes(0.6 * SLOW_S)
            assert (await peer.hear_until(Failure)).code == "slow_reader"

    run(body())


@pytest.fixture
def taken(monkeypatch):
    """What each connection tells that its peer has taken."""
    count = [0]
    monkeypatch.setattr(Connection, "num_taken", property(lambda self: count[0]))
    return count


async def fill(house, peer, cores):
    """A peer's connection, which is full, and its stream, which is paused for that."""
    cores.free = False
    (connection,) = house.server._connections
    peer.say(generate(max_tokens=1000))
    await cores.until(lambda: cores.now.submits)
    connection.pause_writing()
    cores.go_on()
    await cores.until(lambda: cores.now.aborts)
    (stream,) = house.frontend.streams
    return connection, stream


def test_a_delta_that_is_sent_is_progress(run, serving, peering, cores, clock, taken, monkeypatch):
    """The connection takes one delta at a time, and the stream stays paused."""
    monkeypatch.setattr("cierzo.engine.frontend.outlet.CHUNK_TOKENS", 8)

    async def body():
        async with (
            serving(cores=cores, max_pending_bytes=400, slow_reader_s=SLOW_S) as house,
            peering(house) as peer,
        ):
            passes = on(clock, house)
            connection, stream = await fill(house, peer, cores)
            put = connection.put

            def put_one(message):
                put(message)
                if isinstance(message, Delta):
                    asyncio.get_running_loop().call_soon(connection.pause_writing)

            connection.put = put_one
            got = []
            for _ in range(5):
                passes(0.6 * SLOW_S)
                connection.resume_writing()
                got += (await peer.hear_until(Delta)).token_ids
                assert stream.paused
            assert got == answer(40)
            passes(1.1 * SLOW_S)
            connection.resume_writing()
            assert (await peer.hear_until(Failure)).code == "slow_reader"

    run(body())


def test_bytes_that_a_full_connections_peer_takes_are_progress(run, serving, peering, cores, clock, taken):
    async def body():
        async with (
            serving(cores=cores, max_pending_bytes=400, slow_reader_s=SLOW_S) as house,
            peering(house) as peer,
        ):
            passes = on(clock, house)
            connection, stream = await fill(house, peer, cores)
            for _ in range(3):
                taken[0] += 1
                passes(1.1 * SLOW_S)
                assert stream in house.frontend.streams
            passes(1.1 * SLOW_S)
            connection.resume_writing()
            assert (await peer.hear_until(Failure)).code == "slow_reader"

    run(body())


def test_bytes_of_other_streams_are_no_progress_of_one_without_credit(run, serving, peering, cores, clock, taken):
    async def body():
        limits = {"stream_credit_bytes": 1024, "slow_reader_s": SLOW_S}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            passes = on(clock, house)
            (connection,) = house.server._connections
            peer.say(generate(max_tokens=100))
            while len(house.frontend.streams) or not house.frontend.streams.num_read:
                await peer.hear_so_far()
            connection.pause_writing()
            taken[0] += 1
            passes(1.1 * SLOW_S)
            connection.resume_writing()
            assert (await peer.hear_until(Failure)).code == "slow_reader"

    run(body())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_what_the_peer_takes_of_a_full_connection_is_seen(run, serving, kind, tmp_path):
    address = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path / 'rpc.sock'}"

    async def body():
        async with serving(address=address, handshake_timeout_s=60.0) as house:
            peer = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, _, port = house.address.rpartition(":")
            peer.connect((host, int(port)) if kind == "tcp" else port)
            await until(lambda: house.server._connections)
            (connection,) = house.server._connections
            connection._write(bytes(8 << 20))
            assert connection.is_paused
            before, now = -1, 0
            while before != now:  # until it is stuck
                before = now
                await asyncio.sleep(0.05)
                now = connection.num_taken
            assert connection.num_taken == now
            left = 30_000 if kind == "tcp" else 110_000  # so little that the kernel does not ask for more
            while left:
                left -= len(peer.recv(min(left, 65536)))
                await asyncio.sleep(0)
            await until(lambda: connection.num_taken != now)
            assert connection.is_paused, "it is seen before the connection takes more"
            peer.close()

    run(body())


# --- the clients ---------------------------------------------------------------------------------------


ENTRIES = [TokenLogprobs(65, -1.0, [65, 66], [-1.0, -2.0])]


def gives_back(parts, told):
    """A script that sends so many deltas, then waits for credit of less than a quarter of them, then ends."""

    async def script(peer, number):
        request = await peer.hear(Generate)
        logprobs = ENTRIES if request.sampling.logprobs is not None else None
        deltas = [Delta(stream=request.stream, token_ids=[65], text="A", logprobs=logprobs) for _ in range(parts)]
        peer.say(accepted(request.stream), *deltas)
        told["credit"] = (await peer.hear(Credit)).bytes
        told["cost"] = delta_cost(deltas[0])
        peer.say(final(request.stream, parts))
        await peer.hear()

    return script


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}])
def test_a_slow_consumer_gives_credit_soon(run, monkeypatch, sampling):
    monkeypatch.setattr(client_link, "CREDIT_S", 0.01)
    told = {}

    async def body():
        async with scripted(gives_back(10, told)) as address, await Client.connect(address) as client:
            generation = client.generate(token_ids=[1], **sampling)
            await generation.next()
            await generation.next()
            await until(lambda: generation._inbox.ended)
            assert told["credit"] in (told["cost"], 2 * told["cost"])
            assert 2 * told["cost"] < LIMITS.stream_credit_bytes // 4

    run(body())


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}])
def test_a_slow_caller_gives_credit_for_each_delta_it_took(scripting, monkeypatch, sampling):
    monkeypatch.setattr(client_link, "CREDIT_S", 0.01)
    monkeypatch.setattr(sync_generation, "TOLD_S", 0.0)
    told = {}
    server = scripting(gives_back(10, told))
    with SyncClient(server.address) as client:
        generation = client.generate(token_ids=[1], **sampling)
        taken = [next(generation), next(generation)]
        while not generation._generation._inbox.ended:
            time.sleep(0)
        assert told["credit"] in (told["cost"], 2 * told["cost"])
        assert len([*taken, *generation]) == 10


def test_consumption_is_told_once(scripting, monkeypatch):
    """Whatever is told in between: at the end nothing counts as held, and nothing has been told twice."""
    monkeypatch.setattr(sync_generation, "TOLD_S", 0.0)

    async def script(peer, number):
        request = await peer.hear(Generate)
        peer.say(
            accepted(request.stream), *(delta(request.stream, [65]) for _ in range(20)), final(request.stream, 20)
        )
        await peer.hear()

    consumed = []
    plain = client_link.ClientLink.consumed
    monkeypatch.setattr(
        client_link.ClientLink,
        "consumed",
        lambda link, inbox, cost: (consumed.append(cost), plain(link, inbox, cost)),
    )
    with SyncClient(scripting(script).address) as client:
        generation = client.generate(token_ids=[1])
        assert len([*generation]) == 20
        client._run(lambda: asyncio.sleep(0))
        assert generation._generation._inbox.held == 0
    assert sum(consumed) == 20 * delta_cost(delta(1, [65]))


PACE_S, PATIENCE_S = 0.03, 0.3


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 1}])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_steady_reader_slower_than_the_model_gets_its_answer(run, serving, monkeypatch, blocking, sampling):
    """A quarter of its credit takes it longer than slow_reader_s."""
    monkeypatch.setattr(client_link, "CREDIT_S", 0.05)
    monkeypatch.setattr(sync_generation, "TOLD_S", 0.05)
    credit = 4096 if not sampling else 8192
    asked = {"token_ids": [0], "max_tokens": 150, "seed": 0, **sampling}

    def read(address):
        tokens = []
        with SyncClient(address) as client:
            for part in client.generate(**asked):
                tokens += part.token_ids
                time.sleep(PACE_S)
        return tokens

    async def body():
        limits = {"slow_reader_s": PATIENCE_S, "stream_credit_bytes": credit, "max_pending_bytes": 200}
        async with serving(**limits) as house:
            if blocking:
                assert await asyncio.to_thread(read, house.address) == answer(150)
                return
            async with await Client.connect(house.address) as client:
                tokens = []
                async for part in client.generate(**asked):
                    tokens += part.token_ids
                    await asyncio.sleep(PACE_S)
                assert tokens == answer(150)

    run(body())


def test_a_consumer_that_stops_is_given_up(run, serving):
    async def body():
        async with (
            serving(slow_reader_s=0.05, stream_credit_bytes=1024) as house,
            await Client.connect(house.address) as client,
        ):
            generation = client.generate(token_ids=[0], max_tokens=500, seed=0)
            await until(lambda: generation._inbox.ended)
            with pytest.raises(SlowReader):
                await final_of(generation)

    run(body())
