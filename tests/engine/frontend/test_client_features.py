"""The clients against a scripted server: features, limits of the welcome, keepalive, attached prompts."""

from __future__ import annotations

import asyncio
import types

import msgspec
import pytest
from fake_rpc_server import LIMITS, accepted, delta, final, scripted
from streams import tokens_of

from cierzo.engine.errors import (
    ConnectionLost,
    FrameTooLarge,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
)
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.frontend.generation import Inbox
from cierzo.engine.messages import (
    FEATURES,
    Attach,
    Cancel,
    CancelRequest,
    Credit,
    Deltas,
    Done,
    Drain,
    Failure,
    Generate,
    Health,
    Ping,
    Pong,
    Resume,
    Welcome,
)

ID = "ab" * 16


# --- versions and features -----------------------------------------------------------------------------------


def test_a_client_asks_for_the_features_that_it_was_told(run, serving):
    async def body():
        async with serving() as house:
            for features in ((), ("credit",), ["accounting", "resume"]):
                async with await Client.connect(house.address, features=features) as client:
                    assert client.welcome.features == sorted(features)
                    generation = client.generate(token_ids=[1], max_tokens=2)
                    assert len(await tokens_of(generation)) == 2
                    assert (generation.final.cost is not None) == ("accounting" in features)
                    assert (generation.request_id is not None) == ("resume" in features)
            with pytest.raises(InvalidRequest, match="'speed'") as caught:
                await Client.connect(house.address, features=["credit", "speed"])
            assert (caught.value.field, caught.value.value) == ("features", "speed")

    run(body())


def test_a_server_of_the_version_before_is_spoken_to_in_it(run):
    """It answers a hello of version 3 with its limit, 2, as the last release did."""
    hellos = []

    async def serve(reader, writer):
        splitter, heard = FrameSplitter(4096), []
        while not heard:
            heard = [msgspec.msgpack.decode(bytes(body)) for body in splitter.feed(await reader.read(4096))]
        hellos.append(heard[0])
        if heard[0]["version"] != 2:
            text = "the server speaks version 2, the client 3"
            writer.write(pack([Failure(stream=-1, code="version_mismatch", message=text, limit="2", value="3")]))
            writer.write_eof()
            await reader.read()
        else:
            limits = msgspec.structs.replace(LIMITS, max_attached_bytes=0, stream_credit_bytes=0, keepalive_s=0.0)
            writer.write(pack([Welcome(version=2, server="old", model="none", limits=limits)]))
            (body,) = splitter.feed(await reader.read(4096))
            request = msgspec.msgpack.decode(bytes(body))
            assert set(request) <= {
                "type",
                "stream",
                "token_ids",
                "sampling",
            }  # nothing that version 2 does not know
            writer.write(pack([delta(request["stream"], [65, 66]), final(request["stream"], 2)]))
            await reader.read()
        writer.close()

    async def body():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with await Client.connect(address, reconnect=True) as client:
                assert (client.welcome.version, client.welcome.features) == (2, [])
                generation = client.generate(token_ids=[1])
                with pytest.raises(InvalidRequest, match="feature resume"):
                    await generation.accepted()
                assert await tokens_of(generation) == [65, 66]
                for refused in (
                    lambda: client.resume(ID, [0]),
                    lambda: client.generate(text="", idempotency_key="k"),
                ):
                    with pytest.raises(InvalidRequest, match="feature resume") as caught:
                        refused()
                    assert (caught.value.field, caught.value.limit) == ("features", "resume")
        assert [(hello["version"], hello["features"]) for hello in hellos] == [(3, [*FEATURES]), (2, [])]

    run(body())


