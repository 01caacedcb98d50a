"""Slow readers, with credit and without: output merged, the stream paused, then ended; nobody else feels it."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc

import pytest
from streams import answer, generate, tokens_of

from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.outlet import TURN_TOKENS
from cierzo.engine.frontend.tenants import EVERYBODY
from cierzo.engine.messages import (
    FEATURES,
    Accepted,
    Cancel,
    Credit,
    Delta,
    Drain,
    Drained,
    Failure,
    Final,
    Hello,
    Ping,
    Pong,
    Resume,
    StepOutput,
    TokenDelta,
    TokenLogprobs,
)
from cierzo.engine.testing.local_encoders import local_encoders

CREDIT = Hello(client="test", features=["credit"])


def test_the_cost_of_a_delta():
    assert delta_cost(Delta(stream=1)) == 64
    assert delta_cost(Delta(stream=1, token_ids=[1, 2, 3], text="a€")) == 64 + 24 + 4
    entries = [TokenLogprobs(1, -1.0, [], []), TokenLogprobs(2, -1.0, [2, 3], [-1.0, -2.0])]
    assert delta_cost(Delta(stream=1, token_ids=[1, 2], logprobs=entries)) == 64 + 16 + 2 * 32 + 2 * 16


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_sends_while_it_has_credit(run, serving, peering, cores, logprobs):
    cores.free = False

    async def body():
        async with serving(cores=cores, stream_credit_bytes=1024) as house, peering(house, CREDIT) as peer:
            peer.say(generate(max_tokens=200, logprobs=logprobs, ignore_eos=True))
            await cores.until(lambda: cores.now.submits)
            for _ in range(100):
                cores.now.step()
            heard = []
            while not heard or sum(map(delta_cost, heard)) < 1024:
                heard.append(await peer.hear())
            spent = sum(map(delta_cost, heard))
            assert 1024 <= spent < 1024 + 64 + 8 + 2 + 32 + 32
            assert await peer.hear_so_far() == []
            peer.say(Credit(stream=1, bytes=spent))
            merged = [await peer.hear()]
            assert len(merged[0].token_ids) == 100 - len(heard), "all that waited is one delta"
            peer.say(Credit(stream=1, bytes=10**6))
            cores.go_on()
            while not isinstance(merged[-1], Final):
                merged.append(await peer.hear())
            deltas = [*heard, *merged[:-1]]
            token_ids = [t for d in deltas for t in d.token_ids]
            assert token_ids == answer(200)
            text = "".join(d.text for d in deltas)
            assert text == bytes(token_ids).decode(errors="replace")
            if logprobs is not None:
                assert [e.token_id for d in deltas for e in d.logprobs] == token_ids

    run(body())


def test_credit_is_each_streams_own(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, stream_credit_bytes=1024) as house, peering(house, CREDIT) as peer:
            peer.say(generate(1, max_tokens=500))
            peer.say(generate(2, max_tokens=500))
            heard = {1: [], 2: []}
            while not heard[2] or not isinstance(heard[2][-1], Final):
                message = await peer.hear()
                heard[message.stream].append(message)
                if message.stream == 2 and isinstance(message, Delta):
                    peer.say(Credit(stream=2, bytes=delta_cost(message)))
            assert [t for d in heard[2][:-1] for t in d.token_ids] == answer(500)
            assert not any(isinstance(message, Final) for message in heard[1])
            peer.say(Credit(stream=1, bytes=10**6))
            while not isinstance(heard[1][-1], Final):
                heard[1].append(await peer.hear())
            assert [t for d in heard[1][:-1] for t in d.token_ids] == answer(500)
            peer.say(Credit(stream=1, bytes=5))  # it has ended: nothing happens
            assert await peer.hear_so_far() == []

    run(body())


@pytest.mark.parametrize("amount", [0, -5])
def test_credit_must_be_something(run, serving, peering, cores, amount):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house, CREDIT) as peer:
            peer.say(generate())
            peer.say(Credit(stream=1, bytes=amount))
            refusal = await peer.hear()
            assert (refusal.stream, refusal.code, refusal.field) == (1, "invalid_request", "bytes")
            await cores.until(lambda: cores.now.aborts)

    run(body())


def test_a_final_needs_no_credit(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, stream_credit_bytes=1024) as house, peering(house, CREDIT) as peer:
            peer.say(generate(1, max_tokens=400, deltas=False))
            final = await peer.hear()
            assert final.samples[0].token_ids == answer(400)
            cores.free = False
            peer.say(generate(2, max_tokens=400))
            await cores.until(lambda: len(cores.now.submits) == 2)
            for _ in range(100):
                cores.now.step()
            heard = []
            while sum(map(delta_cost, heard)) < 1024:
                heard.append(await peer.hear())
            peer.say(Cancel(stream=2))
            final = await peer.hear()
            end = final.samples[0]
            assert (final.stream, end.output_tokens, end.finish_reason) == (2, 100, "cancelled")
            assert len(heard) < 20, "what waited was dropped"

    run(body())


def test_a_slow_readers_stream_is_paused_and_goes_on_where_it_was(run, serving, peering, cores):
    cores.free = False

    async def body():
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 400}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            peer.say(generate(max_tokens=1000, n=2))
            other = await Client.connect(house.address)
            quick = other.generate(token_ids=[0], max_tokens=1000, seed=0)
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.go_on()
            assert await tokens_of(quick) == answer(1000), "nobody else is held up"
            ((abort,), submits) = (cores.now.aborts, cores.now.submits)
            assert (abort.request_id, abort.sample) == (0, None)
            (stream,) = house.frontend.streams
            assert stream.paused
            assert 400 < stream.pending_bytes <= 408
            got = {0: [], 1: []}
            while not isinstance(message := await peer.hear(), Final):
                got[message.sample] += message.token_ids
                peer.say(Credit(stream=1, bytes=delta_cost(message)))
            assert got == {0: answer(1000), 1: [(17 + t) % 256 for t in answer(1000)]}
            assert len(submits) >= 4
            assert all(submit.request_id != 0 for submit in submits[2:]), "each run has a name of its own"
            await other.close()

    run(body())


def test_a_reader_that_takes_nothing_is_given_up(run, serving, peering, cores):
    """While its stream is paused, and while the rest of an answer that has ended waits."""

    async def body():
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 400, "slow_reader_s": 0.05}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            for stream, max_tokens, is_paused in ((1, 1000, True), (2, 40, False)):
                peer.say(generate(stream, max_tokens=max_tokens))
                failed = await peer.hear_until(Failure)
                assert (failed.stream, failed.code, failed.field) == (stream, "slow_reader", "slow_reader_s")
                assert ("max_pending_bytes" in failed.message) == is_paused
                assert len(house.frontend.streams) == house.frontend.streams.num_read == 0
            cores.free = False
            peer.say(generate(3, max_tokens=1000))
            await cores.until(lambda: len(cores.now.submits) == 3)
            for _ in range(30):
                cores.now.step()
            failed = await peer.hear_until(Failure)
            assert (failed.stream, failed.code) == (3, "slow_reader")
            await cores.until(lambda: not cores.now.running)  # it was aborted, though not paused
            cores.free = True
            peer.say(generate(2, max_tokens=1))
            assert isinstance(await peer.hear_until(Final), Final), "the connection goes on"
            assert len(house.frontend.outlets._slow) == 0

    run(body())


def test_a_full_connection_pauses_its_streams(run, serving, peering, cores):
    """Without credit: TCP's own back-pressure does the same, for all streams of the connection."""
    cores.free = False

    async def body():
        async with serving(cores=cores, max_pending_bytes=400) as house, peering(house) as peer:
            (connection,) = house.server._connections
            for stream in (1, 2, 3):
                peer.say(generate(stream, max_tokens=50 if stream == 3 else 1000))
            await cores.until(lambda: len(cores.now.submits) == 3)
            connection.pause_writing()
            cores.go_on()
            await cores.until(lambda: len(cores.now.aborts) == 2)
            assert [stream.paused for stream in house.frontend.streams] == [True, True]
            assert len(house.frontend.streams.of(connection)) == 3, "the third has ended, and was not sent"
            connection.resume_writing()
            got, ended = {1: [], 2: [], 3: []}, set()
            while len(ended) < 3:
                if isinstance(message := await peer.hear(), Delta):
                    got[message.stream] += message.token_ids
                else:
                    ended.add(message.stream)
            assert got == {1: answer(1000), 2: answer(1000), 3: answer(50)}
            assert len(cores.now.submits) == 5

    run(body())


