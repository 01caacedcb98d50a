"""Options of clients: unknown ones, and values that are none, are refused where they are given, by name."""

from __future__ import annotations

import pytest
from fake_rpc_server import accepted, delta, final, scripted

from cierzo.engine.errors import CierzoError, ConfigError, ConnectionLost, InvalidRequest
from cierzo.engine.frontend.client import Client, ConnectOptions, Reconnect, Retry, SyncClient
from cierzo.engine.frontend.client_options import ConnectSettings
from cierzo.engine.messages import Generate

NOWHERE = "127.0.0.1:1"
WRONG = [
    *(("timeout_s", value) for value in (0, -1.0, "5", None, float("nan"))),
    *(("connections", value) for value in (0, 65, 2.0, "2", True, None)),
    *(("reconnect", value) for value in ("yes", 1, None, Retry())),
    *(("retry", value) for value in ("no", 3, Reconnect())),
    *(("keepalive_s", value) for value in (0, -1, "a", float("inf"))),
    *(("default_deadline_s", value) for value in (0, -1, "a", True)),
    *(("tls", value) for value in ("", 0, 1, 2.5, ["ca.pem"])),
]
BOUNDS = [
    *(("reconnect", Reconnect(max_attempts=value)) for value in (0, -1, 1.5)),
    *(("reconnect", Reconnect(**{name: -1.0})) for name in ("within_s", "first_pause_s", "longest_pause_s")),
    *(("retry", Retry(max_attempts=value)) for value in (0, "3")),
    *(("retry", Retry(**{name: -1.0})) for name in ("ratio", "burst", "first_pause_s", "within_s")),
]


def test_every_option_has_a_bound_or_is_looked_at_by_itself():
    assert {*ConnectSettings.__struct_fields__} == {"timeout_s", *ConnectOptions.__annotations__}


@pytest.mark.parametrize("name", ["kee", "tlss", "deadline_s"])
def test_an_unknown_option_is_refused_and_its_value_is_not_told(run, name):
    for connect in (
        lambda: SyncClient(NOWHERE, **{name: "s3cret"}),
        lambda: run(Client.connect(NOWHERE, **{name: "s3cret"})),
    ):
        with pytest.raises(ConfigError, match=name) as caught:
            connect()
        assert caught.value.field == name
        assert "s3cret" not in f"{caught.value} {caught.value.value}"


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_is_none_is_refused(run, name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be ") as caught:
        run(Client.connect(NOWHERE, **{name: value}))
    assert caught.value.field == name


@pytest.mark.parametrize(("name", "value"), BOUNDS)
def test_the_bounds_of_a_policy_have_bounds(run, name, value):
    with pytest.raises(ConfigError, match=rf"^{name}\.\w+ must be "):
        run(Client.connect(NOWHERE, **{name: value}))


def test_what_may_be_said_instead_is_told(run):
    with pytest.raises(ConfigError, match="reconnect must be True or False, or a Reconnect, got 'yes'"):
        run(Client.connect(NOWHERE, reconnect="yes"))


def test_what_is_taken(run):
    taken = [
        {"tls": None, "tls_certificate": None, "tls_key": None, "key": None, "features": iter(())},
        {"connections": 64, "keepalive_s": 1, "default_deadline_s": 0.5, "timeout_s": 5},
        {"reconnect": False, "retry": True},
        {"reconnect": Reconnect(max_attempts=1, within_s=0, first_pause_s=0), "retry": Retry(max_attempts=1)},
    ]
    for options in taken:
        with pytest.raises(ConnectionLost, match="no server answers"):
            run(Client.connect(NOWHERE, **options))


def test_no_tls_is_plain_text(run):
    async def script(peer, number):
        await peer.hear()

    async def body():
        async with scripted(script) as address:
            await (await Client.connect(address, tls=None)).close()

    run(body())


@pytest.mark.parametrize("timeout_s", ["a", True, float("nan"), [1]])
def test_a_wait_is_limited_by_a_number(run, timeout_s):
    async def script(peer, number):
        message = await peer.hear(Generate)
        await peer.hear()
        peer.say(accepted(message.stream), delta(message.stream, [65]), final(message.stream, 1))

    async def body():
        async with scripted(script) as address, await Client.connect(address) as client:
            generation = client.generate(token_ids=[1])
            for wait in (generation.next, generation.next_batch, generation.accepted, client.wait_ready):
                with pytest.raises(InvalidRequest, match="timeout_s must be a number of seconds, or None"):
                    await wait(timeout_s=timeout_s)

    run(body())


def test_each_address_where_nobody_answers_is_named(run, tmp_path):
    addresses = [NOWHERE, f"unix:{tmp_path}/none"]
    with pytest.raises(CierzoError) as caught:
        run(Client.connect(addresses))
    assert all(f"no server answers at {address}" in str(caught.value) for address in addresses)
