"""TLS: what is served with it, who is turned away, and how certificates come and go."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import socket
import ssl

import msgspec
import pytest
import trustme
from streams import until
from tls_peers import address_of, connected, warned

from cierzo.engine.frontend import tls_layer
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.tls import Tls, subject_of
from cierzo.engine.messages import (
    FEATURES,
    Credit,
    Delta,
    Failure,
    Final,
    Generate,
    Hello,
    Ping,
    Pong,
    SamplingParams,
    ServerMessage,
)

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
ANSWER_TOKENS = 3000


# --- what is served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_requests_of_any_size(run, serving, issue, trusting, cores, version, size):
    cores.answer = lambda submit, sample: [65 + place % 26 for place in range(ANSWER_TOKENS)]

    async def body():
        async with serving(cores=cores, **issue()) as house, connected(house, trusting(version)) as peer:
            assert peer.writer.get_extra_info("ssl_object").version() == version.name.replace("_", ".")
            sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
            for deltas in (True, False):
                peer.say(Generate(stream=1, token_ids=[1], sampling=sampling, deltas=deltas))
                got = []
                while not isinstance(message := await peer.hear(), Final):
                    got += message.token_ids
                got = got or message.samples[0].token_ids
                assert got == cores.answer(None, 0)
            peer.say(Generate(stream=1, text="x" * size, sampling=sampling))
            refused = await peer.hear()
            assert isinstance(refused, Failure if size > 4096 else Delta)

    run(body(), 60)


def test_frames_that_are_cut_anywhere(run, serving, issue, trusting):
    async def body():
        async with serving(**issue()) as house, connected(house, trusting()) as peer:
            for byte in bytes(pack([Ping(stream=3)])):
                peer.writer.write(bytes([byte]))
                await peer.writer.drain()
            assert await peer.hear() == Pong(stream=3)
            peer.say(*[Ping(stream=stream) for stream in range(5000)])  # many records, and turns, at once
            for stream in range(5000):
                assert await peer.hear() == Pong(stream=stream)

    run(body())


def test_what_comes_while_a_connection_is_held_is_read_afterwards(run, serving, issue, trusting):
    async def body():
        async with serving(**issue()) as house, connected(house, trusting()) as peer:
            (connection,) = house.server._connections
            layer = connection._transport
            connection.hold()
            layer._raw.resume_reading()  # as if more had been on its way up already
            peer.say(Ping(stream=3))
            await until(lambda: layer._incoming.pending)
            connection.release()
            assert await peer.hear() == Pong(stream=3)

    run(body())


def test_nothing_is_negotiated_anew_and_nothing_is_resumed(issue, run, serving, trusting):
    tls = Tls(FrontendConfig(**issue()))
    assert tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert tls.context.options & ssl.OP_NO_RENEGOTIATION
    assert tls.context.num_tickets == 0

    async def body():
        async with serving(**issue()) as house:
            for version in VERSIONS:
                async with connected(house, trusting(version)) as peer:
                    session = peer.writer.get_extra_info("ssl_object").session
                    assert session is None or not session.has_ticket

    run(body())


def test_the_settings_of_a_socket_are_those_of_a_plain_one(run, serving, issue, trusting):
    async def body():
        async with serving(keepalive_s=7.0, **issue()) as house, connected(house, trusting()) as peer:
            (connection,) = house.server._connections
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
            peer.say(Ping(stream=1))
            await peer.hear()
            before = connection.num_taken
            peer.say(Ping(stream=1))
            await peer.hear()
            assert connection.num_taken > before + 20
            assert connection.unsent_bytes == 0

    run(body())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_reader_that_stops_costs_no_more_than_without_tls(run, serving, issue, trusting, cores, version):
    """The server stops writing to a client that does not read: `num_taken` stands still until it reads again."""
    cores.answer = lambda submit, sample: [65] * submit.sampling.max_tokens

    async def body():
        async with serving(cores=cores, **issue()) as house, connected(house, trusting(version)) as peer:
            (connection,) = house.server._connections
            peer.writer.transport.pause_reading()
            sampling = SamplingParams(max_tokens=4000, logprobs=20)
            for stream in range(60):
                peer.say(Generate(stream=stream, token_ids=[1], sampling=sampling))
            await until(lambda: connection.is_paused)
            await until(
                lambda: not house.frontend.streams.num_read or all(s.unsent for s in house.frontend.streams)
            )
            assert connection._transport.get_write_buffer_size() < 600_000
            peer.writer.transport.resume_reading()
            ended = 0
            while ended < 60:
                ended += isinstance(await peer.hear(), Final)
            assert not connection.is_paused

    run(body(), 60)


def test_num_taken_stands_still_while_nothing_is_taken(run, serving, issue, trusting, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, **issue()) as house, connected(house, trusting()) as peer:
            (connection,) = house.server._connections
            peer.writer.transport.pause_reading()
            while not connection.is_paused:
                connection._write(bytes(100_000))
                await asyncio.sleep(0)
            await until(lambda: _stands_still(connection))
            taken = connection.num_taken
            for _ in range(10):
                connection._write(b"x" * 37)  # of which TLS makes more
            assert connection.num_taken == taken
            connection.drop()

    run(body())


def _stands_still(connection, seen=[0, 0]):  # noqa: B006, what was seen before
    seen[:] = [seen[1], connection.num_taken]
    return seen[0] == seen[1]


def test_who_asks_for_new_keys_and_does_not_read_is_ended(run, serving, issue, trusting, caplog):
    """Bytes that TLS says by itself are bounded too, while they find no room; those of before do not count. As
    Python cannot ask for new keys, some are made up."""

    async def body():
        async with serving(**issue()) as house, connected(house, trusting()) as peer:
            (connection,) = house.server._connections
            layer = connection._transport
            peer.writer.transport.pause_reading()
            for size in (0, house.server.config.high_water_bytes + 1):
                layer.get_write_buffer_size = lambda size=size: size
                for _ in range(tls_layer.MAX_OWN_BYTES // 4096):
                    layer._outgoing.write(bytes(4096))
                    layer._read()
                assert not layer.is_closing()
            layer._outgoing.write(bytes(4096))
            layer._read()
            await until(lambda: not house.server._connections)

    run(body())
    assert "asks for new TLS keys" in caplog.text


# --- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_the_reason_of_an_end_arrives_before_the_end(run, serving, issue, trusting, version):
    async def body():
        async with serving(**issue()) as house, connected(house, trusting(version)) as peer:
            peer.say(Hello())
            said = await peer.hear()
            assert (said.code, said.stream) == ("protocol_error", -1)
            assert await peer.reader.read() == b"", "an end that TLS vouches for"

    run(body())


@pytest.mark.parametrize("how", ["close", "abort", "half", "cut record"])
def test_a_peer_that_leaves_takes_its_requests_with_it(run, serving, issue, trusting, cores, how):
    cores.free = False

    async def body():
        async with serving(cores=cores, **issue()) as house, connected(house, trusting()) as peer:
            peer.say(Generate(stream=1, token_ids=[1]))
            await cores.until(lambda: cores.now.submits)
            transport = peer.writer.transport
            if how == "abort":
                transport.abort()
            elif how == "close":
                transport.close()
            else:
                sock = transport.get_extra_info("socket")
                descriptor = socket.socket(fileno=os.dup(sock.fileno()))
                if how == "cut record":
                    descriptor.send(b"\x17\x03\x03\x01\x00abc")
                descriptor.shutdown(socket.SHUT_WR)
                descriptor.close()
            await cores.until(lambda: cores.now.aborts)
            await until(lambda: not house.server._connections)

    run(body())


def test_bytes_that_are_no_tls_end_a_connection(run, serving, issue, trusting, cores):
    async def body():
        async with serving(**issue()) as house, connected(house, trusting()) as peer:
            sock = peer.writer.transport.get_extra_info("socket")
            with socket.socket(fileno=os.dup(sock.fileno())) as behind:
                behind.send(b"\x17\x03\x03\x00\x20" + bytes(32))
            await until(lambda: not house.server._connections)
            async with connected(house, trusting()) as other:
                other.say(Ping(stream=1))
                assert await other.hear() == Pong(stream=1)

    run(body())


# --- who is turned away --------------------------------------------------------------------------------------


async def answer_to(house, data):
    """All that the server says to these bytes."""
    reader, writer = await asyncio.open_connection(*address_of(house))
    writer.write(data)
    said = await reader.read()
    writer.close()
    await writer.wait_closed()
    return said


def test_plain_text_on_a_tls_port(run, serving, issue, caplog):
    async def body():
        async with serving(**issue()) as house:
            said = await answer_to(house, bytes(pack([Hello()])))
            failure = msgspec.msgpack.decode(said[4:], type=ServerMessage)
            assert (failure.code, failure.stream, failure.field) == ("protocol_error", -1, "tls")
            assert "this port speaks TLS" in failure.message
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"):
                said = await answer_to(house, data)
                assert said.startswith(b"HTTP/1.1 400 ")
                assert said.endswith(b"\r\n\r\nthis port speaks TLS, and the client does not\n")
            await until(lambda: not house.server._shaking)

    run(body())
    assert len(warned(caplog)) == 3
    assert all("127.0.0.1:" in line and "without TLS" in line for line in warned(caplog))


def test_tls_on_a_plain_port(run, serving, trusting, caplog):
    async def body():
        async with serving() as house:
            with pytest.raises(ssl.SSLError, match="UNEXPECTED_MESSAGE"):
                await asyncio.open_connection(*address_of(house), ssl=trusting(), server_hostname="localhost")

    run(body())
    (line,) = warned(caplog)
    assert line.startswith("TLS came to the RPC's port from 127.0.0.1:")


@pytest.mark.parametrize("version", VERSIONS)
def test_clients_show_a_certificate_of_the_authority(run, serving, ca, issue, client_ca, trusting, caplog, version):
    shown = ca.issue_cert("billing.example", common_name="billing")
    foreign = trustme.CA().issue_cert("billing.example", common_name="billing")

    async def body():
        async with serving(**issue(), **client_ca) as house:
            async with connected(house, trusting(version, shown)):
                assert [connection.subject for connection in house.server._connections] == ["billing"]
            for wrong in (None, foreign):
                with pytest.raises(ssl.SSLError, match="ALERT"):  # 1.3: only what is read then tells it
                    async with connected(house, trusting(version, wrong)):
                        pass
            await until(lambda: not house.server._connections)

    run(body())
    assert len(warned(caplog)) == 2


def test_a_certificate_without_a_common_name_has_its_first_dns_name_or_uri():
    subject = ((("organizationName", "trustme"),),)
    names = (("email", "a@b"), ("DNS", "one"), ("URI", "spiffe://x"), ("DNS", "two"))
    assert subject_of({"subject": subject, "subjectAltName": names}) == "one"
    assert subject_of({"subject": subject, "subjectAltName": names[2:3]}) == "spiffe://x"
    assert subject_of({"subject": (*subject, (("commonName", "cn"),)), "subjectAltName": names}) == "cn"
    assert subject_of({}) == ""


def test_old_versions_are_refused(run, serving, issue, trusting, caplog):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    async def body():
        async with serving(**issue()) as house:
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection(*address_of(house), ssl=context, server_hostname="localhost")

    run(body())


def test_a_handshake_has_its_time_and_holds_nobody_up(run, serving, issue, trusting, caplog, monkeypatch):
    monkeypatch.setattr(tls_layer, "LINGER_S", 0.05)

    async def body():
        async with serving(handshake_timeout_s=0.3, **issue()) as house:
            silent = [await asyncio.open_connection(*address_of(house)) for _ in range(3)]
            silent[1][1].write(b"\x16\x03\x01\x02\x00")
            async with connected(house, trusting()) as peer:
                peer.say(Ping(stream=1))
                assert await peer.hear() == Pong(stream=1)
                assert len(house.server._shaking) == 3
                for reader, writer in silent:
                    assert await reader.read() == b""
                    writer.close()
                await until(lambda: not house.server._shaking)
                peer.say(Ping(stream=1))
                assert await peer.hear() == Pong(stream=1)

    run(body())
    assert ["no handshake came in time" in line for line in warned(caplog)] == [True] * 3


def test_handshakes_count_among_the_connections(run, serving, issue, monkeypatch):
    async def body():
        async with serving(max_connections=2, handshake_timeout_s=30.0, **issue()) as house:
            silent = [await asyncio.open_connection(*address_of(house)) for _ in range(2 + 16)]
            await until(lambda: len(house.server._shaking) == 18)
            reader, writer = await asyncio.open_connection(*address_of(house))
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            for _, one in (*silent, (reader, writer)):
                one.close()
            await until(lambda: not house.server._shaking)

    run(body())


def test_the_features_and_credit_work_on_it(run, serving, issue, trusting, cores):
    hello = Hello(client="test", features=list(FEATURES))

    async def body():
        async with serving(cores=cores, **issue()) as house, connected(house, trusting(), hello) as peer:
            peer.say(Generate(stream=1, token_ids=[1], sampling=SamplingParams(max_tokens=50)))
            peer.say(Credit(stream=1, bytes=10))
            assert (await peer.hear_until(Final)).usage.output_tokens == 50

    run(body())