def test_a_connection_that_stays_full_loses_its_streams(run, serving, peering, cores):
    cores.free = False

    async def body():
        limits = {"max_pending_bytes": 1500, "slow_reader_s": 0.05}
        async with serving(cores=cores, **limits) as house, peering(house) as peer:
            (connection,) = house.server._connections
            for stream, max_tokens in ((1, 1000), (2, 50)):
                peer.say(generate(stream, max_tokens=max_tokens))
            peer.say(generate(3, max_tokens=50, deltas=False))
            await cores.until(lambda: len(cores.now.submits) == 3)
            connection.pause_writing()
            cores.go_on()
            async with await Client.connect(house.address) as client:
                while house.frontend.streams.num_read:
                    await client.ping()
            connection.resume_writing()
            ends = [await peer.hear() for _ in range(3)]
            assert {(end.stream, end.code) for end in ends} == {(i, "slow_reader") for i in (1, 2, 3)}
            peer.say(Ping(stream=4))
            assert await peer.hear() == Pong(stream=4)

    run(body())


def test_a_drain_waits_for_readers_that_are_behind(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, stream_credit_bytes=1024) as house, peering(house, CREDIT) as peer:
            peer.say(generate(1, max_tokens=400))
            while len(house.frontend.streams) or not house.frontend.streams.num_read:
                await peer.hear_so_far()
            peer.say(Drain(stream=9))
            assert await peer.hear_so_far() == []
            peer.say(Credit(stream=1, bytes=10**6))
            heard = [await peer.hear()]
            while not isinstance(heard[-1], Drained):
                heard.append(await peer.hear())
            assert isinstance(heard[-2], Final)

    run(body())


