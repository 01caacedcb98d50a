"""Connections of peers that mean harm: what they hold, what they cost, and what they make the server say."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time

import pytest
from http_house import CHAT

from cierzo.engine.gateway import server
from cierzo.engine.log_lines import Sparing

GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
KIND = b"Content-Type: application/json\r\n"


def _until(condition, limit_s=10.0):
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def _post(body):
    data = json.dumps(body).encode()
    return POST + KIND + b"Content-Length: %d\r\n\r\n" % len(data) + data


def _connected(house):
    return contextlib.closing(socket.create_connection(house.host, timeout=10))


def _heard(sock, until=b"nothing of the kind"):
    heard = b""
    with contextlib.suppress(ConnectionError):
        while until not in heard and (more := sock.recv(65536)):
            heard += more
    return heard


def _error(heard):
    return json.loads(heard.rpartition(b"\r\n\r\n")[2])["error"]


# --- time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n\r\n\r\n"])
def test_empty_lines_keep_no_connection(opening, more):
    house = opening("x", http={"idle_s": 60.0, "request_timeout_s": 0.2})
    with _connected(house) as sock:
        sock.sendall(GET + b"\r\n")
        _heard(sock, b"}")
        sock.sendall(more)
        assert _heard(sock) == b""


def test_empty_lines_do_not_hurry_the_answer_under_way(opening):
    house = opening("x" * 3, token_s=0.15, http={"request_timeout_s": 0.2})
    with _connected(house) as sock:
        sock.sendall(_post(CHAT))
        time.sleep(0.05)  # the request is under way, and is not late, whatever comes now
        sock.sendall(b"\r\n")
        assert b'"xxx"' in _heard(sock, b"}}}")


# --- requests that follow each other -------------------------------------------------------------------------


def test_few_requests_wait_for_their_turn(opening):
    """Each would cost memory, and time of a single turn of the loop."""
    house = opening("x", token_s=60.0)
    with _connected(house) as sock:
        sock.sendall(_post(CHAT | {"stream": True}))
        _heard(sock, b'"role"')
        with contextlib.suppress(ConnectionError):
            sock.sendall((GET + b"\r\n") * (server.MAX_WAITING + 1))
        _until(lambda: not house.door.state.connections)
    _until(lambda: not house.core.running)
    _until(lambda: not house.door.state.tasks)


def test_a_long_body_does_not_come_before_its_turn(opening):
    house = opening("x", token_s=60.0)
    with _connected(house) as sock:
        sock.sendall(_post(CHAT | {"stream": True}))
        _heard(sock, b'"role"')
        with contextlib.suppress(ConnectionError):
            sock.sendall(_post(CHAT | {"user": "x" * 200_000}))
        _until(lambda: not house.door.state.connections)
    _until(lambda: not house.door.state.tasks)


@pytest.mark.parametrize("stream", [True, False])
def test_a_peer_that_goes_away_is_seen_also_if_it_asked_for_more(opening, stream, caplog):
    house = opening("x" * 100, token_s=60.0)
    with _connected(house) as sock:
        sock.sendall(_post(CHAT | {"stream": stream}) + GET + b"\r\n")
        _until(lambda: len(house.core.running) == 1)
    _until(lambda: not house.core.running)
    _until(lambda: not house.door.state.tasks)
    assert "Traceback" not in caplog.text


# --- heads ---------------------------------------------------------------------------------------------------


def test_what_comes_behind_a_body_is_no_header(house):
    data = json.dumps(CHAT).encode()
    body = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(data), data)
    with _connected(house) as sock:
        sock.sendall(POST + body + KIND + b"\r\n")
        heard = _heard(sock, b"}}")
    assert heard.startswith(b"HTTP/1.1 415 ")
    with _connected(house) as sock:
        sock.sendall(POST + KIND + body + b"x-request-id: smuggled\r\n\r\n")
        heard = _heard(sock, b"}}}")
    assert heard.startswith(b"HTTP/1.1 200 ")
    assert b"smuggled" not in heard


def test_no_request_is_told_as_all_errors_are(opening):
    house = opening("x", max_connections=2)
    with _connected(house) as sock:
        sock.sendall(b"\x00nonsense\r\n\r\n")
        assert _error(_heard(sock))["code"] == "invalid_request"
    with _connected(house) as sock:
        sock.sendall(GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n")
        assert _error(_heard(sock))["param"] == "headers"
    with _connected(house), _connected(house), _connected(house) as sock:
        heard = _heard(sock)
        assert (_error(heard)["code"], _error(heard)["param"]) == ("overloaded", "max_connections")
        assert b"\r\nretry-after: 1\r\n" in heard


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
    with _connected(house) as sock:
        for start in range(0, len(data), 10_000):
            try:
                sock.sendall(data[start : start + 10_000])
            except ConnectionError:
                break
        _until(lambda: not house.door.state.connections)


@pytest.mark.parametrize("junk", [b"junk\r\n\r\n", GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n"])
def test_no_error_is_told_in_the_middle_of_an_answer(opening, junk):
    house = opening("x" * 100, token_s=60.0)
    with _connected(house) as sock:
        sock.sendall(_post(CHAT | {"stream": True}))
        _heard(sock, b'"x"')
        sock.sendall(junk)
        assert b"HTTP/1.1" not in _heard(sock)
    _until(lambda: not house.core.running)


def test_many_samples_are_refused_before_there_is_room_for_each(either):
    """A list of so many would end the server."""
    house = either("x")
    for path, prompt in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"})):
        for stream in (False, True):
            refused = house.post(path, prompt | {"n": 1 << 40, "stream": stream})
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
        with _connected(house) as sock:
            sock.sendall(GET + b"\r\n")
            _heard(sock, b"}")
            for _ in range(30):
                with _connected(house) as other:
                    _heard(other)
        for _ in range(30):
            with _connected(house) as sock:
                sock.sendall(b"\x00\r\n\r\n")
                _heard(sock)
            _until(lambda: not house.door.state.connections)
    finally:
        logging.getLogger().removeHandler(handler)
    assert 0 < len(kept) <= 20
