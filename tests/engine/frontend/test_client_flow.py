"""Flow control of the clients against a scripted server: what nobody takes stays there, but for a bounded part."""

from __future__ import annotations

import asyncio
import gc
import itertools

import msgspec
import pytest
from fake_rpc_server import LIMITS, accepted, delta, final, scripted
from streams import tokens_of, until

from cierzo.engine.frontend import client_link
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.generation import Generation, Inbox
from cierzo.engine.messages import (
    Cancel,
    Credit,
    Generate,
    TokenLogprobs,
)

CREDIT = LIMITS.stream_credit_bytes
ID = "ab" * 16


def test_the_cost_of_a_delta():
    assert delta_cost(delta(1, [])) == 64
    assert delta_cost(delta(1, [5, 6, 7], text="aé€")) == 64 + 3 * 8 + 6
    entries = [TokenLogprobs(5, -1.0, [5, 6], [-1.0, -2.0]), TokenLogprobs(6, -1.0, [], [])]
    assert delta_cost(msgspec.structs.replace(delta(1, [5, 6], text=""), logprobs=entries)) == 64 + 16 + 2 * 32 + 32


def flood(credit, tokens, stats):
    """A script that sends one-token deltas as far as the client's credit goes; `stats` is what it has to spare."""

    async def script(peer, number):
        request = await peer.hear(Generate)
        stream, outstanding = request.stream, 0
        peer.say(accepted(stream))
        for token in tokens:
            part = delta(stream, [token])
            while outstanding + delta_cost(part) > credit:
                stats["stopped"].set()
                back = await peer.hear(Credit)
                assert back.stream == stream
                assert back.bytes >= CREDIT // 4  # not for each delta
                outstanding -= back.bytes
                assert outstanding >= 0
            outstanding += delta_cost(part)
            peer.say(part)
            stats["sent"] += 1
        peer.say(final(stream, len(tokens)))
        await peer.hear()

    return script


