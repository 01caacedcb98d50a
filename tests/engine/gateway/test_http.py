"""What HTTP itself asks of the door: heads, bodies, hosts, methods, names of requests, and bounds."""

from __future__ import annotations

import gzip
import json

import httpx2
import pytest
from http_house import CHAT, HttpHouse, heard

from cierzo import __version__
from cierzo.engine.errors import ConfigError
from cierzo.engine.gateway import remote

CHATS = "/v1/chat/completions"


def _error(answer):
    return answer.json()["error"]


def _said(house, data, end=b"\r\n\r\n"):
    """What comes back for raw bytes, up to `end`; None: to the end of the connection."""
    with house.connect() as sock:
        sock.sendall(data)
        return heard(sock, end)


# --- paths and methods ---------------------------------------------------------------------------------------


def test_probes_version_and_metrics(either):
    house = either("x")
    for path, name in {"/health": "ready", "/health/startup": "startup", "/health/live": "live"}.items():
        assert house.get(path).json() == {name: True, "state": "ready", "notes": []}
    assert house.get("/version").json() == {"version": __version__}
    house.health = "draining"
    ready = house.get("/health/ready")
    assert (ready.status_code, ready.json()["state"]) == (503, "draining")
    assert house.get("/health/live").status_code == 200


def test_metrics_of_a_server_and_none_of_a_gateway(opening):
    told = opening("x").get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    assert 'cierzo_state{state="ready"} 1.0' in told.text
    assert opening("x", remote=True).get("/metrics").status_code == 404


def test_a_gateway_lives_when_its_server_is_gone(opening, monkeypatch):
    monkeypatch.setattr(remote, "HEALTH_S", 0.2)
    house = opening("x", remote=True)
    house.leave()
    answer = house.get("/health/ready")
    assert (answer.status_code, answer.json()["state"]) == (503, "unreachable")
    assert house.get("/health/live").status_code == 200