def test_the_end_of_a_drain_does_not_wait_for_slow_readers(run, serving, peering, cores):
    """One stream has ended and its reader is behind, the other one has all that there is."""

    async def body():
        limits = {"stream_credit_bytes": 1024, "drain_s": 0.05}
        async with serving(cores=cores, **limits) as house, peering(house, CREDIT) as peer:
            peer.say(generate(1, max_tokens=400, seed=5))
            while len(house.frontend.streams) or not house.frontend.streams.num_read:
                await peer.hear_so_far()
            cores.free = False
            peer.say(generate(2, max_tokens=400, seed=6))
            peer.say(Drain(stream=9))
            heard = [await peer.hear()]
            while not isinstance(heard[-1], Drained):
                heard.append(await peer.hear())
            ends = {message.stream: message for message in heard if isinstance(message, Failure)}
            assert {stream: end.code for stream, end in ends.items()} == {1: "interrupted", 2: "interrupted"}
            assert {stream: (end.field, end.value) for stream, end in ends.items()} == {
                1: ("seed", "5"),
                2: ("seed", "6"),
            }
            assert house.frontend.streams.num_read == 0

    run(body())


def test_readers_that_are_behind_share_turns_of_the_loop(prompts, model_info):
    """A reader that resumes 64,000 tokens of four requests gets them in parts, so that others have their turns."""

    class Sink:
        features, is_paused, num_taken = frozenset(["resume"]), False, 0
        access, peer = EVERYBODY, "a test"

        def __init__(self):
            self.parts, self.heard = [], []

        def put(self, message):
            if not self.parts:
                asyncio.get_running_loop().call_soon(self.turn_is_over)
            self.parts.append(message)

        def turn_is_over(self):
            self.heard.append(self.parts)
            self.parts = []

    class NoCore:
        def send(self, command):
            pass

    async def body():
        config = FrontendConfig()
        frontend = Frontend(config, model_info, prompts, NoCore(), local_encoders(prompts, config, model_info))
        frontend.core.ready()
        first, sink = Sink(), Sink()
        for one in (first, sink):
            frontend.connect(one)
        for run in range(4):
            frontend.generate(first, generate(run, n=4, max_tokens=4000))
        runs = [(run, sample) for run in range(4) for sample in range(4)]
        frontend.core.step(StepOutput(deltas=[TokenDelta(*run, [65] * 4000, None, None) for run in runs]))
        for accepted in [message for message in first.parts if isinstance(message, Accepted)]:
            frontend.resume(sink, Resume(stream=accepted.stream, request_id=accepted.request_id, received=[0] * 4))
        turns = 0
        while sum(len(d.token_ids) for part in sink.heard for d in part if isinstance(d, Delta)) < 64_000:
            await asyncio.sleep(0)
            turns += 1
        sent = [sum(len(d.token_ids) for d in part if isinstance(d, Delta)) for part in sink.heard]
        assert max(sent) <= TURN_TOKENS
        assert turns >= 64_000 // TURN_TOKENS
        await frontend.close()

    asyncio.run(body())