@pytest.mark.parametrize("granted", [(), *((feature,) for feature in FEATURES), FEATURES], ids=",".join)
def test_whatever_is_granted_a_generation_runs(run, granted):
    async def script(peer, number):
        request = await peer.hear(Generate)
        if "resume" in granted:
            peer.say(accepted(request.stream))
        deltas = [delta(request.stream, [token]) for token in range(65, 91)]
        peer.say(*([Deltas(deltas=deltas)] if "batches" in granted else deltas))
        peer.say(final(request.stream, 26))
        while (message := await peer.hear()) is not None:
            assert isinstance(message, Credit)
            assert "credit" in granted

    async def body():
        async with scripted(script, features=granted) as address, await Client.connect(address) as client:
            generation = client.generate(token_ids=[1])
            assert await tokens_of(generation) == [*range(65, 91)]
            assert generation.request_id == (ID if "resume" in granted else None)

    run(body())


# --- accepted ------------------------------------------------------------------------------------------------


def test_accepted_tells_id_seed_and_place(run):
    async def script(peer, number):
        first, second, third = [await peer.hear(Generate) for _ in range(3)]
        await peer.hear(Ping)
        peer.say(
            accepted(first.stream, queue_position=3),
            Failure(stream=second.stream, code="overloaded", message="full", retry=True, retry_after_s=2.5),
            final(third.stream),
        )
        await peer.hear(Cancel)

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            first, second, third = (client.generate(token_ids=[1]) for _ in range(3))
            assert (first.request_id, first.seed, first.queue_position) == (None, None, None)
            with pytest.raises(TimeoutError, match="the generation goes on"):
                await first.accepted(timeout_s=0.01)
            pinging = asyncio.create_task(client.ping())
            told = await first.accepted(timeout_s=10)
            assert (told.request_id, told.seed, told.queue_position, told.deadline_s) == (ID, 7, 3, 3600.0)
            assert (first.request_id, first.seed, first.queue_position) == (ID, 7, 3)
            assert await first.accepted(timeout_s=0) == told
            with pytest.raises(Overloaded) as refused:
                await second.accepted()
            assert refused.value.retry_after_s == 2.5
            with pytest.raises(ProtocolError, match="did not say that it was accepted"):
                await third.accepted()
            first.cancel()
            with pytest.raises(ConnectionLost):
                await pinging

    run(body())


def test_cancel_by_id_resume_by_hand_and_drain_undone(run):
    async def script(peer, number):
        asked = await peer.hear()
        assert (type(asked), asked.request_id) == (CancelRequest, ID)
        peer.say(Done(stream=asked.stream))
        asked = await peer.hear()
        peer.say(Failure(stream=asked.stream, code="not_found", message="no request has this id"))
        asked = await peer.hear()
        assert (type(asked), asked.undo) == (Drain, True)
        peer.say(Done(stream=asked.stream))
        asked = await peer.hear()
        assert (type(asked), asked.request_id, asked.received) == (Resume, ID, [1, 0])
        peer.say(accepted(asked.stream), delta(asked.stream, [66]), delta(asked.stream, [90], sample=1))
        peer.say(final(asked.stream, 2, samples=2))
        asked = await peer.hear(Resume)
        peer.say(Failure(stream=asked.stream, code="not_found", message="no request has this id"))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            await client.cancel_request(ID)
            with pytest.raises(NotFound):
                await client.cancel_request("00" * 16)
            await client.drain(undo=True)
            generation = client.resume(ID, received=[1, 0])
            got = [(part.sample, part.token_ids) async for part in generation]
            assert (got, generation.request_id) == ([(0, [66]), (1, [90])], ID)
            with pytest.raises(NotFound):
                await anext(client.resume(ID, iter([0])))

    run(body())


# --- the limits that welcome tells ----------------------------------------------------------------------------


