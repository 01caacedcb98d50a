"""Clients against a whole front end behind a network that loses connections: the answers are those of an unbroken
one. And prompts that are attached, output that nobody takes."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import pytest
from streams import by_sample, tokens_of

from cierzo.engine.errors import ConnectionLost, KeyReused, NotFound
from cierzo.engine.frontend.client import Client, Reconnect

AT_ONCE = Reconnect(max_attempts=50, first_pause_s=0.0, longest_pause_s=0.0)


class Network:
    """A way to a server that loses each connection after `cut()` bytes of its answers (None: never)."""

    def __init__(self, address, cut):
        self.host, self.port = address.split(":")
        self.cut = cut
        self.lost = 0

    async def carry(self, reader, writer):
        upstream_reader, upstream_writer = await asyncio.open_connection(self.host, int(self.port))
        left = self.cut()

        async def forward():
            while data := await reader.read(65536):
                upstream_writer.write(data)
            upstream_writer.write_eof()

        forwarding = asyncio.create_task(forward())
        try:
            while data := await upstream_reader.read(4096 if left is None else min(left, 4096)):
                writer.write(data)
                left = None if left is None else left - len(data)
                if left == 0:
                    self.lost += 1
                    break
        finally:
            forwarding.cancel()
            writer.transport.abort() if left == 0 and self.lost % 2 else writer.close()
            upstream_writer.close()
            await asyncio.gather(forwarding, return_exceptions=True)


@asynccontextmanager
async def network(address, cut):
    """The network, and the address of its near end."""
    way, tasks = Network(address, cut), []

    async def carry(reader, writer):
        tasks.append(asyncio.current_task())
        await way.carry(reader, writer)

    async with await asyncio.start_server(carry, "127.0.0.1", 0) as server:
        yield way, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(5))
def test_answers_over_a_network_that_loses_connections(run, serving, seed):
    draw = random.Random(seed)

    def cut():
        return draw.randrange(300, 3000) if way[0].lost < 12 else None

    way = [None]

    async def body():
        async with (
            serving() as house,
            network(house.address, cut) as (way[0], near),
            await Client.connect(house.address) as direct,
            await Client.connect(near, reconnect=AT_ONCE) as client,
        ):

            async def one(index):
                request = {"token_ids": [index, seed], "max_tokens": draw.randrange(1, 300), "seed": index}
                request |= {"n": draw.randrange(1, 4), "stop": ["zzz"] if index % 2 else []}
                expected = (await direct.complete(**request)).samples
                generation = client.generate(**request)
                tokens, texts = await by_sample(generation)
                assert tokens == {sample.sample: sample.token_ids for sample in expected}
                assert texts == {sample.sample: sample.text for sample in expected}
                assert generation.final.samples[0].finish_reason == expected[0].finish_reason

            await asyncio.gather(*map(one, range(12)))
            assert way[0].lost == 12
            assert len(house.frontend.streams) == 0
            assert house.frontend.counters.accepted == 24  # none was generated twice

    run(body(), 60.0)


def test_resume_and_cancel_from_another_client(run, serving, cores):
    cores.free = False

    async def body():
        async with (
            serving(cores=cores) as house,
            await Client.connect(house.address) as first,
            await Client.connect(house.address) as second,
        ):
            generation = first.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            request_id = (await generation.accepted(timeout_s=10)).request_id
            assert (generation.seed, generation.queue_position) == (4, 0)
            cores.now.step()
            assert (await anext(generation)).token_ids == [10]
            resumed = second.resume(request_id, [1])
            assert (await resumed.accepted(timeout_s=10)).seed == 4
            cores.now.step()
            assert (await anext(resumed)).token_ids == [17]
            await first.cancel_request(request_id)
            assert [delta async for delta in resumed] == []
            assert resumed.final.samples[0].finish_reason == "cancelled"
            for ask in (lambda: first.cancel_request("00" * 16), lambda: anext(first.resume("00" * 16, [0]))):
                with pytest.raises(NotFound):
                    await ask()

    run(body())


def test_a_key_of_the_caller(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            request = {"token_ids": [1], "max_tokens": 5, "idempotency_key": "mine"}
            first, second = [await by_sample(client.generate(**request)) for _ in range(2)]
            assert first == second
            assert len(cores.now.submits) == 1
            with pytest.raises(KeyReused):
                await anext(client.generate(**request | {"token_ids": [2]}))

    run(body())


def test_a_client_that_closes_leaves_no_orphan(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            client = await Client.connect(house.address, reconnect=True)
            generation = client.generate(token_ids=[1], max_tokens=100)
            await generation.accepted()
            await client.close()
            with pytest.raises(ConnectionLost):
                await anext(generation)
            await cores.until(lambda: cores.now.aborts)
            assert not cores.now.running

    run(body())


@pytest.mark.parametrize(
    "prompt", [{"text": "abc" * 1000}, {"token_ids": [97, 98, 99] * 1000}], ids=["text", "tokens"]
)
def test_an_attached_prompt_is_the_prompt(run, serving, cores, prompt):
    async def body():
        async with (
            serving(cores=cores, max_frame_bytes=1024) as house,
            await Client.connect(house.address) as client,
        ):
            await client.complete(**prompt, max_tokens=1)
            (submit,) = cores.now.submits
            assert submit.prompt_token_ids[-3000:] == [97, 98, 99] * 1000

    run(body())


def test_what_nobody_takes_stays_at_the_server(run, serving, cores):
    async def body():
        async with (
            serving(cores=cores, stream_credit_bytes=4096) as house,
            await Client.connect(house.address) as client,
        ):
            unread = client.generate(token_ids=[1], max_tokens=3000, seed=0)
            other = client.generate(token_ids=[2], max_tokens=3000, seed=0)
            assert await tokens_of(other) == [(2 + 7 * place) % 256 for place in range(3000)]
            one_delta = 64 + 4096 * 9  # the last one may exceed the credit, and is merged
            assert 0 < unread._inbox.held <= 4096 + one_delta
            assert await tokens_of(unread) == [(1 + 7 * place) % 256 for place in range(3000)]

    run(body())