@pytest.mark.parametrize("features", [[], ["resume"], [*FEATURES]], ids=str)
@pytest.mark.parametrize("n", [1, 16])
def test_stalled_readers_stay_small(run, serving, cores, features, n):
    """Readers that never read, twenty alternatives to each token, with every feature and with none: each is paused,
    and takes less than 640 KiB of heap; for a moment more, as the core's output that is on its way is heap here."""

    async def stalled(house):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        host, port = house.address.split(":")
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (host, int(port)))
        request = generate(max_tokens=4000, logprobs=20, n=n, ignore_eos=True)
        await loop.sock_sendall(sock, bytes(pack((Hello(features=features), request))))
        return sock

    async def body():
        count = 6
        cores.free = False
        async with serving(cores=cores) as house:
            tracemalloc.start()
            socks = [await stalled(house) for _ in range(count)]
            await cores.until(lambda: len(cores.now.submits) == count)
            entry = TokenLogprobs(1, -1.0 / 3, list(range(100, 120)), [-1.0 / 3] * 20)
            cores.now.logprobs = lambda sequence, token_ids: None if not token_ids else [entry] * len(token_ids)
            cores.go_on()
            await cores.until(lambda: len(cores.now.aborts) == count)
            now, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert all(stream.paused for stream in house.frontend.streams)
            assert now < count * 640 * 1024
            assert peak < 1.1 * count * (1 << 20)
            for sock in socks:
                sock.close()

    run(body(), 60.0)


@pytest.mark.parametrize("features", [["resume"], ["credit", "resume"]], ids=str)
def test_a_paused_stream_keeps_what_its_reader_may_lack(run, serving, peering, cores, features):
    """Log-probabilities that the reader has consumed go, the others come again after a resume."""

    async def body():
        cores.free = False
        limits = {"stream_credit_bytes": 4096, "max_pending_bytes": 4000}
        hello = Hello(features=features)
        async with serving(cores=cores, **limits) as house, peering(house, hello) as peer:
            peer.say(generate(max_tokens=3000, logprobs=1, ignore_eos=True))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            for _ in range(400):
                cores.now.step()
                delta = await peer.hear()
                if "credit" in features:
                    peer.say(Credit(stream=1, bytes=delta_cost(delta)))
            (sample,) = stream.samples
            assert sample.logprob_bytes > 400 * 30
            if "credit" not in features:
                (connection,) = house.server._connections
                connection.pause_writing()
            cores.go_on()
            await cores.until(lambda: cores.now.aborts)
            assert stream.paused
            assert 4000 < sample.logprob_bytes < 4096 + 4000 + 1000
            async with peering(house, hello) as other:
                other.say(Resume(stream=5, request_id=name, received=[400]))
                assert isinstance(await other.hear(), Accepted)
                delta = await other.hear()
                assert delta.token_ids == answer(400 + len(delta.token_ids))[400:]
                assert [entry.token_id for entry in delta.logprobs] == delta.token_ids

    run(body())


def test_credit_that_grants_nothing_means_nothing_to_a_stream_that_has_ended(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores) as house, peering(house, CREDIT) as peer:
            peer.say(Credit(stream=5, bytes=0))
            peer.say(Ping(stream=8))
            assert await peer.hear() == Pong(stream=8)

    run(body())
