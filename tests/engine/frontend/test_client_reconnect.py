"""A client that mends lost connections, against a scripted server that knows the whole answers."""

from __future__ import annotations

import asyncio
import gc

import pytest
from fake_rpc_server import accepted, delta, final, scripted

from cierzo.engine.errors import ConnectionLost
from cierzo.engine.frontend.client import Client, Reconnect, SyncClient
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.messages import (
    Cancel,
    CancelRequest,
    Credit,
    Done,
    Failure,
    Generate,
    GetHealth,
    Health,
    Ping,
    Pong,
    Resume,
)

AT_ONCE = Reconnect(first_pause_s=0.0, longest_pause_s=0.0)
TEXT = "the quick brown fox jumps over the lazy dog"


async def text_of(generation):
    return "".join([delta.text async for delta in generation])


class Answers:
    """A server with orphans: each request's samples have their whole answer from the start.

    It loses each connection after `per_connection` deltas, but the last one.
    """

    def __init__(self, texts=(TEXT,), per_connection=7, losses=5):
        self.texts = texts
        self.per_connection = per_connection
        self.losses = losses
        self.heard = []
        self.names = {}

    async def __call__(self, peer, number):
        sent = 0
        while (message := await peer.hear()) is not None:
            if isinstance(message, Credit):
                continue
            self.heard.append(message)
            if isinstance(message, Generate):
                name = self.names.setdefault(message.idempotency_key, f"{len(self.names):032x}")
                offsets = [0] * message.sampling.n
            elif isinstance(message, Resume):
                name, offsets = message.request_id, list(message.received)
            else:
                assert isinstance(message, Ping)
                peer.say(Pong(stream=message.stream))
                continue
            peer.say(accepted(message.stream, name))
            while any(at < len(text) for at, text in zip(offsets, self.texts, strict=True)):
                for sample, text in enumerate(self.texts):
                    if offsets[sample] < len(text):
                        peer.say(delta(message.stream, [ord(text[offsets[sample]])], sample))
                        offsets[sample] += 1
                        sent += 1
                    if sent >= self.per_connection and number < self.losses:
                        await peer.close() if number % 2 else peer.drop()
                        return
            peer.say(final(message.stream, max(map(len, self.texts)), samples=len(self.texts)))


def test_a_generation_goes_on_over_lost_connections(run):
    async def body():
        server = Answers()
        few = Reconnect(max_attempts=2, first_pause_s=0.0)  # each time, and not of all five together
        async with scripted(server) as address, await Client.connect(address, reconnect=few) as client:
            generation = client.generate(token_ids=[1], max_tokens=99)
            assert await text_of(generation) == TEXT
            assert generation.final.samples[0].output_tokens == len(TEXT)
            assert generation.request_id == "0" * 32
        first, *others = server.heard
        assert len(first.idempotency_key) == 32
        assert [type(other) for other in others] == [Resume] * 5
        offsets = [other.received[0] for other in others]
        assert offsets == sorted(offsets)

    run(body())


def test_each_sample_goes_on_at_its_own_offset(run):
    texts = (TEXT, "short", TEXT[::-1])

    async def body():
        server = Answers(texts)
        async with scripted(server) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            got = ["", "", ""]
            async for part in client.generate(token_ids=[1], n=3):
                assert len(part.token_ids) == len(part.text) == 1
                got[part.sample] += part.text
            assert got == [*texts]

    run(body())


def test_what_was_not_taken_is_asked_for_again(run):
    """An unread generation that loses its connection again and again holds no more than one connection's credit."""

    async def body():
        server = Answers()
        async with scripted(server) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generation = client.generate(token_ids=[1])
            while not generation._inbox.ended:
                assert generation._inbox.held == sum(map(delta_cost, generation._inbox.deltas))
                await asyncio.sleep(0)
            assert [other.received for other in server.heard[1:]] == [[0]] * 5
            assert await text_of(generation) == TEXT

    run(body())


def test_the_blocking_client_mends_too(scripting):
    server = scripting(Answers())
    with SyncClient(server.address, reconnect=AT_ONCE) as client:
        assert "".join(part.text for part in client.generate(token_ids=[1])) == TEXT
    with SyncClient(server.address) as client:
        generation = client.resume("0" * 32, [4])
        assert "".join(part.text for part in generation) == TEXT[4:]


def test_many_generations_of_one_connection(run):
    async def body():
        server = Answers(per_connection=500, losses=3)
        async with scripted(server) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generations = [client.generate(token_ids=[index]) for index in range(40)]
            assert await asyncio.gather(*map(text_of, generations)) == [TEXT] * 40
            assert len({generation.request_id for generation in generations}) == 40

    run(body())


