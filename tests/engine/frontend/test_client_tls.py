"""Clients and TLS: certificates that are trusted, that are not, and ends of which one speaks it."""

from __future__ import annotations

import asyncio
import datetime
import re
import ssl
from contextlib import asynccontextmanager

import pytest
import trustme
from fake_rpc_server import LIMITS, Peer, accepted, delta, final, scripted

from cierzo.cli import main
from cierzo.engine.errors import CierzoError, ConfigError, ConnectionLost
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.client_link import tls_failure
from cierzo.engine.messages import Generate, Hello, Welcome
from cierzo.testing import FakeServer


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def trusted(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def serving_with(certificate, client_authority=None):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    if client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        client_authority.configure_trust(context)
    return context


@asynccontextmanager
async def answering(context):
    """The address of a server that speaks TLS, and answers each request with an "A"."""

    async def serve(reader, writer):
        peer = Peer(reader, writer)
        try:
            hello = await peer.hear(Hello)
            if hello is not None:
                features = sorted(hello.features)
                peer.say(Welcome(version=3, server="tls", model="none", limits=LIMITS, features=features))
            while (message := await peer.hear(Generate)) is not None:
                peer.say(accepted(message.stream), delta(message.stream, [65]), final(message.stream, 1))
        except ssl.SSLError:
            pass  # a client whose certificate is not taken
        finally:
            await peer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_an_answer_over_tls(run, authority, trusted):
    async def body():
        async with answering(serving_with(authority.issue_cert("127.0.0.1"))) as address:
            own = ssl.create_default_context(cafile=trusted)
            for tls in (trusted, str(trusted), own):
                async with await Client.connect(address, tls=tls) as client:
                    assert (await client.ask(token_ids=[1])).turn is not None
                    assert [part.text async for part in client.generate(token_ids=[1])] == ["A"]

    run(body())


def test_a_client_proves_itself_by_a_certificate(run, authority, trusted, tmp_path):
    own = authority.issue_cert("client@example.org")
    chain, key = tmp_path / "client.pem", tmp_path / "client.key"
    own.cert_chain_pems[0].write_to_path(chain)
    own.private_key_pem.write_to_path(key)

    async def body():
        async with answering(serving_with(authority.issue_cert("127.0.0.1"), authority)) as address:
            with pytest.raises(CierzoError, match="certificate"):
                await Client.connect(address, tls=trusted)
            options = {"tls": trusted, "tls_certificate": chain, "tls_key": key}
            async with await Client.connect(address, **options) as client:
                assert [part.text async for part in client.generate(token_ids=[1])] == ["A"]

    run(body())


def test_certificates_that_are_not_trusted_are_told_as_such(run, authority, trusted):
    then = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    wrong = {
        "certificate has expired": authority.issue_cert("127.0.0.1", not_before=then, not_after=then),
        "IP address mismatch": authority.issue_cert("127.0.0.2"),
        "unable to get local issuer|self-signed": trustme.CA().issue_cert("127.0.0.1"),
    }

    async def body():
        for reason, certificate in wrong.items():
            async with answering(serving_with(certificate)) as address:
                with pytest.raises(ConfigError, match=f"certificate of {address} is not trusted: .*({reason})"):
                    await Client.connect(address, tls=trusted)

    run(body())


def test_tls_on_one_side_only(run, authority, trusted):
    async def alert(reader, writer):
        await reader.read(10)
        writer.write(bytes.fromhex("15030300020246"))
        writer.close()

    async def http(reader, writer):
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def silent(reader, writer):
        await reader.read(10)
        writer.close()

    async def told(serve, error, match, **options):
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            with pytest.raises(error, match=match):
                await Client.connect(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", **options)

    async def body():
        await told(alert, ConfigError, "speaks TLS, and this client does not")
        await told(silent, ConnectionLost, "does it want TLS")
        await told(http, ConfigError, "does not speak TLS", tls=trusted)
        await told(silent, ConnectionLost, "does it speak TLS", tls=trusted)
        async with answering(serving_with(authority.issue_cert("127.0.0.1"))) as address:
            with pytest.raises(CierzoError, match="TLS"):
                await Client.connect(address)

    run(body())


def test_a_cierzo_server_with_tls_and_one_without(run, serving, issue, trusted):
    """Each side's mistake is told in the client's words, with what to do."""

    async def body():
        async with serving() as plain:
            with pytest.raises(ConfigError, match=r"does not speak TLS, .*unexpected message; .* without tls="):
                await Client.connect(plain.address, tls=trusted)
        async with serving(**issue()) as house:
            with pytest.raises(
                ConfigError, match=r"speaks TLS, and this client does not: connect with tls= "
            ) as caught:
                await Client.connect(house.address)
            assert caught.value.field == "tls"

    run(body())


def alert(reason):
    error = ssl.SSLError(1, "told")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "does not trust this client: .*tls_certificate="),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not trust this client"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "does not trust this client"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "does not trust this client"),  # of 1.2, where a certificate is missing
        ("SSLV3_ALERT_UNEXPECTED_MESSAGE", "does not speak TLS"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "none that this client understands"),
        ("TLSV1_ALERT_INTERNAL_ERROR", "none that this client understands"),
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        (None, "does not speak TLS"),
    ],
)
def test_alerts_in_words(reason, words):
    told = tls_failure("one:7071", alert(reason))
    assert isinstance(told, ConfigError)
    assert re.search(f"^one:7071 .*{words}", told.message)


