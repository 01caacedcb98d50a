"""The peers' servers for our load generator: HTTP with server-sent events, one connection a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from http.client import HTTPException
from types import SimpleNamespace
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import msgspec

from cierzo.bench.peers.process import HOST
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.messages import Delta

HEAD = "POST {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n"
HEAD += "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
TIMEOUT_S = 60.0
EVENT, DONE = b"data: ", b"[DONE]"


class HttpClient(msgspec.Struct, frozen=True):
    """As much of `engine.frontend.client.Client` as the load generator uses, for a server on a loopback port.

    body: makes a request of a prompt and a number of tokens; token_ids: what an event of the answer carries.
    """

    port: int
    path: str
    body: Callable[[list[int], int], dict[str, Any]]
    token_ids: Callable[[dict[str, Any]], list[int]]
    vocab_size: int

    async def connect(self, _: str) -> HttpClient:
        """Itself: nothing is open between requests. Raises ConnectionLost unless the server takes requests."""
        request(self.port, "/health")
        return self

    async def generate(self, **asked: Any) -> AsyncIterator[Delta]:
        """Stream a greedy answer of exactly `max_tokens` to `token_ids`; nothing else of a request is heeded.

        Raises ConnectionLost for anything but a whole answer of status 200.
        """
        body = json.dumps(self.body(asked["token_ids"], asked["max_tokens"])).encode()
        async for event in _events(self.port, HEAD.format(self.path, HOST, len(body)).encode() + body):
            if found := self.token_ids(event):
                yield Delta(stream=0, token_ids=found)

    async def model_info(self) -> Any:
        """The vocabulary's size is the checkpoint's."""
        return SimpleNamespace(vocab_size=self.vocab_size)

    async def close(self) -> None:
        """Nothing to let go of."""


def request(port: int, path: str, body: bytes | None = None) -> bytes:
    """Body of the answer to a GET, or to a POST of JSON. Raises ConnectionLost for a failure, or a refusal."""
    asked = Request(f"http://{HOST}:{port}{path}", body, {"Content-Type": "application/json"})
    try:
        with build_opener(ProxyHandler({})).open(asked, timeout=TIMEOUT_S) as answer:  # by no proxy
            return answer.read()
    except (OSError, HTTPException) as error:
        raise ConnectionLost(f"port {port}: {error}") from error


async def _events(port: int, request: bytes) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an answer in chunks, up to [DONE] or the end. Raises ConnectionLost."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        with closing(writer):
            writer.write(request)
            status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
            if status != 200:
                body = (await reader.read()).decode(errors="replace")
                raise ConnectionLost(f"status {status}: {body[:200]}")
            unread = b""
            while size := int((await reader.readline()).partition(b";")[0], 16):
                part = (await reader.readexactly(size + 2))[:-2]
                *lines, unread = (unread + part).split(b"\n")
                for line in lines:
                    if line.startswith(EVENT) and not line.startswith(EVENT + DONE):
                        yield json.loads(line.removeprefix(EVENT))
    except (OSError, EOFError, ValueError) as error:
        raise ConnectionLost(f"port {port}, the answer was cut short: {error}") from error
