"""Connections that a server refuses, at the beginning or later, and what a client does at the next request."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from fake_rpc_server import LIMITS, Peer, accepted, delta, final, scripted

from cierzo.engine.errors import ConnectionLost, ProtocolError, Unauthorized
from cierzo.engine.frontend.client import Client, Reconnect
from cierzo.engine.messages import Failure, Generate, Hello, Ping, Pong, Welcome

AT_ONCE = Reconnect(first_pause_s=0.0, longest_pause_s=0.0)
WELCOME = Welcome(version=3, server="x", model="m", limits=LIMITS, features=["resume"])
REFUSED = Failure(stream=-1, code="unauthorized", message="no")


async def text_of(generation):
    return "".join([delta.text async for delta in generation])


@pytest.mark.parametrize(("code", "error"), [("overloaded", None), ("protocol_error", ProtocolError)])
def test_a_connection_that_the_server_refuses(run, code, error):
    async def script(peer, number):
        message = await peer.hear()
        if number == 0:
            peer.say(Failure(stream=-1, code=code, message="no"))
        else:
            peer.say(accepted(message.stream), final(message.stream))
            await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generation = client.generate(token_ids=[1])
            if error is not None:
                with pytest.raises(error):
                    await anext(generation)
                generation = client.generate(token_ids=[1])
            assert await text_of(generation) == ""

    run(body())


class Guarded:
    """A server that takes one key at a time: says it to new connections, and ends those of another key."""

    def __init__(self, key="good", words=()):
        self.key = key
        self.words = words  # before those of a refusal
        self.attempts = 0
        self.peers = []

    async def __call__(self, reader, writer):
        peer = Peer(reader, writer)
        hello = await peer.hear(Hello)
        self.attempts += 1
        if hello.key != self.key:
            peer.say(*self.words, REFUSED)
        else:
            self.peers.append(peer)
            peer.say(WELCOME)
            while (message := await peer.hear((Generate, Ping))) is not None:
                if isinstance(message, Ping):
                    peer.say(Pong(stream=message.stream))
                else:
                    peer.say(accepted(message.stream), delta(message.stream, [65]), final(message.stream, 1))
        await peer.close()

    async def take_back(self):
        """Have the key be wrong from now on."""
        self.key = ""
        for peer in self.peers:
            peer.say(REFUSED)
            await peer.close()


@asynccontextmanager
async def listening(serve):
    tasks = []

    async def serving(reader, writer):
        tasks.append(asyncio.current_task())
        await serve(reader, writer)

    async with await asyncio.start_server(serving, "127.0.0.1", 0) as listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("words", [(), (WELCOME,)])
def test_a_key_that_counts_again_is_taken_again(run, words):
    """Each call and each request makes one attempt, and hears at once that it is refused again."""

    async def body():
        server, slow = (
            Guarded(words=words),
            Reconnect(first_pause_s=3600.0, longest_pause_s=3600.0, within_s=7200.0),
        )
        async with (
            listening(server) as address,
            await Client.connect(address, key="good", reconnect=slow) as client,
        ):
            await client.ping()
            await server.take_back()
            with pytest.raises(Unauthorized):
                await client.ping()  # on the connection that ends, or on none
            attempts = server.attempts
            for _ in range(3):
                with pytest.raises(Unauthorized):
                    await client.ping()
                attempts += 1
                assert server.attempts == attempts
            with pytest.raises(Unauthorized):
                await anext(client.generate(token_ids=[1]))
            assert server.attempts == attempts + 1
            server.key = "good"
            assert await text_of(client.generate(token_ids=[1])) == "A"
            await client.ping()
            assert server.attempts == attempts + 2

    run(body())


def test_an_address_that_refused_the_key_is_asked_again_beside_the_other_one(run):
    async def body():
        one, two = Guarded(), Guarded()
        async with (
            listening(one) as first,
            listening(two) as second,
            await Client.connect([first, second], key="good", reconnect=AT_ONCE) as client,
        ):
            await one.take_back()
            await client.ping(second)
            one.key = "good"
            while one.attempts < 2:
                assert await text_of(client.generate(token_ids=[1])) == "A"
            await client.ping(first)

    run(body())


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_connection_that_ends_as_it_is_welcomed(run, is_refused):
    async def serve(reader, writer):
        peer = Peer(reader, writer)
        await peer.hear(Hello)
        peer.say(WELCOME, *[REFUSED] * is_refused)
        await peer.close()

    async def body():
        async with listening(serve) as address:
            for connections in (1, 2):
                with pytest.raises(Unauthorized if is_refused else ConnectionLost):
                    async with await Client.connect(address, connections=connections, reconnect=AT_ONCE) as client:
                        await client.ping()

    run(body())


def test_a_connection_that_ended_as_it_was_welcomed_is_made_again_beside_the_other_one(run):
    server = Guarded()

    async def serve(reader, writer):
        if server.attempts:
            await server(reader, writer)
            return
        server.attempts, peer = 1, Peer(reader, writer)
        await peer.hear(Hello)
        peer.say(WELCOME)
        await peer.close()

    async def body():
        async with (
            listening(serve) as address,
            await Client.connect(address, key="good", connections=2, reconnect=AT_ONCE) as client,
        ):
            while server.attempts < 3:
                assert await text_of(client.generate(token_ids=[1])) == "A"

    run(body())
