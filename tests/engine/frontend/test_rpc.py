"""Bytes that are not the protocol, and the limits of connections. After each, the server still answers."""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import until

from cierzo.engine.errors import ConfigError, FrameTooLarge
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.frontend.rpc import MAX_REFUSED
from cierzo.engine.messages import (
    Credit,
    Delta,
    Failure,
    Final,
    Generate,
    Hello,
    Ping,
    Pong,
    SamplingParams,
    Welcome,
)


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 60), max_size=20))
def test_frames_survive_any_cut(bodies, cuts):
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    splitter, found, start = FrameSplitter(40), [], 0
    for length in [*cuts, len(stream)]:
        found += [bytes(body) for body in splitter.feed(stream[start : start + length])]
        start += length
    assert found == bodies


def test_a_frame_at_the_limit_passes_and_one_byte_more_does_not():
    assert [bytes(b) for b in FrameSplitter(3).feed(b"\0\0\0\3abc")] == [b"abc"]
    with pytest.raises(FrameTooLarge):
        list(FrameSplitter(3).feed(b"\0\0\0\4"))


def test_packed_messages_are_frames():
    frames = pack([Ping(stream=1), Ping(stream=2)])
    bodies = [msgspec.msgpack.decode(body, type=Ping) for body in FrameSplitter(99).feed(bytes(frames))]
    assert bodies == [Ping(stream=1), Ping(stream=2)]


async def _still_serves(house):
    async with await Client.connect(house.address) as client:
        assert (await client.complete(token_ids=[1], max_tokens=2)).usage.output_tokens == 2


HELLO = {"type": "hello", "magic": "cierzo", "version": 2}
ENDS_THE_CONNECTION = {
    "wrong version": (
        None,
        {"type": "hello", "magic": "cierzo", "version": 9, "new": 1},
        "version_mismatch",
        "version",
    ),
    "wrong magic": (None, {"type": "hello", "magic": "other", "version": 2}, "protocol_error", "magic"),
    "no hello": (None, {"type": "ping", "stream": 1}, "protocol_error", "type"),
    "garbage instead of hello": (None, b"\xc1\xc1\xc1", "protocol_error", "type"),
    "maps without end": (Hello(), b"\x81\xa1x" * 50_000, "protocol_error", "frame"),
    "maps without end for hello": (None, b"\x81\xa1x" * 50_000, "frame_too_large", "frame"),
    "no UTF-8 in hello": (
        None,
        b"\x83\xa4type\xa5hello\xa5magic\xa3\xed\xa0\x80\xa7version\x02",
        "protocol_error",
        "type",
    ),
    "a type that is no UTF-8": (Hello(), b"\x82\xa4type\xa3\xed\xa0\x80\xa6stream\x05", "protocol_error", "frame"),
    "an empty frame": (Hello(), b"", "protocol_error", "frame"),
    "truncated body": (Hello(), msgspec.msgpack.encode(Ping(stream=3))[:-1], "protocol_error", "frame"),
    "no map": (Hello(), [1, 2], "protocol_error", "frame"),
    "no stream id": (Hello(), {"type": "ping"}, "protocol_error", "stream"),
    "negative stream id": (Hello(), {"type": "ping", "stream": -7}, "protocol_error", "stream"),
    "a second hello": (Hello(), Hello(), "protocol_error", "type"),
}


@pytest.mark.parametrize("case", ENDS_THE_CONNECTION)
def test_what_ends_the_connection(run, serving, peering, case):
    hello, said, code, field = ENDS_THE_CONNECTION[case]

    async def body():
        async with serving() as house:
            async with peering(house, hello) as peer:
                peer.frame(said) if isinstance(said, bytes) else peer.say(said)
                reply = await peer.hear()
                assert isinstance(reply, Failure)
                assert (reply.stream, reply.code, reply.field) == (-1, code, field)
                assert await peer.hear() is None
            await _still_serves(house)

    run(body())