def test_limits_of_the_welcome_are_refused_at_once(run):
    limits = msgspec.structs.replace(LIMITS, max_streams=2, max_samples=3, max_model_len=10)

    async def script(peer, number):
        first, second = [await peer.hear(Generate) for _ in range(2)]
        assert first.token_ids == [1] * 9
        peer.say(accepted(first.stream), final(first.stream))
        third = await peer.hear(Generate)
        peer.say(final(second.stream), final(third.stream))
        assert await peer.hear() is None  # the others were never sent

    async def body():
        async with scripted(script, limits=limits) as address, await Client.connect(address) as client:
            for fields, field, name, limit in [
                ({"token_ids": [1] * 10}, "token_ids", "max_model_len", "10"),
                ({"token_ids": [1] * 5, "output_token_ids": [1] * 5}, "token_ids", "max_model_len", "10"),
                ({"text": "a", "n": 4}, "sampling.n", "max_samples", "3"),
            ]:
                with pytest.raises(InvalidRequest, match=name) as caught:
                    client.generate(**fields)
                assert (caught.value.field, caught.value.limit) == (field, limit)
            first, second = client.generate(token_ids=[1] * 9), client.generate(text="a", n=3)
            with pytest.raises(Overloaded, match="max_streams is 2") as caught:
                client.generate(text="a")
            assert (caught.value.field, caught.value.limit, caught.value.value) == ("max_streams", "2", "3")
            assert await tokens_of(first) == []
            third = client.generate(text="a")  # there is room again
            assert await tokens_of(second) + await tokens_of(third) == []

    run(body())


# --- attached prompts -----------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y" * 3000}]


