"""The clients against a scripted server: features, limits of the welcome, credit, keepalive, attached prompts."""

from __future__ import annotations

import asyncio
import gc
import itertools

import msgspec
import pytest
from fake_rpc_server import LIMITS, accepted, delta, final, scripted

from cierzo.engine.errors import (
    ConnectionLost,
    FrameTooLarge,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
)
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.messages import (
    FEATURES,
    Attach,
    Cancel,
    CancelRequest,
    Credit,
    Done,
    Drain,
    Failure,
    Generate,
    Health,
    Ping,
    Pong,
    Resume,
    TokenLogprobs,
    Welcome,
    delta_cost,
)

CREDIT = LIMITS.stream_credit_bytes
ID = "ab" * 16


async def tokens_of(generation):
    return [token async for delta in generation for token in delta.token_ids]


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_the_cost_of_a_delta():
    assert delta_cost(delta(1, [])) == 64
    assert delta_cost(delta(1, [5, 6, 7], text="aé€")) == 64 + 3 * 8 + 6
    entries = [TokenLogprobs(5, -1.0, [5, 6], [-1.0, -2.0]), TokenLogprobs(6, -1.0, [], [])]
    assert delta_cost(msgspec.structs.replace(delta(1, [5, 6], text=""), logprobs=entries)) == 64 + 16 + 2 * 32 + 32


# --- versions and features -----------------------------------------------------------------------------------


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
        for token in range(65, 91):
            peer.say(delta(request.stream, [token]))
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


# --- flow control ---------------------------------------------------------------------------------------------


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


def test_a_silent_server_is_pinged_and_then_given_up(run):
    heard = []

    async def script(peer, number):
        while (message := await peer.hear()) is not None:
            heard.append(message)
            if isinstance(message, Ping) and len(heard) < 4:
                peer.say(Pong(stream=message.stream))

    async def body():
        async with scripted(script) as address:
            client = await Client.connect(address, keepalive_s=0.02)
            await asyncio.sleep(0.1)
            assert heard == []  # nothing is awaited
            generation = client.generate(token_ids=[1])
            with pytest.raises(ConnectionLost, match="does not answer a ping") as caught:
                await anext(generation)
            assert (caught.value.field, caught.value.limit) == ("keepalive_s", "0.02")
            assert [type(message) for message in heard] == [Generate, Ping, Ping, Ping]
            await client.close()

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