ENDS_THE_STREAM = {
    "unknown method": ({"type": "fly", "stream": 5}, "unknown_method", "type"),
    "no method": ({"stream": 5}, "unknown_method", "type"),
    "unknown field": ({"type": "ping", "stream": 5, "colour": 1}, "invalid_request", "colour"),
    "unknown parameter": (
        {"type": "generate", "stream": 5, "token_ids": [1], "sampling": {"top_q": 1}},
        "invalid_request",
        "sampling.top_q",
    ),
    "wrong type": ({"type": "generate", "stream": 5, "token_ids": ["x"]}, "invalid_request", "token_ids[0]"),
    "huge integer": (
        {"type": "generate", "stream": 5, "token_ids": [1], "priority": "1e9"},
        "invalid_request",
        "priority",
    ),
    "no UTF-8": (b"\x83\xa4type\xa8generate\xa6stream\x05\xa4text\xa3\xed\xa0\x80", "invalid_request", None),
}


@pytest.mark.parametrize("case", ENDS_THE_STREAM)
def test_what_ends_its_stream_alone(run, serving, peering, case):
    said, code, field = ENDS_THE_STREAM[case]

    async def body():
        async with serving() as house, peering(house) as peer:
            peer.frame(said) if isinstance(said, bytes) else peer.say(said)
            reply = await peer.hear()
            assert isinstance(reply, Failure)
            assert (reply.stream, reply.code, reply.field) == (5, code, field)
            peer.say(Ping(stream=6))
            assert await peer.hear() == Pong(stream=6)

    run(body())


def test_what_is_refused_is_named_in_plain_words(run, serving, peering):
    """The type of a method that there is not; a field and its feature, never the key that a caller made up."""

    async def body():
        async with serving() as house, peering(house) as peer:
            for said, message in (
                ({"type": "fly"}, "there is no method 'fly'"),
                ({"type": "y" * 50}, f"there is no method '{'y' * 40}...'"),
                ({}, "the message has no type"),
                ({"type": "ping", "colour": 1}, "unknown field colour"),
                ({"type": "generate"}, "exactly one of text, messages, token_ids and attached is needed"),
            ):
                peer.say({"stream": 5, **said})
                assert (await peer.hear()).message == message
            for said, what, field in (
                ({"type": "generate", "token_ids": [1], "idempotency_key": "secret"}, "idempotency_key", None),
                ({"type": "cancel_request", "request_id": "secret"}, "cancel_request", "type"),
            ):
                peer.say({"stream": 5, **said})
                refusal = await peer.hear()
                assert refusal.message.startswith(f"{what} needs the feature resume, which")
                assert refusal.field == (field or what)
                assert "secret" not in str(refusal)

    run(body())


@pytest.mark.parametrize(
    ("address", "warns"), [("0.0.0.0:0", True), ("127.0.0.1:0", False), ("localhost:0", False)]
)
def test_an_address_beyond_loopback_has_to_be_wanted(run, serving, caplog, monkeypatch, address, warns):
    what = "0.0.0.0:0 is reached from other machines, and has no keys and no TLS"

    async def body():
        if warns:
            with monkeypatch.context() as patched:
                patched.setattr(type(asyncio.get_running_loop()), "create_server", None, raising=False)
                with pytest.raises(ConfigError, match=what) as caught:
                    async with serving(address=address):
                        pass
            assert (caught.value.field, caught.value.value) == ("address", address)
        async with serving(address=address, insecure=warns):
            pass

    run(body())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [what] * warns


