"""The peers' servers for our load generator: HTTP with server-sent events, one connection a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from cierzo.engine.errors import ConnectionLost
from cierzo.engine.messages import Delta

HOST = "127.0.0.1"
DATA, DONE = b"data: ", b"[DONE]"


class Dialect(msgspec.Struct, frozen=True):
    """How a server wants a request (prompt, number of tokens), and where its events carry token ids."""

    path: str
    body: Callable[[list[int], int], dict[str, Any]]
    token_ids: Callable[[dict[str, Any]], list[int]]


class HttpClient:
    """As much of `engine.frontend.client.Client` as the load generator uses."""

    def __init__(self, port: int, dialect: Dialect, vocab_size: int) -> None:
        self._port = port
        self._dialect = dialect
        self._vocab_size = vocab_size

    @classmethod
    async def connect(cls, port: int, dialect: Dialect, vocab_size: int) -> HttpClient:
        """Raises ConnectionLost unless the server says that it takes requests."""
        status, _ = await request(port, "GET", "/health")
        if status != 200:
            raise ConnectionLost(f"not ready: status {status}")
        return cls(port, dialect, vocab_size)

    async def generate(self, **asked: Any) -> AsyncIterator[Delta]:
        """Stream a greedy answer of exactly `max_tokens` to `token_ids`; nothing else of a request is heeded.

        Raises ConnectionLost for anything but status 200.
        """
        body = json.dumps(self._dialect.body(asked["token_ids"], asked["max_tokens"])).encode()
        async for event in _events(self._port, self._dialect.path, body):
            found = self._dialect.token_ids(json.loads(event))
            if found:
                yield Delta(stream=0, token_ids=found)

    async def model_info(self) -> Any:
        """The vocabulary's size is the checkpoint's."""
        return SimpleNamespace(vocab_size=self._vocab_size)

    async def close(self) -> None:
        """Nothing is open between requests."""


async def request(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request. Raises ConnectionLost."""
    reader, writer, status, chunked = await _open(port, method, path, body)
    try:
        parts = [part async for part in _body(reader, chunked)]
    finally:
        writer.close()
    return status, b"".join(parts)


async def _events(port: int, path: str, body: bytes) -> AsyncIterator[bytes]:
    """The data of each server-sent event, up to [DONE] or the end."""
    reader, writer, status, chunked = await _open(port, "POST", path, body)
    try:
        unread = b""
        async for part in _body(reader, chunked):
            *lines, unread = (unread + part).split(b"\n")
            if status != 200:
                raise ConnectionLost(f"status {status}: {(unread or lines[0]).decode(errors='replace')[:200]}")
            for line in lines:
                if line.startswith(DATA) and line[len(DATA) :].strip() != DONE:
                    yield line[len(DATA) :]
    finally:
        writer.close()


async def _open(
    port: int, method: str, path: str, body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int, bool]:
    """Send a request and read the head of its answer: (reader, writer, status, whether it comes in chunks)."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    except (OSError, EOFError) as error:
        raise ConnectionLost(f"port {port}: {error}") from error
    return reader, writer, int(answer.split()[1]), "transfer-encoding: chunked" in answer


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises ConnectionLost where it is cut short."""
    try:
        while chunked:
            size = int((await reader.readline()).partition(b";")[0], 16)
            part = await reader.readexactly(size + 2)
            if size == 0:
                return
            yield part[:-2]
        while part := await reader.read(1 << 16):
            yield part
    except (OSError, EOFError, ValueError) as error:
        raise ConnectionLost(f"the answer was cut short: {error}") from error