def test_paths_that_are_none(house):
    missing = house.get("/v2/chat")
    assert (missing.status_code, _error(missing)["code"]) == (404, "not_found")
    assert house.get("/v1/models/").status_code == 404
    wrong = house.get(CHATS)
    assert (wrong.status_code, _error(wrong)["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert house.post("/version", {}).status_code == 405


def test_head_has_no_body(house):
    answer = httpx2.head(house.url + "/version")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


# --- heads ---------------------------------------------------------------------------------------------------


def test_names_of_a_request_come_back_and_go_on(house):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = house.post(CHATS, CHAT, headers={"x-request-id": "mine-1", "traceparent": trace})
    assert (answer.headers["x-request-id"], answer.headers["traceparent"]) == ("mine-1", trace)
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert (house.requests[-1].caller_id, house.requests[-1].traceparent) == ("mine-1", trace)


def test_names_that_are_none_are_not_taken(house):
    for wrong in ("a b", "x" * 129):
        answer = house.post(CHATS, CHAT, headers={"x-request-id": wrong, "traceparent": "nonsense"})
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] != wrong
        assert house.requests[-1].caller_id == answer.headers["x-request-id"]
        assert "traceparent" not in answer.headers
        assert house.requests[-1].traceparent == ""


def test_every_answer_tells_browsers_to_be_careful(house):
    for answer in (house.get("/version"), house.get("/none"), house.post(CHATS, CHAT)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "date" in answer.headers


def test_another_host_is_not_this_server(opening):
    house = opening("x", http={"http_host": ("llm.internal",)})
    for host in ("localhost:80", "127.0.0.1", "[::1]:8000", "LLM.internal", "llm.internal:8000"):
        assert house.get("/version", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        refused = house.post(CHATS, CHAT, headers={"host": host})
        assert (refused.status_code, _error(refused)["param"]) == (421, "host")
    assert not house.requests
    assert b" 421 " in _said(house, b"GET /version HTTP/1.1\r\n\r\n")


def test_a_header_that_is_there_twice(house):
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: a\r\nAuthorization: b\r\n\r\n" % CHATS.encode()
    assert b" 400 " in _said(house, head)


def test_pages_of_other_sites_may_not_call_unless_they_are_named(opening):
    house = opening("x", http={"cors_origin": ("https://mine.example",)})
    named = "content-type, x-stainless-retry-count"  # of OpenAI's own clients, which a page may have
    asks = {"access-control-request-method": "POST", "access-control-request-headers": named}

    def asked(origin):
        return httpx2.options(house.url + CHATS, headers={"origin": origin, **asks})

    allowed = asked("https://mine.example")
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://mine.example")
    assert "x-stainless-retry-count" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in asked("https://other.example").headers
    answer = house.post(CHATS, CHAT, headers={"origin": "https://mine.example"})
    assert answer.headers["access-control-allow-origin"] == "https://mine.example"
    assert "x-passed-over" in answer.headers["access-control-expose-headers"]


# --- bodies --------------------------------------------------------------------------------------------------


def test_a_body_is_plain_json(house):
    data = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = house.post(CHATS, content=data, headers={"content-type": kind})
        assert (refused.status_code, _error(refused)["param"]) == (415, "content-type")
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    refused = house.post(CHATS, content=gzip.compress(data), headers=headers)
    assert (refused.status_code, _error(refused)["param"]) == (415, "content-encoding")
    good = {"content-type": "Application/JSON; charset=utf-8", "content-encoding": "identity"}
    assert house.post(CHATS, content=data, headers=good).status_code == 200


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"model":"fake","model":"fake"}', b'{"model":NaN}', b'{"a":"\\ud800"}'],
)
def test_a_body_that_is_none(house, data):
    refused = house.post(CHATS, content=data, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert _error(refused)["type"] == "invalid_request_error"


def test_a_body_that_is_too_long(opening):
    house = opening("x", http={"max_body_bytes": 2048})
    long = CHAT | {"messages": [{"role": "user", "content": "x" * 4096}]}
    refused = house.post(CHATS, long)
    assert (refused.status_code, _error(refused)["code"]) == (413, "body_too_large")
    assert _error(refused)["limit"] == "2048"
    pieces = (b"x" * 1000 for _ in range(3))
    refused = house.post(CHATS, content=pieces, headers={"content-type": "application/json"})
    assert refused.status_code == 413
    assert house.post(CHATS, CHAT).status_code == 200


def test_a_body_that_is_too_deep(house):
    deep = b'{"model":"fake","messages":' + b"[" * 100 + b"]" * 100 + b"}"
    refused = house.post(CHATS, content=deep, headers={"content-type": "application/json"})
    assert (refused.status_code, _error(refused)["limit"]) == (400, "64 levels")


def test_an_unknown_field_is_refused_by_name_or_named_in_a_header(opening):
    body = CHAT | {"quux": 1}
    refused = opening("x").post(CHATS, body)
    assert (refused.status_code, _error(refused)["param"]) == (400, "quux")
    passed = opening("x", http={"lenient": True}).post(CHATS, body)
    assert (passed.status_code, passed.headers["x-passed-over"]) == (200, "quux")


# --- connections ---------------------------------------------------------------------------------------------


def test_bytes_that_are_no_http(house):
    assert b" 400 " in _said(house, b"\x00\x00\x00\x10nonsense\r\n\r\n")
    assert house.post(CHATS, CHAT).status_code == 200


def test_a_head_that_is_too_long(house):
    for line in (b"x: " + b"y" * 70_000, b"\r\n".join(b"h%d: 1" % number for number in range(200))):
        answer = _said(house, b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 431 ")
    assert house.get("/version").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /version HTTP/1.1\r\nHost:",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_request_that_does_not_arrive(opening, data):
    house = opening("x", http={"request_timeout_s": 0.2})
    assert _said(house, data, None) == b""


def test_a_connection_that_is_idle(opening):
    house = opening("x", http={"idle_s": 0.2})
    answer = _said(house, b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", None)
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many(opening):
    house = opening("x", max_connections=2)
    with house.connect(), house.connect():
        assert _said(house, b"").startswith(b"HTTP/1.1 503 ")


def test_requests_that_follow_each_other_on_a_connection(house):
    one = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
    answers = _said(house, (one + b"\r\n") * 2 + one + b"Connection: close\r\n\r\n", None)
    assert answers.count(b"HTTP/1.1 200 OK") == 3


def test_requests_that_come_too_many_at_a_time(house):
    one = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert _said(house, one * 200, None).count(b"HTTP/1.1 200 OK") < 200


# --- addresses -----------------------------------------------------------------------------------------------


def test_an_address_that_others_reach_is_guarded():
    with pytest.raises(ConfigError, match="reached from other machines") as refused:
        HttpHouse("x", http={"http": "0.0.0.0:0"}).__enter__()
    assert refused.value.field == "http"


def test_an_address_that_is_taken(house):
    with pytest.raises(ConfigError, match="cannot listen"):
        HttpHouse("x", http={"http": house.url.removeprefix("http://")}).__enter__()


def test_a_unix_socket(opening, tmp_path):
    path = tmp_path / "http.sock"
    opening("Hello", http={"http": f"unix:{path}"})
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path))) as client:
        answer = client.post("http://any.name" + CHATS, json=CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
