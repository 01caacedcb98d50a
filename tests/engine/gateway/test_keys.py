"""Bearer keys are the RPC's tenants, at a door in the server and at a gateway before it."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from http_house import CHAT, MESSAGES

from cierzo.engine.errors import Unauthorized
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.keys import key_line, new_key
from cierzo.engine.gateway import remote as remote_module
from cierzo.engine.gateway.backend import Caller
from cierzo.engine.gateway.remote import REFUSED_S, Remote

CHATS = "/v1/chat/completions"
OWN, SEARCH, ADMIN = new_key(), new_key(), new_key()
LINES = (
    '{"tenant": "search", "max_requests": 1}',
    '{"tenant": "watch"}',
    key_line(SEARCH, "search"),
    key_line(ADMIN, "watch", ("stats",)),
    key_line(OWN, "watch"),
)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n".join(LINES) + "\n", encoding="ascii")
    path.chmod(0o600)
    return path


@pytest.fixture
def keyed(either, keys):
    return lambda *answers, **options: either(*answers, keys=str(keys), own_key=OWN, **options)


def _bearer(key, scheme="Bearer"):
    return {"authorization": f"{scheme} {key}"}


def test_a_key_opens_the_door(keyed):
    house = keyed("Hello")
    with house.openai(api_key=SEARCH) as client:
        answer = client.chat.completions.create(model="fake", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello"
        assert [model.id for model in client.models.list()] == ["fake"]
    assert house.post(CHATS, CHAT, headers=_bearer(SEARCH, "bearer")).status_code == 200
    assert house.post(CHATS, CHAT, headers={"authorization": SEARCH}).status_code == 200


def test_no_key_and_a_wrong_one(keyed):
    house = keyed("Hello")
    for headers in ({}, _bearer("wrong"), _bearer(SEARCH, "Basic")):
        for answer in (house.post(CHATS, CHAT, headers=headers), house.get("/v1/models", headers=headers)):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
            assert "wrong" not in answer.text
    assert not house.requests


def test_probes_want_no_key(keyed):
    house = keyed("Hello")
    assert house.get("/health/ready").json()["ready"]
    assert house.get("/version").status_code == 200


def test_metrics_want_a_right(opening, keys):
    house = opening("Hello", keys=str(keys))
    assert house.get("/metrics").status_code == 401
    refused = house.get("/metrics", headers=_bearer(SEARCH))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert house.get("/metrics", headers=_bearer(ADMIN)).status_code == 200


def test_limits_are_the_tenants(keyed):
    house = keyed("x" * 100, token_s=60.0)
    client = house.openai(api_key=SEARCH)
    with client, client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
        next(stream)
        refused = house.post(CHATS, CHAT, headers=_bearer(SEARCH))
        assert (refused.status_code, refused.json()["error"]["param"]) == (429, "max_requests")
        assert house.post(CHATS, CHAT | {"max_tokens": 1}, headers=_bearer(ADMIN)).status_code == 200


def test_keys_that_are_read_anew(opening, keys):
    house = opening("Hello", keys=str(keys))
    keys.write_text("\n".join(line for line in LINES if line != LINES[2]) + "\n", encoding="ascii")
    house._do(house._running.server.reload)
    assert house.post(CHATS, CHAT, headers=_bearer(SEARCH)).status_code == 401
    assert house.post(CHATS, CHAT, headers=_bearer(ADMIN)).status_code == 200


def _write(house, keys, *lines):
    keys.write_text("\n".join(lines) + "\n", encoding="ascii")
    house._do(house._running.server.reload)


@pytest.mark.parametrize("lines", [(*LINES[:2], *LINES[3:]), (*LINES[:2], key_line(SEARCH, "watch"), *LINES[3:])])
def test_a_key_that_is_taken_back_ends_what_runs(keyed, keys, lines):
    house = keyed("x" * 100, token_s=60.0)
    client = house.openai(api_key=SEARCH)
    with client, client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
        next(stream)
        _write(house, keys, *lines)
        with pytest.raises(openai.APIError) as ended:
            for _ in stream:
                pass
    assert ended.value.code == "unauthorized"
    assert house.frontend.streams.num_read == 0


def test_a_key_that_is_given_back_opens_the_door_again(keyed, keys):
    house = keyed("Hello")
    assert house.post(CHATS, CHAT, headers=_bearer(SEARCH)).status_code == 200
    _write(house, keys, *LINES[:2], *LINES[3:])
    assert house.post(CHATS, CHAT, headers=_bearer(SEARCH)).status_code == 401
    _write(house, keys, *LINES)
    until_s = time.monotonic() + REFUSED_S + 5.0
    while house.post(CHATS, CHAT, headers=_bearer(SEARCH)).status_code != 200:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_other_keys_do_not_end_what_runs(keyed, keys):
    house = keyed("x" * 20, token_s=0.02)
    client = house.openai(api_key=ADMIN)
    with client, client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
        next(stream)
        _write(house, keys, *LINES[:2], *LINES[3:])
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "x" * 20


def test_a_gateway_does_not_let_others_in_by_a_key_of_its_own(opening, keys):
    house = opening("Hello", keys=str(keys), own_key=OWN, remote=True)
    assert house.get("/health/ready").json()["ready"]
    assert house.post(CHATS, CHAT).status_code == 401


def test_a_gateway_wants_a_key_of_its_own(opening, keys):
    with pytest.raises(Unauthorized):
        opening("Hello", keys=str(keys), remote=True)


def test_a_gateway_makes_room_while_others_come(monkeypatch, run):
    """A client that is closed takes a while: those who come meanwhile are let in, each by one client of its key."""
    monkeypatch.setattr(remote_module, "MAX_CLIENTS", 2)
    made, closed = [], []

    class SlowClient:
        def __init__(self, key):
            self.key = key
            made.append(key)

        async def close(self):
            await asyncio.sleep(0.01)
            closed.append(self.key)

    async def connect(key):
        return SlowClient(key)

    async def body():
        remote = Remote(connect, lambda: connect(OWN))
        for key in ("a", "b"):
            (await remote.admit(Caller(key=key))).close()
        desks = await asyncio.gather(*(remote.admit(Caller(key=key)) for key in ("c", "d", "c")))
        assert sorted(made) == ["a", "b", "c", "d"]
        for desk in desks:
            desk.close()
        await remote.close()
        assert sorted(closed) == ["a", "b", "c", "d"]

    run(body())


def test_a_gateway_takes_nobody_elsewhere_for_this_machine():
    asked = []

    async def connect(key):
        asked.append(key)
        raise Unauthorized("no")

    async def admitted(remote, caller):
        with pytest.raises(Unauthorized):
            await remote.admit(caller)

    far = Caller(peer="192.0.2.1:1", is_local=False)
    asyncio.run(admitted(Remote(connect, lambda: connect(OWN)), far))
    assert asked == []
    asyncio.run(admitted(Remote(connect, lambda: connect(OWN), trusts_all=True), far))
    assert asked == [None]


def test_a_key_that_was_refused_is_refused_for_a_while_without_a_question():
    asked, now = [], [100.0]

    async def connect(key):
        asked.append(key)
        raise Unauthorized("no")

    async def body():
        remote = Remote(connect, lambda: connect(OWN), clock=lambda: now[0])
        for _ in range(3):
            with pytest.raises(Unauthorized):
                await remote.admit(Caller(key="guess"))
        assert asked == ["guess"]
        now[0] += REFUSED_S
        with pytest.raises(Unauthorized):
            await remote.admit(Caller(key="guess"))
        assert asked == ["guess", "guess"]

    asyncio.run(body())


def test_clients_of_keys_that_are_idle_make_room(opening, monkeypatch):
    monkeypatch.setattr("cierzo.engine.gateway.remote.MAX_CLIENTS", 2)
    house = opening("Hello", remote=True)
    for key in ("a", "b", "c", "a"):
        assert house.post(CHATS, CHAT, headers=_bearer(key)).status_code == 200
    assert len(house._remote._kept) == 2
    assert house.num_connections == 3  # the gateway's own, too
    assert isinstance(house._remote._own, Client)