def test_text_without_tokens_is_not_delivered_twice(run):
    """The text that a cancelled sample held back comes after its last token: no offset says whether it came."""

    async def script(peer, number):
        if number == 0:
            stream = (await peer.hear(Generate)).stream
            peer.say(accepted(stream), delta(stream, [65]), delta(stream, [], text="held"))
            await peer.hear(Ping)
            peer.drop()
        else:
            resume = await peer.hear(Resume)
            assert resume.received == [1]
            peer.say(accepted(resume.stream), delta(resume.stream, [], text="held"))
            peer.say(final(resume.stream, reason="deadline"))
            await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generation = client.generate(token_ids=[1])
            assert [(await anext(generation)).text for _ in range(2)] == ["A", "held"]
            with pytest.raises(ConnectionLost):
                await client.ping()  # what waits for an answer is not sent again
            assert await text_of(generation) == ""
            assert generation.final.samples[0].finish_reason == "deadline"

    run(body())


def test_what_was_not_accepted_is_sent_again_under_its_key(run):
    heard = []

    async def script(peer, number):
        while (message := await peer.hear()) is not None:
            heard.append(message)
            if number == 0 and len(heard) == 2:
                peer.drop()
            elif number == 1:
                peer.say(accepted(message.stream), final(message.stream))

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            own = client.generate(token_ids=[1], idempotency_key="mine")
            other = client.generate(token_ids=[2])
            assert await text_of(own) + await text_of(other) == ""
        first, second, *again = heard
        assert (first.idempotency_key, len(second.idempotency_key)) == ("mine", 32)
        assert [message.idempotency_key for message in again] == ["mine", second.idempotency_key]
        assert [message.token_ids for message in again] == [[1], [2]]

    run(body())


def test_without_mending_no_key_is_made(run):
    async def script(peer, number):
        assert number == 0
        assert (await peer.hear()).idempotency_key is None
        peer.drop()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=False) as client:
            with pytest.raises(ConnectionLost):
                await anext(client.generate(token_ids=[1]))
            for ask in (client.ping, lambda: anext(client.generate(token_ids=[1]))):
                with pytest.raises(ConnectionLost):
                    await ask()

    run(body())


@pytest.mark.parametrize("ask", ["health", "generate"])
def test_without_the_feature_requests_end_and_the_connection_is_mended(run, ask):
    async def script(peer, number):
        message = await peer.hear()
        if number == 0:
            assert message.idempotency_key is None
            peer.drop()
            return
        if isinstance(message, GetHealth):
            peer.say(Health(stream=message.stream, state="ready", uptime_s=1.0))
            message = await peer.hear(Generate)
        peer.say(final(message.stream))
        await peer.hear()

    async def body():
        async with (
            scripted(script, features=()) as address,
            await Client.connect(address, reconnect=AT_ONCE) as client,
        ):
            with pytest.raises(ConnectionLost):
                await anext(client.generate(token_ids=[1]))
            if ask == "health":
                assert (await client.health()).state == "ready"
            assert await text_of(client.generate(token_ids=[1])) == ""

    run(body())


def test_a_request_made_while_there_is_no_connection_waits_for_one(run):
    lost = asyncio.Event()

    async def script(peer, number):
        if number == 0:
            await peer.hear()
            peer.drop()
        else:
            first = await peer.hear()
            second = await peer.hear()
            peer.say(accepted(first.stream), final(first.stream), accepted(second.stream), final(second.stream))
            await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            first = client.generate(token_ids=[1])
            client._session.link.closed.add_done_callback(lambda _: lost.set())
            await lost.wait()
            second = client.generate(token_ids=[2])
            assert await text_of(first) + await text_of(second) == ""

    run(body())


def test_a_request_that_the_server_has_forgotten_ends_as_a_lost_connection(run):
    async def script(peer, number):
        message = await peer.hear()
        if number == 0:
            peer.say(accepted(message.stream), delta(message.stream, [65]))
            await peer.hear()
            peer.drop()
        else:
            peer.say(Failure(stream=message.stream, code="not_found", message="no request has this id"))
            await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generation = client.generate(token_ids=[1])
            assert (await anext(generation)).text == "A"
            with pytest.raises(ConnectionLost):
                await client.ping()
            with pytest.raises(ConnectionLost, match="the server knows no more of it: no request has this id"):
                await anext(generation)

    run(body())


@pytest.mark.parametrize("policy", [{"max_attempts": 3}, {"max_attempts": 10**9, "within_s": 0.2}])
def test_attempts_are_bounded_and_count_until_something_comes(run, policy):
    connections = []

    async def script(peer, number):
        connections.append(number)
        if (message := await peer.hear()) is None:
            return  # the time was over
        peer.say(accepted(message.stream))  # which is not yet an answer
        if number == 0:
            peer.say(delta(message.stream, [65]))
            await peer.hear()
        peer.drop()

    async def body():
        mending = Reconnect(**{"first_pause_s": 0.0, "longest_pause_s": 0.0} | policy)
        async with scripted(script) as address, await Client.connect(address, reconnect=mending) as client:
            generation = client.generate(token_ids=[1])
            assert (await anext(generation)).text == "A"
            with pytest.raises(ConnectionLost):
                await client.ping()
            with pytest.raises(ConnectionLost, match=r"tried to connect again \d+ times"):
                await anext(generation)
            if "within_s" not in policy:
                assert connections == [0, 1, 2, 3]

    run(body())