def test_an_unread_generation_holds_at_most_its_credit(run):
    tokens = [65 + number % 26 for number in range(1000)]

    async def body():
        stats = {"sent": 0, "stopped": asyncio.Event()}
        async with (
            scripted(flood(CREDIT, tokens, stats)) as address,
            await Client.connect(address) as client,
        ):
            generation = client.generate(token_ids=[1])
            await stats["stopped"].wait()
            await until(lambda: len(generation._inbox.deltas) == stats["sent"])
            assert generation._inbox.held <= CREDIT
            assert stats["sent"] == CREDIT // 73
            got = [await anext(generation) for _ in range(CREDIT // 73 // 4 - 1)]
            assert generation._inbox.held + sum(map(delta_cost, got)) <= CREDIT  # no credit for so little
            rest = await tokens_of(generation)
            assert [token for part in got for token in part.token_ids] + rest == tokens

    run(body())


def test_a_cancelled_and_a_forgotten_generation_give_their_credit_back(run):
    """The server may have to send what was generated before, and then the final record."""

    async def script(peer, number):
        left, kept = [await peer.hear(Generate) for _ in range(2)]
        for stream in (left.stream, kept.stream):
            peer.say(accepted(stream), *(delta(stream, [65]) for _ in range(CREDIT // 73)))
        credited, asked = 0, None
        while credited < CREDIT - CREDIT // 4 or asked is None:
            message = await peer.hear()
            if message.stream == kept.stream:
                continue
            credited += message.bytes if isinstance(message, Credit) else 0
            asked = message if isinstance(message, Cancel) else asked
        peer.say(*(delta(left.stream, [65]) for _ in range(30)))
        while (await peer.hear(Credit)).stream != left.stream:
            pass
        peer.say(final(left.stream, reason="cancelled"), final(kept.stream))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            left, kept = client.generate(token_ids=[1]), client.generate(token_ids=[1])
            await until(lambda: len(kept._inbox.deltas) == CREDIT // 73)
            del left
            gc.collect()
            assert await tokens_of(kept) == [65] * (CREDIT // 73)

    run(body())


def test_a_consumer_who_takes_little_gives_it_back_each_time(run, monkeypatch):
    monkeypatch.setattr(client_link, "CREDIT_S", 0.01)

    async def script(peer, number):
        stream = (await peer.hear(Generate)).stream
        for token in (65, 66, 67):
            part = delta(stream, [token])
            peer.say(part)
            assert await peer.hear(Credit) == Credit(stream=stream, bytes=delta_cost(part))
        peer.say(final(stream, 3))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            assert await tokens_of(client.generate(token_ids=[1])) == [65, 66, 67]

    run(body())


@pytest.mark.parametrize("is_lost", [True, False])
def test_what_batches_hold_is_given_back_once(run, is_lost):
    """In any order of consumption, and also if the connection was lost in between."""

    async def body():
        link = ClientLink(asyncio.get_running_loop(), "peer")
        inbox = Inbox(link, None, [])
        inbox.stream = inbox.settles_at = 1 << 40  # credit gathers
        link._inboxes[inbox.stream] = inbox
        one = delta(inbox.stream, [65])
        generation, cost = Generation(inbox), delta_cost(one)
        link._take([one, one])
        _, first = await generation.take_batch()
        if is_lost:
            inbox.rewind()
        link._take([one, one, one])
        if not is_lost:
            _, second = await generation.take_batch()
            link.consumed(inbox, second)
            assert (second, inbox.held) == (3 * cost, 2 * cost)
            link._take([one])
        link.consumed(inbox, first)
        assert [len((await anext(generation)).token_ids) for _ in range(3 if is_lost else 1)]
        sent = 3 if is_lost else 6
        assert (inbox.unsettled, inbox.held) == (sent * cost, 0)
        link.connection_lost(None)

    run(body())


def bounded(monkeypatch, bytes_):
    """Let links without credit hold this much."""
    defaults = ClientLink.__init__.__kwdefaults__ | {"max_unread_bytes": bytes_}
    monkeypatch.setattr(ClientLink.__init__, "__kwdefaults__", defaults)


def test_without_credit_reading_stops_while_nobody_consumes(run, monkeypatch):
    bound, per_write = 20_000, 100
    monkeypatch.setattr(
        ClientLink.__init__, "__kwdefaults__", ClientLink.__init__.__kwdefaults__ | {"max_unread_bytes": bound}
    )
    blocked = asyncio.Event()
    number_of_writes = 2000

    async def script(peer, number):
        request = await peer.hear(Generate)
        sent = 0
        for sent in range(number_of_writes):
            peer.say(*(delta(request.stream, [65 + sent % 26]) for _ in range(per_write)))
            if peer.is_stuck():
                blocked.set()
            await peer.flushed()
        peer.say(final(request.stream, number_of_writes * per_write))
        await peer.hear()

    async def body():
        async with scripted(script, features=()) as address, await Client.connect(address) as client:
            generation = client.generate(token_ids=[1])
            await blocked.wait()
            link = client._session.link
            await until(lambda: not link._is_reading)
            held = generation._inbox.held
            assert bound < held < bound + 256 * 1024 * 73 // 38  # what one more read of the loop can hold
            for _ in range(100):
                await asyncio.sleep(0)
            assert generation._inbox.held == held
            expected = itertools.chain.from_iterable([65 + n % 26] * per_write for n in range(number_of_writes))
            async for part in generation:
                assert link._unread_bytes == generation._inbox.held < bound + 256 * 1024 * 73 // 38
                assert part.token_ids == [next(expected)]
            assert next(expected, None) is None
            assert (link._unread_bytes, link._is_reading) == (0, True)

    run(body())


def test_what_is_dropped_unread_does_not_stop_the_reading_of_others(run, monkeypatch):
    monkeypatch.setattr(
        ClientLink.__init__, "__kwdefaults__", ClientLink.__init__.__kwdefaults__ | {"max_unread_bytes": 5000}
    )

    async def script(peer, number):
        for _ in range(5):
            request = await peer.hear(Generate)
            peer.say(*(delta(request.stream, [65]) for _ in range(60)), final(request.stream, 60))
        await peer.hear()

    async def body():
        async with scripted(script, features=()) as address, await Client.connect(address) as client:
            for _ in range(4):
                generation = client.generate(token_ids=[1])
                inbox = generation._inbox
                await until(lambda inbox=inbox: inbox.ended)
                del generation, inbox
                gc.collect()
            assert await tokens_of(client.generate(token_ids=[1])) == [65] * 60
            assert client._session.link._unread_bytes == 0

    run(body())


def test_the_blocking_client_holds_at_most_its_credit(scripting):
    tokens = [65 + number % 26 for number in range(1000)]
    stats = {"sent": 0, "stopped": asyncio.Event()}
    server = scripting(flood(CREDIT, tokens, stats))
    with SyncClient(server.address) as client:
        generation = client.generate(token_ids=[1])
        first = next(generation)
        server.wait(stats["stopped"].wait)
        assert generation.request_id == generation.accepted(timeout_s=10).request_id == ID
        assert (generation.seed, generation.queue_position) == (7, 0)
        assert stats["sent"] <= CREDIT // 73  # of a batch that waits in the caller's thread nothing is given back
        assert [first.token_ids[0], *(token for part in generation for token in part.token_ids)] == tokens
