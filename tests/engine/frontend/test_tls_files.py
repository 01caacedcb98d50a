"""Files of TLS: which are refused at the start, how long certificates count, and how they are read again."""

from __future__ import annotations

import asyncio
import datetime
import ssl

import pytest
from tls_peers import connected, warned

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.tls import Tls, subject_of
from cierzo.engine.messages import (
    Ping,
    Pong,
)

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
ANSWER_TOKENS = 3000


# --- files ---------------------------------------------------------------------------------------------------


def test_wrong_files_are_named(issue, client_ca, tmp_path):
    good, other = issue(), issue(name="other")
    junk, missing = tmp_path / "junk", str(tmp_path / "missing")
    junk.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked"
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    broken = tmp_path / "broken"
    broken.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for changed, field, what in (
        ({"tls_certificate": ""}, "tls_certificate", "tls_key is of no use without"),
        ({"tls_certificate": "", "tls_key": "", **client_ca}, "tls_certificate", "tls_client_ca is of no use"),
        ({"tls_certificate": missing}, "tls_certificate", "No such file"),
        ({"tls_certificate": str(tmp_path)}, "tls_certificate", "Is a directory"),
        ({"tls_certificate": str(junk)}, "tls_certificate", "no certificates in PEM"),
        ({"tls_certificate": good["tls_key"]}, "tls_certificate", "no certificates in PEM"),
        ({"tls_key": missing}, "tls_key", "No such file"),
        ({"tls_key": ""}, "tls_certificate", "holds no private key"),
        ({"tls_key": good["tls_certificate"]}, "tls_key", "holds no private key"),
        ({"tls_key": other["tls_key"]}, "tls_key", "the key of another certificate"),
        ({"tls_key": str(locked)}, "tls_key", "encrypted"),
        ({"tls_key": str(broken)}, "tls_key", ""),
        ({"tls_client_ca": missing}, "tls_client_ca", "No such file"),
        ({"tls_client_ca": str(junk)}, "tls_client_ca", "no certificates in PEM"),
    ):
        with pytest.raises(ConfigError, match=what) as caught:
            Tls(FrontendConfig(**{**good, **changed}))
        error = caught.value
        assert error.field == field
        assert error.limit
        assert error.value == {**good, **changed}[field]


def test_key_and_certificate_may_be_one_file(issue, tmp_path):
    files = issue()
    both = tmp_path / "both"
    both.write_bytes(b"".join(open(path, "rb").read() for path in files.values()))  # noqa: SIM115
    assert Tls(FrontendConfig(tls_certificate=str(both))).context is not None


def test_certificates_count_for_a_time(issue):
    expired = issue(name="old", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    with pytest.raises(ConfigError, match="the certificate has expired on") as caught:
        Tls(FrontendConfig(**expired))
    assert caught.value.field == "tls_certificate"
    early = issue(name="early", not_before=NOW + DAY, not_after=NOW + 9 * DAY)
    with pytest.raises(ConfigError, match="the certificate is not valid before"):
        Tls(FrontendConfig(**early))


@pytest.mark.parametrize(
    ("days", "note"),
    [(21, None), (20.9, "expires in 20 days, on "), (1.5, "in 1 day,"), (0.5, "today"), (-1, "has expired on")],
)
def test_the_end_of_a_certificate_is_told_ahead(issue, days, note):
    tls = Tls(FrontendConfig(**issue(not_after=NOW + 90 * DAY)))
    tls._now = lambda: tls.expires_at - days * DAY
    told = tls.note()
    assert told is None if note is None else note in told


def test_a_server_tells_it_when_it_starts(run, serving, issue, caplog):
    async def body():
        async with serving(**issue(not_after=datetime.datetime.now(datetime.UTC) + 3.5 * DAY)) as house:
            assert house.server.tls._timer.when() - asyncio.get_running_loop().time() > 86_000
            assert house.server.tls.note()

    run(body())
    (line,) = warned(caplog)
    assert line.startswith("the TLS certificate expires in 3 days, on ")


def test_a_reload_is_for_new_connections_and_only_if_all_is_well(run, serving, ca, issue, trusting, caplog):
    async def body():
        async with serving(**issue(common_name="first")) as house:

            def name(peer):
                return subject_of(peer.writer.get_extra_info("peercert"))

            async with connected(house, trusting()) as old:
                assert name(old) == "first"
                issue(common_name="second")
                assert house.server.tls.reload()
                async with connected(house, trusting()) as new:
                    assert name(new) == "second"
                issue(common_name="third", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
                assert not house.server.tls.reload()
                async with connected(house, trusting()) as new:
                    assert name(new) == "second"
                old.say(Ping(stream=1))
                assert await old.hear() == Pong(stream=1)

    run(body())
    (line,) = warned(caplog)
    assert line.startswith("the certificate stays the one before: tls_certificate: ")


def test_sockets_of_the_machine_have_no_tls(run, serving, issue, tmp_path):
    async def body():
        with pytest.raises(ConfigError, match="a Unix socket has none") as caught:
            async with serving(address=f"unix:{tmp_path}/s", **issue()):
                pass
        assert caught.value.field == "address"

    run(body())