@pytest.mark.parametrize(
    ("field", "value"), [("text", "é" * 9000), ("token_ids", [70_000] * 3000), ("messages", TURNS)]
)
def test_a_prompt_longer_than_a_frame_is_attached(run, field, value):
    async def script(peer, number):
        data, parts = b"", 0
        while isinstance(message := await peer.hear(), Attach):
            assert len(pack([message])) - 4 <= LIMITS.max_frame_bytes
            assert message.stream == 1
            data, parts = data + message.data, parts + 1
        assert parts == -(-len(data) // (LIMITS.max_frame_bytes - 64)) > 1
        assert (message.stream, message.attached, getattr(message, field)) == (1, field, None)
        assert message.sampling.max_tokens == 3
        again = msgspec.convert({"type": "generate", "stream": 1, field: msgspec.msgpack.decode(data)}, Generate)
        direct = msgspec.convert({"type": "generate", "stream": 1, field: value}, Generate)
        assert again == direct
        peer.say(accepted(1), delta(1, [65]), final(1, 1))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            generation = client.generate(**{field: value}, max_tokens=3)
            assert await tokens_of(generation) == [65]

    run(body())


def test_what_cannot_even_be_attached_is_refused_before_anything_is_sent(run):
    async def script(peer, number):
        message = await peer.hear()
        assert isinstance(message, Generate)
        peer.say(final(message.stream))
        await peer.hear()

    most = LIMITS.max_attached_bytes

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            with pytest.raises(FrameTooLarge, match=f"max_attached_bytes {most}") as caught:
                client.generate(text="x" * (most - 2))  # with three bytes of length
            assert (caught.value.field, caught.value.value) == ("max_attached_bytes", str(most + 1))
            with pytest.raises(FrameTooLarge, match="max_frame_bytes") as caught:
                client.generate(text="x" * 9000, output_token_ids=[70_000] * 1000)
            assert caught.value.field == "max_frame_bytes"
            assert await tokens_of(client.generate(text="short")) == []
        async with scripted(script, features=()) as address, await Client.connect(address) as client:
            with pytest.raises(FrameTooLarge, match="max_frame_bytes"):
                client.generate(text="x" * 9000)
            assert await tokens_of(client.generate(text="short")) == []

    run(body())


# --- keepalive ------------------------------------------------------------------------------------------------


def test_pings_of_the_server_are_answered(run):
    async def script(peer, number):
        await peer.hear(Generate)
        peer.say(Ping(stream=12345))
        assert await peer.hear() == Pong(stream=12345)
        peer.say(final(1))
        await peer.hear()

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            assert await tokens_of(client.generate(token_ids=[1])) == []

    run(body())


class FakeLoop:
    """As much of an event loop as a link uses; its time passes when told."""

    def __init__(self):
        self.now, self.timers = 100.0, []
        self.create_future = asyncio.get_running_loop().create_future

    def time(self):
        return self.now

    def call_soon(self, call):
        self.call_at(self.now, call)

    def call_at(self, when, call):
        self.timers.append((when, call))
        return types.SimpleNamespace(cancel=lambda: self.timers.clear())

    def call_later(self, seconds, call):
        return self.call_at(self.now + seconds, call)

    def until(self, when):
        """Let time pass, and run what is due."""
        while self.timers and (due := min(self.timers, key=lambda timer: timer[0]))[0] <= when:
            self.timers.remove(due)
            self.now = due[0]
            due[1]()
        self.now = when


class FakeTransport:
    def __init__(self):
        self.sent, self.aborted = [], False

    def write(self, data):
        self.sent += [msgspec.msgpack.decode(bytes(body))["type"] for body in FrameSplitter(9999).feed(bytes(data))]

    def abort(self):
        self.aborted = True

    def is_closing(self):
        return self.aborted

    def pause_reading(self):
        pass

    resume_reading = pause_reading


def test_a_silent_server_is_pinged_and_then_given_up(run):
    async def body():
        loop, transport = FakeLoop(), FakeTransport()
        link = ClientLink(loop, "peer", max_unread_bytes=100)
        link.connection_made(transport)
        limits = msgspec.structs.replace(LIMITS, keepalive_s=20.0)
        link.data_received(bytes(pack([Welcome(version=3, server="", model="", limits=limits)])))
        loop.until(1000.0)
        assert (transport.sent, loop.timers) == (["hello"], [])  # nothing is awaited
        inbox = Inbox(link, Generate(stream=0), [0])
        link.open(inbox, Generate(stream=0, token_ids=[1]))
        loop.until(1010.0)
        link.data_received(bytes(pack([delta(1, [65])])))
        loop.until(1029.0)
        assert transport.sent == ["hello", "generate"]
        loop.until(1030.0)
        assert transport.sent[2:] == ["ping"]
        loop.until(1049.0)
        link.data_received(bytes(pack([Pong(stream=2)])))
        loop.until(1068.0)
        assert transport.sent[3:] == []
        link.data_received(bytes(pack([delta(1, [65])])))  # over the bound: the silence is the client's own
        assert not link._is_reading
        loop.until(1500.0)
        assert transport.sent[3:] == []
        link.consumed(inbox, inbox.held)
        loop.until(1520.0)
        assert (transport.sent[3:], transport.aborted) == (["ping"], False)
        loop.until(1539.0)
        assert not transport.aborted
        loop.until(1540.0)
        assert transport.aborted
        link.connection_lost(None)
        assert isinstance(inbox.error, ConnectionLost)
        assert (inbox.error.field, inbox.error.limit) == ("keepalive_s", "20.0")
        assert "silent for 40 s, and does not answer a ping" in inbox.error.message

    run(body())


def test_a_client_leaves_a_server_that_hangs(run):
    async def script(peer, number):
        while await peer.hear() is not None:
            pass

    async def body():
        async with (
            scripted(script) as address,
            await Client.connect(address, keepalive_s=0.02, reconnect=False) as client,
        ):
            for ask in (lambda: anext(client.generate(token_ids=[1])), client.health):
                with pytest.raises(ConnectionLost, match="does not answer a ping"):
                    await ask()

    run(body())


def test_the_servers_keepalive_is_taken_over_and_any_sign_of_life_counts(run):
    limits = msgspec.structs.replace(LIMITS, keepalive_s=0.1)

    async def script(peer, number):
        request = await peer.hear()
        for _ in range(30):
            peer.say(delta(request.stream, [65]))
            await asyncio.sleep(0.01)
        assert await peer.hear(Ping) is not None
        peer.say(Health(stream=99, state="ready", uptime_s=1.0), final(request.stream))
        assert await peer.hear() is None

    async def body():
        async with (
            scripted(script, limits=limits, features={"keepalive"}) as address,
            await Client.connect(address) as client,
        ):
            assert await tokens_of(client.generate(token_ids=[1])) == [65] * 30

    run(body())
