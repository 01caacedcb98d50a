"""Connections of peers that mean harm: what they hold, what they cost, and what they make the server say."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
from http_house import CHAT, KIND, POST, heard, post_of, until

from cierzo.engine.gateway import endpoints, server
from cierzo.engine.log_lines import Sparing

GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"


def _error(answer):
    return json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]


# --- time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n\r\n\r\n"])
def test_empty_lines_keep_no_connection(opening, more):
    house = opening("x", http={"idle_s": 60.0, "request_timeout_s": 0.2})
    with house.connect() as sock:
        sock.sendall(GET + b"\r\n")
        heard(sock, b"}")
        sock.sendall(more)
        assert heard(sock) == b""


def test_empty_lines_do_not_hurry_the_answer_under_way(opening):
    house = opening("x" * 3, token_s=0.15, http={"request_timeout_s": 0.2})
    with house.connect() as sock:
        sock.sendall(post_of(CHAT))
        until(lambda: house.core.running)  # it is not late, whatever comes now
        sock.sendall(b"\r\n")
        assert b'"xxx"' in heard(sock, b"}}}")


# --- requests that follow each other -------------------------------------------------------------------------


def test_few_requests_wait_for_their_turn(opening):
    """Each would cost memory, and time of a single turn of the loop."""
    house = opening("x", token_s=60.0)
    with house.connect() as sock:
        sock.sendall(post_of(CHAT | {"stream": True}))
        heard(sock, b'"role"')
        with contextlib.suppress(ConnectionError):
            sock.sendall((GET + b"\r\n") * (server.MAX_WAITING + 1))
        until(lambda: not house.door.state.connections)
    until(lambda: not house.core.running)
    until(lambda: not house.door.state.tasks)


def test_a_long_body_does_not_come_before_its_turn(opening):
    house = opening("x", token_s=60.0)
    with house.connect() as sock:
        sock.sendall(post_of(CHAT | {"stream": True}))
        heard(sock, b'"role"')
        with contextlib.suppress(ConnectionError):
            sock.sendall(post_of(CHAT | {"user": "x" * 200_000}))
        until(lambda: not house.door.state.connections)
    until(lambda: not house.door.state.tasks)


@pytest.mark.parametrize("stream", [True, False])
def test_a_peer_that_goes_away_is_seen_also_if_it_asked_for_more(opening, stream, caplog):
    house = opening("x" * 100, token_s=60.0)
    with house.connect() as sock:
        sock.sendall(post_of(CHAT | {"stream": stream}))
        until(lambda: len(house.core.running) == 1)
        sock.sendall(GET + b"\r\n")
        until(lambda: any(connection.pipeline for connection in house.door.state.connections))
    until(lambda: not house.core.running)
    until(lambda: not house.door.state.tasks)
    assert "Traceback" not in caplog.text


# --- heads ---------------------------------------------------------------------------------------------------


def test_what_comes_behind_a_body_is_no_header(house):
    data = json.dumps(CHAT).encode()
    body = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(data), data)
    with house.connect() as sock:
        sock.sendall(POST + body + KIND + b"\r\n")
        answer = heard(sock, b"}}")
    assert answer.startswith(b"HTTP/1.1 415 ")
    with house.connect() as sock:
        sock.sendall(POST + KIND + body + b"x-request-id: smuggled\r\n\r\n")
        answer = heard(sock, b"}}}")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"smuggled" not in answer


def test_no_request_is_told_as_all_errors_are(opening):
    house = opening("x", max_connections=2)
    with house.connect() as sock:
        sock.sendall(b"\x00nonsense\r\n\r\n")
        assert _error(heard(sock))["code"] == "invalid_request"
    with house.connect() as sock:
        sock.sendall(GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n")
        assert _error(heard(sock))["param"] == "headers"
    with house.connect(), house.connect(), house.connect() as sock:
        answer = heard(sock)
        assert (_error(answer)["code"], _error(answer)["param"]) == ("overloaded", "max_connections")
        assert b"\r\nretry-after: 1\r\n" in answer


def test_an_upgrade_is_refused_by_its_name(house):
    """Clients that try HTTP/2 first send one with a body, which the parser does not tell."""
    data = json.dumps(CHAT).encode()
    more = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(data)
    with house.connect() as sock:
        sock.sendall(POST + KIND + more + data)
        assert _error(heard(sock, b"}}"))["param"] == "upgrade"


ENDLESS = b"y" * 300_000


@pytest.mark.parametrize(
    "data",
    [
        GET + b"x: " + ENDLESS,
        GET + ENDLESS,
        b"GET /" + ENDLESS,
        POST + KIND + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;" + ENDLESS,
        POST + KIND + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx: " + ENDLESS,
    ],
    ids=["value", "name", "path", "extension", "trailer"],
)
def test_a_field_without_end(house, data):
    with house.connect() as sock:
        for start in range(0, len(data), 10_000):
            try:
                sock.sendall(data[start : start + 10_000])
            except ConnectionError:
                break
        until(lambda: not house.door.state.connections)


@pytest.mark.parametrize("junk", [b"junk\r\n\r\n", GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n"])
def test_no_error_is_told_in_the_middle_of_an_answer(opening, junk):
    house = opening("x" * 100, token_s=60.0)
    with house.connect() as sock:
        sock.sendall(post_of(CHAT | {"stream": True}))
        heard(sock, b'"x"')
        sock.sendall(junk)
        assert b"HTTP/1.1" not in heard(sock)
    until(lambda: not house.core.running)


def test_many_samples_are_refused_before_there_is_room_for_each(either, monkeypatch):
    """Lists for as many as somebody writes would end the server."""
    house = either("x")
    monkeypatch.delattr(endpoints, "_runs")
    monkeypatch.delattr(endpoints, "Joining")
    for path, prompt in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"})):
        for stream in (False, True):
            refused = house.post(path, prompt | {"n": 1 << 20, "stream": stream})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


# --- the log -------------------------------------------------------------------------------------------------


def test_strangers_cause_few_lines(opening, caplog):
    house = opening("x", max_connections=1)
    kept = []
    handler = logging.Handler()
    handler.addFilter(Sparing(lambda: 0.0))
    handler.emit = kept.append
    logging.getLogger().addHandler(handler)
    try:
        with house.connect() as sock:
            sock.sendall(GET + b"\r\n")
            heard(sock, b"}")
            for _ in range(30):
                with house.connect() as other:
                    heard(other)
        for _ in range(30):
            with house.connect() as sock:
                sock.sendall(b"\x00\r\n\r\n")
                heard(sock)
            until(lambda: not house.door.state.connections)
    finally:
        logging.getLogger().removeHandler(handler)
    assert 0 < len(kept) <= 20
