"""A fake server with an HTTP door, for clients of other people: it answers as the test tells it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
from openai import OpenAI

from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.observe.web import MetricsServer
from cierzo.engine.gateway.backend import Backends
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.embedded import Embedded
from cierzo.engine.gateway.remote import Remote
from cierzo.engine.gateway.server import HttpServer
from cierzo.engine.testing.server import FakeServer

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "fake", "messages": MESSAGES}
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
KIND = b"Content-Type: application/json\r\n"
T = TypeVar("T")


class HttpHouse(FakeServer):
    """`with HttpHouse("Hello") as house:`; clients go to `house.url`, `house.post` is for tests that need none.

    remote: the door is a gateway before the server, and not in it; own_key: the gateway's. http: fields of
    HttpConfig; the other keywords are those of FakeServer.
    """

    def __init__(
        self,
        *answers: Any,
        remote: bool = False,
        own_key: str | None = None,
        http: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*answers, **options)
        self._http = HttpConfig(**{"http": "127.0.0.1:0", **(http or {})})
        self._is_remote, self._own_key = remote, own_key
        self._remote: Remote | None = None
        self.door: HttpServer | None = None

    @property
    def url(self) -> str:
        """Where HTTP is served."""
        assert self.door is not None
        return f"http://{self.door.address}"

    @property
    def host(self) -> tuple[str, int]:
        """The same, as a socket wants it."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def frontend(self) -> Any:
        """The front end behind it, in another thread."""
        return self._running.frontend

    @property
    def core(self) -> Any:
        """The core behind that: `running` has what runs."""
        return self._running._core._core

    def leave(self) -> None:
        """Have the server go, and not the door."""
        self._ask(self._running.close)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Answer of a GET."""
        return httpx2.get(self.url + path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx2.Response:
        """Answer of a POST."""
        return httpx2.post(self.url + path, **({} if json is None else {"json": json}), **options)

    def openai(self, **options: Any) -> OpenAI:
        """OpenAI's client, which tries nothing again unless it is told to."""
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def connect(self) -> socket.socket:
        """A connection of bytes."""
        return socket.create_connection(self.host, timeout=10)

    async def _open(self) -> None:
        await super()._open()
        server = self._running.server
        backends: Backends
        if self._is_remote:
            backends = self._remote = Remote(self._connect, lambda: self._connect(self._own_key))
            await self._remote.open()
        else:
            metrics = MetricsServer(server.config, server.frontend)
            backends = Embedded(server, self._prompts, metrics.metrics)
        self.door = HttpServer(self._http, server.config, backends, server.tls)
        await self.door.start()

    async def _close(self) -> None:
        door, self.door = self.door, None
        if door is not None:
            await door.close(0.2)
        if self._remote is not None:
            await self._remote.close()
        await super()._close()

    async def _connect(self, key: str | None) -> Client:
        return await Client.connect(self._running.server.address, key=key)


def post_of(body: Any) -> bytes:
    """The bytes of a request for an answer of a chat."""
    data = json.dumps(body).encode()
    return POST + KIND + b"Content-Length: %d\r\n\r\n" % len(data) + data


def heard(sock: socket.socket, end: bytes | None = None) -> bytes:
    """What comes on a connection, up to `end`, or all of it where that never comes."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while (end is None or end not in told) and (more := sock.recv(65536)):
            told += more
    return told


def until(condition: Callable[[], T], limit_s: float = 20.0) -> T:
    """Wait for what another thread or process does: the first true value of a condition."""
    until_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < until_s
        time.sleep(0.005)
    return found


def events_of(text: str) -> list[Any]:
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]


def die(*given: object) -> None:
    """End the process in which this is called."""
    os._exit(1)
