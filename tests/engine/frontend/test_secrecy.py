"""A server's log tells how requests ended, and nothing that they said or were answered: on real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import msgspec
import pytest

from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import FEATURES, Hello
from cierzo.engine.text.short_tekken import short_tekken
from cierzo.engine.weights.make import make_checkpoint

MARK = "xyzzymark"
DEADLINE_S = 30


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A checkpoint that takes words, chats and tools."""
    folder = tmp_path_factory.mktemp("speaking") / "tiny"
    return make_checkpoint(folder, like="small4", tokenizer=short_tekken)


def requests():
    """Requests that say the mark wherever something can be said; most are refused."""
    turn = {"role": "user", "content": MARK}
    tool = {"name": MARK, "description": MARK, "parameters": {MARK: MARK}}
    yield {"text": MARK * 10}
    yield {"text": MARK * 5000}  # which an encoder process takes
    yield {"messages": [turn]}
    yield {"messages": [turn], "tools": [tool], "reasoning_effort": MARK}
    yield {"messages": [{**turn, "role": MARK}]}
    yield {"messages": [turn], "tools": [{**tool, "name": MARK + " "}]}
    yield {"messages": [turn], "tools": [{**tool, "parameters": {"type": MARK, "properties": {MARK: 7}}}]}
    yield {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": MARK, "arguments": MARK}]}]}
    yield {"messages": [{"role": "tool", "content": MARK, "tool_call_id": MARK, "name": MARK}]}
    yield {"text": MARK, "sampling": {"stop": [MARK * 100]}}
    yield {"text": MARK, "sampling": {"bad_words": [MARK * 100, ""]}}
    yield {"text": MARK, "sampling": {MARK: MARK}}
    yield {"text": MARK, "suffix": MARK}
    yield {"text": MARK, MARK: MARK}
    yield {"text": {MARK: MARK}, "idempotency_key": MARK * 1000}
    yield {"text": MARK, "idempotency_key": MARK}
    yield {"text": MARK + "2", "idempotency_key": MARK}
    yield {"attached": MARK}
    yield {"text": MARK, "deadline_s": 1e-9}


def attack(address):
    """Send them all, and frames that are none."""

    def frames(*messages):
        bodies = [msgspec.msgpack.encode(message) for message in messages]
        return b"".join(len(body).to_bytes(4, "big") + body for body in bodies)

    hello = Hello(client=MARK, features=[*FEATURES], key=MARK)
    asked = [{"type": "generate", "stream": number, **each} for number, each in enumerate(requests())]
    asked += [{"type": MARK, "stream": 900}, {"type": "resume", "stream": 901, "request_id": MARK, "received": [1]}]
    for begins, last in ((frames(hello, *asked), b""), (frames({"type": "hello", "magic": MARK}), b"")):
        _say(address, begins + last)
    for rubbish in (b"GET /" + MARK.encode() + b" HTTP/1.1\r\n\r\n", frames(MARK), MARK.encode() * 100):
        _say(address, rubbish)
    return len(asked) - 2


def _say(address, data):
    """Say it, and read until the server has answered all, or closes."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(1.0)
        peer.connect(address)
        peer.sendall(data)
        try:
            while peer.recv(1 << 16):
                pass
        except TimeoutError:
            pass


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_log_has_what_a_request_said(speaking, tmp_path, log_format):
    address, usage = tmp_path / "rpc.sock", tmp_path / "usage.jsonl"
    options = [*("--rpc", f"unix:{address}"), *("--log-format", log_format), *("--usage-file", str(usage))]
    command = [sys.executable, "-m", "cierzo", "serve", str(speaking), "--runner", "fake", *options]
    with open(tmp_path / "log", "wb") as log:
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout is not None
        assert any(line.startswith("ready: ") for line in server.stdout)
        num_asked = attack(str(address))
        with SyncClient(f"unix:{address}") as client:
            going = client.generate(text=MARK, max_tokens=5000, ignore_eos=True)
            next(going)
            going.cancel()
            for _ in going:
                pass
        server.send_signal(signal.SIGTERM)
        said = server.stdout.read()
        assert server.wait(DEADLINE_S) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    text = (tmp_path / "log").read_text(encoding="utf-8")
    for told in (text, said, usage.read_text(encoding="utf-8")):
        assert MARK not in told.lower()
    assert text
    records = [msgspec.json.decode(line) for line in usage.read_bytes().splitlines()]
    assert len(records) >= num_asked, "each has its record"
    if log_format == "json":
        lines = [msgspec.json.decode(line) for line in text.splitlines()]
        ends = [line for line in lines if "why" in line]
        unplanned = [each for each in records if not {*each["end"]} <= {"stop", "length", "tool_calls"}]
        assert [each["why"] for each in ends] == [",".join(each["end"]) for each in unplanned]
        assert {"cancelled", "invalid_request"} <= {each["why"] for each in ends}
        fields = {"request_id", "caller_id", "traceparent", "tenant", "peer", "why", "limit"}
        assert all(fields <= set(each) for each in ends)
