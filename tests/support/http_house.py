"""A fake server with an HTTP door, for clients of other people: it answers as the test tells it."""

from __future__ import annotations

import os
from typing import Any

import httpx2

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


def events_of(text: str) -> list[Any]:
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]


def die(*given: object) -> None:
    """End the process in which this is called."""
    os._exit(1)