def test_a_faulty_message_about_an_open_stream_ends_that_stream(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            for stream in (1, 2):
                peer.say(Generate(stream=stream, token_ids=[stream], sampling=SamplingParams(max_tokens=3, seed=0)))
            await cores.until(lambda: len(cores.now.submits) == 2)
            peer.say(Generate(stream=1, token_ids=[9]))
            reply = await peer.hear()
            assert (reply.stream, reply.code, reply.field) == (1, "invalid_request", "stream")
            await cores.until(lambda: cores.now.aborts)
            cores.go_on()
            final = await peer.hear_until(Final)
            assert (final.stream, final.usage.output_tokens) == (2, 3)
            assert len(house.frontend.streams) == 0

    run(body())


def test_an_oversized_frame_is_refused_before_it_is_read(run, serving, peering):
    async def body():
        async with serving(max_frame_bytes=1000) as house:
            async with peering(house) as peer:
                peer.frame(b"x" * 1_000_000)
                reply = await peer.hear()
                assert (reply.code, reply.field, reply.limit, reply.value) == (
                    "frame_too_large",
                    "frame",
                    "1000",
                    "1000000",
                )
                assert await peer.hear() is None
            await _still_serves(house)

    run(body())


def test_an_oversized_frame_ends_its_own_stream_alone(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, max_frame_bytes=70_000) as house, peering(house) as peer:
            for stream in (1, 2):
                peer.say(Generate(stream=stream, token_ids=[stream], sampling=SamplingParams(max_tokens=3, seed=0)))
            await cores.until(lambda: len(cores.now.submits) == 2)
            for stream in (1, 3):  # one that is open, and one that is not
                peer.say({"type": "generate", "stream": stream, "text": "x" * 1_000_000})
                reply = await peer.hear_until(Failure)
                assert (reply.stream, reply.code, reply.limit) == (stream, "frame_too_large", "70000")
            cores.go_on()
            final = await peer.hear_until(Final)
            assert (final.stream, final.usage.output_tokens) == (2, 3)
            assert house.frontend.budget.num_bytes == 0

    run(body())


def test_only_prompts_may_be_long(run, serving, peering):
    async def body():
        async with serving() as house, peering(house) as peer:
            peer.say({"type": "resume", "stream": 4, "request_id": "x" * 70_000, "received": []})
            reply = await peer.hear()
            assert (reply.stream, reply.code, reply.limit) == (4, "frame_too_large", "65536")
            peer.say({"type": "fly", "stream": 4, "text": "x" * 70_000})
            assert (await peer.hear()).code == "unknown_method"
            peer.say({"token_ids": [[1]] * 1_500_000, "type": "generate", "stream": 4})
            reply = await peer.hear()
            assert (reply.stream, reply.code, reply.field) == (-1, "protocol_error", "stream")

    run(body())


def test_a_long_prompt_with_its_names_behind_it(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            peer.say({"sampling": {"max_tokens": 1}, "stream": 4, "token_ids": [299] * 30_000, "type": "generate"})
            reply = await peer.hear_until(Failure)
            assert (reply.stream, reply.code, reply.field) == (4, "invalid_request", "token_ids")
            assert house.frontend.counters.refused == 1

    run(body())


def test_input_beyond_a_turn_waits_for_the_next(run, serving, peering, monkeypatch):
    """With turns of no length every message needs one of its own; the order stays."""
    monkeypatch.setattr("cierzo.engine.frontend.turns.TURN_S", 0.0)

    async def body():
        async with serving() as house, peering(house) as peer, peering(house) as other:
            for each in (peer, other):
                each.raw(bytes(pack([Ping(stream=number) for number in range(300)])))
            for each in (peer, other):
                assert [(await each.hear()).stream for _ in range(300)] == list(range(300))

    run(body())


def test_messages_before_the_faulty_one_are_answered(run, serving, peering):
    async def body():
        async with serving() as house, peering(house) as peer:
            peer.raw(bytes(pack([Ping(stream=1)])) + b"GET / HTTP/1.1\r\n\r\n")
            assert await peer.hear() == Pong(stream=1)
            assert (await peer.hear()).code == "frame_too_large"

    run(body())


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_never_end_the_server(run, serving, peering, seed):
    def noise(size):
        return bytes((seed * 37 + i * i * 11 + 5) % 256 for i in range(size))

    async def body():
        async with serving() as house:
            for data in map(noise, (1, 5, 300, 4096)):
                for hello in (None, Hello()):
                    async with peering(house, hello) as peer:
                        peer.frame(data)
                        peer.raw(data)
                        peer.writer.write_eof()
                        while await peer.hear() is not None:
                            pass
            await _still_serves(house)

    run(body())


def test_a_silent_connection_is_closed(run, serving, peering):
    async def body():
        async with serving(handshake_timeout_s=0.01) as house, peering(house, None) as peer:
            peer.raw(b"\0\0")
            reply = await peer.hear()
            assert (reply.code, reply.field) == ("protocol_error", "handshake_timeout_s")
            assert await peer.hear() is None

    run(body())


def test_a_welcomed_connection_may_be_silent(run, serving, peering):
    async def body():
        async with (
            serving(handshake_timeout_s=0.01) as house,
            peering(house) as peer,
            peering(house, None) as other,
        ):
            assert (await other.hear()).field == "handshake_timeout_s"  # so much time has passed
            peer.say(Ping(stream=1))
            assert await peer.hear() == Pong(stream=1)

    run(body())


def test_one_connection_too_many(run, serving, peering):
    async def body():
        async with serving(max_connections=1) as house:
            async with peering(house), peering(house, None) as second:
                reply = await second.hear()
                assert (reply.stream, reply.code, reply.retry, reply.limit) == (-1, "overloaded", True, "1")
                assert reply.retry_after_s > 0
                assert await second.hear() is None
            await _still_serves(house)

    run(body())


def test_the_welcome_tells_the_limits(run, serving, peering):
    async def body():
        async with serving(max_streams_per_connection=7, max_samples=3) as house, peering(house, None) as peer:
            peer.say(Hello(client="test"))
            welcome = await peer.hear()
            assert isinstance(welcome, Welcome)
            assert (welcome.model, welcome.version) == ("fake", 3)
            limits = welcome.limits
            assert (limits.max_streams, limits.max_samples, limits.max_model_len) == (7, 3, 4096)

    run(body())


def test_a_port_in_use_is_an_error_that_names_it(run, serving):
    async def body():
        async with serving() as house:
            with pytest.raises(ConfigError, match="in use") as caught:
                async with serving(address=house.address):
                    pass
            assert (caught.value.field, caught.value.value) == ("address", house.address)
            await _still_serves(house)

    run(body())


def test_unix_sockets(run, serving, tmp_path):
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as dead:  # the file of a server that was killed
        dead.bind(str(path))
    plain = tmp_path / "plain"
    plain.write_text("keep me")

    async def body():
        async with serving(address=f"unix:{path}") as house:
            await _still_serves(house)
            with pytest.raises(ConfigError, match="another server"):
                async with serving(address=f"unix:{path}"):
                    pass
            await _still_serves(house)
        assert not path.exists()
        with pytest.raises(ConfigError, match="no socket"):
            async with serving(address=f"unix:{plain}"):
                pass

    run(body())
    assert plain.read_text() == "keep me"


def test_tcp_does_not_wait_to_fill_packets(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address):
            (connection,) = house.server._connections
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(body())


def test_a_step_leaves_in_one_write(run, serving, peering, cores):
    """Eight streams, one step: the reader sees all eight deltas in one piece."""
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            for stream in range(8):
                peer.say(Generate(stream=stream, token_ids=[stream], sampling=SamplingParams(max_tokens=3, seed=0)))
            await cores.until(lambda: len(cores.now.submits) == 8)
            cores.now.step()
            data = await peer.reader.read(1 << 16)
            bodies = [msgspec.msgpack.decode(body, type=Delta) for body in FrameSplitter(1 << 16).feed(data)]
            assert [delta.stream for delta in bodies] == list(range(8))

    run(body())


def test_nothing_is_left_open(run, serving, peering):
    """Sockets of ten rounds: as many as before the first."""

    async def body():
        async with serving() as house:
            await _still_serves(house)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            async with serving() as house, peering(house) as peer, peering(house, None):
                await _still_serves(house)
                peer.raw(b"\xff" * 9)
                await peer.hear_until(Failure)
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == before

    run(body())


def test_what_belongs_to_a_feature_that_was_not_granted_is_refused(run, serving, peering):
    async def body():
        async with serving() as house, peering(house) as peer:
            peer.say(Credit(stream=3, bytes=1))
            peer.say(Generate(stream=4, token_ids=[1], idempotency_key="k"))
            for stream, field in ((3, "type"), (4, "idempotency_key")):
                refusal = await peer.hear()
                assert (refusal.stream, refusal.code, refusal.field) == (stream, "invalid_request", field)

    run(body())


def test_connections_past_the_bound_hold_few_descriptors(run, serving, peering):
    async def body():
        async with serving(max_connections=1) as house, peering(house):
            host, port = house.address.split(":")
            others = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_REFUSED + 20)]
            heard = [await reader.read() for reader, _ in others[:MAX_REFUSED]]  # to the end
            assert all(b"max_connections" in each for each in heard)
            await until(lambda: len(house.server._connections) <= 1 + MAX_REFUSED)
            for _, writer in others:
                writer.close()
            await until(lambda: len(house.server._connections) <= 1)
            assert house.server._num_refused == 0

    run(body())
