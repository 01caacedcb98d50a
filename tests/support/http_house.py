"""A fake server with an HTTP door, for clients of other people: answers as the test tells them."""

from __future__ import annotations

from typing import Any

from cierzo.engine.frontend.observe.web import MetricsServer
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.embedded import Embedded
from cierzo.engine.gateway.server import HttpServer
from cierzo.engine.testing.server import FakeServer


class HttpHouse(FakeServer):
    """`with HttpHouse("Hello") as house:`; clients go to `house.url`. http: fields of HttpConfig; the other
    keywords are those of FakeServer."""

    def __init__(self, *answers: Any, http: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(*answers, **options)
        self._http = HttpConfig(**{"http": "127.0.0.1:0", **(http or {})})
        self._door: HttpServer | None = None

    @property
    def url(self) -> str:
        """Where HTTP is served."""
        assert self._door is not None
        return f"http://{self._door.address}"

    async def _open(self) -> None:
        await super()._open()
        server = self._running.server
        metrics = MetricsServer(server.config, server.frontend)
        backends = Embedded(server, self._prompts, metrics.metrics)
        self._door = HttpServer(self._http, server.config, backends, server.tls)
        await self._door.start()

    async def _close(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            await door.close()
        await super()._close()
