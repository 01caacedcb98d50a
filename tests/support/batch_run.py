"""Runs of `cierzo batch` in tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter

from cierzo.cli import main
from cierzo.engine.messages import Generate

LIMIT_S = 20.0


def a_line(name, url="/v1/chat/completions", method="POST", **body):
    if not body or url == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": f"I am {name}"}], **body}
    return {"custom_id": name, "method": method, "url": url, "body": body}


class Run:
    """The two files of a test, and the command."""

    def __init__(self, folder):
        self.requests, self.answers = folder / "in.jsonl", folder / "out.jsonl"
        self.lines = []

    def write(self, *lines):
        self.lines = lines
        told = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.requests.write_bytes(b"".join(each + b"\n" for each in told))

    def words(self, server, *options):
        return ["batch", str(self.requests), str(self.answers), "--rpc", server.address, *options]

    def __call__(self, server, *options):
        """The exit status; that of an interrupted one where it takes too long."""
        timer = threading.Timer(LIMIT_S, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        try:
            return main(self.words(server, *options))
        finally:
            timer.cancel()

    def start(self, server, *options):
        """The command as a process of its own."""
        words = [sys.executable, "-m", "cierzo", *self.words(server, *options)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def told(self):
        return [json.loads(line) for line in self.answers.read_bytes().split(b"\n")[:-1]]

    @property
    def good(self):
        """custom_id -> body of what is answered."""
        found = [each for each in self.told if each["response"] and each["response"]["status_code"] == 200]
        assert all(each["error"] is None for each in found)
        names = Counter(each["custom_id"] for each in found)
        assert not names or max(names.values()) == 1, names
        return {each["custom_id"]: each["response"]["body"] for each in found}

    @property
    def bad(self):
        """custom_id -> status and error of what is not; by line what is no request."""
        found = {}
        for each in self.told:
            if each["error"]:
                assert each["response"] is None
                found[each["error"]["line"]] = each["custom_id"], each["error"]
            elif each["response"]["status_code"] != 200:
                found[each["custom_id"]] = each["response"]["status_code"], each["response"]["body"]["error"]
        return found


def text_of(body):
    return body["choices"][0]["message"]["content"]


def echo(message: Generate):
    return message.messages[-1].content.removeprefix("I am ") if message.messages else "text"