def test_a_certificate_without_its_key_says_where_the_key_is_given(run, trusted):
    with pytest.raises(ConfigError, match="as tls_key: "):
        run(Client.connect("127.0.0.1:1", tls=trusted, tls_certificate=trusted))
    with pytest.raises(ConfigError, match=f"{trusted} and {trusted} are no certificate and its private key"):
        run(Client.connect("127.0.0.1:1", tls=trusted, tls_certificate=trusted, tls_key=trusted))


# --- on the command line -------------------------------------------------------------------------------------


def test_commands_show_a_certificate(issue, ca, client_ca, tmp_path, capsys):
    shown = ca.issue_cert("client@example.org")
    chain, key, whole = tmp_path / "client.pem", tmp_path / "client.key", tmp_path / "whole.pem"
    shown.cert_chain_pems[0].write_to_path(chain)
    shown.private_key_pem.write_to_path(key)
    shown.private_key_and_cert_chain_pem.write_to_path(whole)
    trusts = ["--tls-ca", client_ca["tls_client_ca"]]
    with FakeServer("Salut", **issue(), **client_ca) as server:
        for command in (["chat", "--message", "Hi"], ["bench", "load", "--requests", "2", "--output-tokens", "2"]):
            line = [*command, "--rpc", server.address]
            assert main([*line, *trusts, "--tls-certificate", str(chain), "--tls-key", str(key)]) == 0
            assert main([*line, *trusts, "--tls-certificate", str(whole)]) == 0
            told = capsys.readouterr()
            assert told.out
            for options, words in (
                ([], "connect with tls= (--tls-ca)"),
                (trusts, "tls_certificate= (--tls-certificate)"),
                (["--tls-certificate", str(whole)], "together with tls= (--tls-ca)"),
            ):
                assert main([*line, *options]) == 2
                assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "why"), [(b"", "it has none"), (b"one\ntwo\n", "more lines than one"), (b"\xe9", "not ASCII")]
)
def test_a_file_that_holds_no_key_is_named_and_not_repeated(tmp_path, capsys, written, why):
    path = tmp_path / "key"
    path.write_bytes(written)
    assert main(["chat", "--rpc", "127.0.0.1:1", "--message", "Hi", "--key-file", str(path)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told
    assert why in told
    assert "two" not in told


def test_unix_sockets_and_lost_files(run, trusted, tmp_path):
    async def script(peer, number):
        await peer.hear()

    async def body():
        async with scripted(script) as address:
            for options, field in (
                ({"tls": tmp_path / "none.pem"}, "tls"),
                ({"tls": trusted, "tls_certificate": trusted}, "tls_certificate"),
                ({"tls": trusted, "tls_key": trusted}, "tls_key"),
                ({"tls_key": trusted}, "tls_certificate"),
            ):
                with pytest.raises(ConfigError) as caught:
                    await Client.connect(address, **options)
                assert caught.value.field == field
            await (await Client.connect(address)).close()

    run(body())


def test_the_blocking_client_takes_the_same_options(trusted):
    with pytest.raises(ConnectionLost, match="no server answers"):
        SyncClient(["127.0.0.1:1"], 1.0, tls=trusted, key="k", connections=2, default_deadline_s=1.0)
