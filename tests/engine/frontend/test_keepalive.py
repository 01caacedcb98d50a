"""Silent clients, clients that are gone, other protocols, and clients that open and cancel without end."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.keepalive import Keepalive
from cierzo.engine.frontend.limits import RESET_WINDOW_S, CancelLimiter
from cierzo.engine.messages import Accepted, Cancel, CancelRequest, Failure, Final, Generate, Hello, Ping, Pong

WANTS = Hello(features=["keepalive"])


class Log:
    def __init__(self):
        self.events = []
        self.news = asyncio.Event()

    def add(self, what):
        self.events.append(what)
        self.news.set()


def test_a_silence_is_asked_about_once_and_then_ends(run):
    async def body():
        log, loop = Log(), asyncio.get_running_loop()
        start = loop.time()
        Keepalive(0.02, lambda: log.add("ping"), lambda: log.add("gone"))
        while log.events != ["ping", "gone"]:
            log.news.clear()
            await log.news.wait()
        assert loop.time() - start >= 0.035  # the loop counts whole milliseconds

    run(body())


def test_a_byte_begins_a_new_silence(run):
    async def body():
        log, loop = Log(), asyncio.get_running_loop()
        keepalive = Keepalive(0.05, lambda: log.add(loop.time()), lambda: log.add("gone"))
        await log.news.wait()
        log.news.clear()
        keepalive.heard()
        await log.news.wait()
        assert log.events[1] - log.events[0] >= 0.045  # a second ping, and not the end
        keepalive.cancel()

    run(body())


def test_who_answers_pings_stays_and_who_does_not_goes(run, serving, peering):
    async def body():
        async with (
            serving(keepalive_s=0.05) as house,
            peering(house, WANTS) as awake,
            peering(house, WANTS) as asleep,
            peering(house) as plain,
        ):
            for _ in range(4):
                ping = await awake.hear()
                assert isinstance(ping, Ping)
                awake.say(Pong(stream=ping.stream))
            assert isinstance(await asleep.hear(), Ping)
            failure = await asleep.hear()
            assert (failure.stream, failure.code, failure.field) == (-1, "protocol_error", "keepalive_s")
            assert await asleep.hear() is None
            plain.say(Ping(stream=1))  # it was never asked, and is still there
            assert await plain.hear() == Pong(stream=1)

    run(body())


def test_a_connection_that_is_gone_takes_its_streams_along(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, keepalive_s=0.02) as house, peering(house, WANTS) as peer:
            peer.say(Generate(stream=1, token_ids=[1]))
            await cores.until(lambda: cores.now.aborts)
            assert (await peer.hear_until(Failure)).field == "keepalive_s"
            assert house.frontend.streams.num_sinks == 0

    run(body())


def test_the_kernel_looks_for_half_open_connections(run, serving):
    async def body():
        async with serving(keepalive_s=8.0) as house, await Client.connect(house.address):
            (connection,) = house.server._connections
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            read = [getattr(socket, name) for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")]
            idle_s, interval_s, probes = (sock.getsockopt(socket.IPPROTO_TCP, name) for name in read)
            assert (idle_s, interval_s * probes) == (8, 8)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 16_000

    run(body())


@pytest.mark.parametrize(
    ("said", "name", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP", b"HTTP/1.1 400 "),
        (b"POST /v1/completions HTTP/1.1\r\n\r\n{}", "HTTP", b"HTTP/1.1 400 "),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200, "TLS", b"\x15\x03\x03\x00\x02\x02\n"),
    ],
)
def test_other_protocols_get_one_clear_line(run, serving, peering, caplog, said, name, answer):
    async def body():
        async with serving() as house:
            with caplog.at_level(logging.WARNING):
                async with peering(house, None) as peer:
                    peer.raw(said)
                    data = await peer.reader.read()
            assert data.startswith(answer)
            assert bool(data) == bool(answer)
            if name == "HTTP":
                head, _, text = data.partition(b"\r\n\r\n")
                assert f"Content-Length: {len(text)}".encode() in head
                assert text.count(b"\n") == 1
            lines = [record.getMessage() for record in caplog.records]
            assert len(lines) == 1
            assert lines[0].startswith(f"{name} came")
            async with await Client.connect(house.address) as client:
                assert (await client.complete(token_ids=[1], max_tokens=1)).samples

    run(body())


def test_a_bucket_holds_ten_seconds_and_fills_up(clock):
    class Sink:
        pass

    limiter, sink = CancelLimiter(FrontendConfig(max_cancels_per_s=3), clock), Sink()
    for _ in range(3 * RESET_WINDOW_S):
        limiter.count(sink)
    with pytest.raises(Overloaded) as caught:
        limiter.count(sink)
    assert caught.value.field == "max_cancels_per_s"
    limiter.count(Sink())  # of another connection
    clock.now += 1
    for _ in range(3):
        limiter.count(sink)
    with pytest.raises(Overloaded):
        limiter.count(sink)
    clock.now += 1000
    for _ in range(3 * RESET_WINDOW_S):
        limiter.count(sink)
    with pytest.raises(Overloaded):
        limiter.count(sink)


@pytest.mark.parametrize("way", ["cancel", "by id", "a faulty message"])
def test_who_opens_and_cancels_without_end_is_disconnected(run, serving, peering, cores, clock, way):
    cores.free = False

    async def body():
        async with serving(cores=cores, clock=clock, max_cancels_per_s=1) as house:
            async with peering(house, Hello(features=["resume"])) as peer:
                for stream in range(RESET_WINDOW_S + 1):
                    peer.say(Generate(stream=stream, token_ids=[1]))
                    if way == "by id":
                        name = (await peer.hear_until(Accepted)).request_id
                        peer.say(CancelRequest(stream=stream + 100, request_id=name))
                        continue
                    peer.say(Cancel(stream=stream) if way == "cancel" else {"type": "fly", "stream": stream})
                    peer.say(Cancel(stream=stream))  # of one that has ended costs nothing
                failure = await peer.hear_until(Failure)
                while failure.stream != -1:
                    failure = await peer.hear_until(Failure)
                assert (failure.code, failure.field) == ("overloaded", "max_cancels_per_s")
                assert failure.retry
                assert await peer.hear() is None
            cores.free = True
            async with peering(house) as other:
                other.say(Generate(stream=1, token_ids=[1]))
                assert isinstance(await other.hear_until(Final), Final)

    run(body())