def test_a_server_that_welcomed_us_once_is_not_asked_what_it_is(run):
    """It stops while the client comes back: its socket takes connections, and nobody says welcome."""

    async def body():
        ports = []
        async with scripted(lambda peer, number: peer.hear(Ping)) as address:
            ports.append(int(address.rpartition(":")[2]))
            client = await Client.connect(address, reconnect=Reconnect(max_attempts=1, first_pause_s=0.0))
            client._session.link.tell(Ping)
            await client._session.link.closed

        def close(reader, writer):
            writer.close()

        async with await asyncio.start_server(close, "127.0.0.1", ports[0]):
            with pytest.raises(ConnectionLost, match=r"was lost: .* before it said welcome") as caught:
                await client.health()
            assert "is it a cierzo server?" not in str(caught.value)
            await client.close()

    run(body())


def test_where_no_server_is_left_attempts_end(run):
    async def script(peer, number):
        await peer.hear()

    async def body():
        async with scripted(script) as address:
            client = await Client.connect(address, reconnect=Reconnect(max_attempts=2, first_pause_s=0.0))
            generation = client.generate(token_ids=[1])
        with pytest.raises(
            ConnectionLost, match=r"connection was lost: no server .* \(tried to connect again 2 times\)"
        ):
            await anext(generation)
        with pytest.raises(ConnectionLost, match=r"tried to connect again 2 times"):
            await client.health()  # which has tried anew
        await client.close()

    run(body())


def test_what_was_cancelled_or_forgotten_meanwhile_is_cancelled_at_the_server(run):
    heard = []
    opened = asyncio.Event()

    async def script(peer, number):
        if number == 0:
            for stream in (1, 2, 3):
                await peer.hear(Generate)
                peer.say(accepted(stream, f"{stream:032x}"))
            await opened.wait()
            peer.drop()
            return
        for _ in range(4):
            heard.append(message := await peer.hear())
            if isinstance(message, CancelRequest):
                peer.say(Done(stream=message.stream))
            if isinstance(message, Cancel):
                peer.say(final(message.stream, reason="cancelled"))
        peer.say(final(heard[-1].stream))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            cancelled, forgotten, kept = generations = [client.generate(token_ids=[1]) for _ in range(3)]
            for generation in generations:
                await generation.accepted()
            lost = client._session.link.closed
            opened.set()
            await lost
            cancelled.cancel()
            del forgotten, generations, generation
            gc.collect()
            assert await text_of(cancelled) + await text_of(kept) == ""
            assert cancelled.final.samples[0].finish_reason == "cancelled"
        kinds = [(type(message), getattr(message, "request_id", "")) for message in heard]
        assert kinds == [
            (Resume, f"{1:032x}"),
            (Cancel, ""),
            (CancelRequest, f"{2:032x}"),
            (Resume, f"{3:032x}"),
        ] or (kinds == [(Resume, f"{1:032x}"), (CancelRequest, f"{2:032x}"), (Resume, f"{3:032x}"), (Cancel, "")])

    run(body())


def test_closing_cancels_what_would_go_on_without_its_connection(run):
    heard = []

    async def script(peer, number):
        while (message := await peer.hear()) is not None:
            heard.append(message)

    async def body():
        async with scripted(script) as address:
            client = await Client.connect(address, reconnect=AT_ONCE)
            generation = client.generate(token_ids=[1])
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(ConnectionLost, match="this client is closed"):
                await anext(generation)
            with pytest.raises(ConnectionLost, match="this client is closed"):
                await client.ping()
            with pytest.raises(ConnectionLost, match="this client is closed"):
                await anext(client.generate(token_ids=[1]))
        assert [type(message) for message in heard] == [Generate, Cancel]

    run(body())


def test_closing_while_the_connection_is_mended(run):
    async def script(peer, number):
        await peer.hear()
        peer.drop()

    async def body():
        slow = Reconnect(first_pause_s=1000.0, longest_pause_s=1000.0, within_s=5000.0)
        async with scripted(script) as address:
            client = await Client.connect(address, reconnect=slow)
            generation = client.generate(token_ids=[1])
            await client._session.link.closed
            waiting = asyncio.create_task(client.health())
            await asyncio.sleep(0)
            await client.close()
            for ask in (lambda: anext(generation), lambda: waiting):
                with pytest.raises(ConnectionLost, match="this client is closed"):
                    await ask()

    run(body())
