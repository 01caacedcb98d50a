"""Metrics and probes over HTTP, on an address of their own: GET and HEAD of four paths, one request a connection.

Readers take little of the loop: a page of metrics is made again once ten times the time that it took has passed, so
that scrapes cost a tenth of the loop at most, however many come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address
from time import perf_counter

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.frontend.address import Address, TcpAddress, UnixAddress, parse_address
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.listening import remove_stale, unbind
from cierzo.engine.frontend.observe.collector import Collector

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 32
TIMEOUT_S = 5.0  # of a connection
KEPT_TIMES = 10.0  # a page is told again for so many times the time that it took to make
PROBES = {"/health/startup": "startup", "/health/live": "live", "/health/ready": "ready"}
Page = tuple[HTTPStatus, str, bytes]  # status, content type, body


def metrics_address(config: FrontendConfig) -> Address | None:
    """The address to listen on, if there is one. Raises ConfigError for what is none."""
    if not config.metrics:
        return None
    try:
        return parse_address(config.metrics)
    except ConfigError as error:
        raise refusal("metrics", error.limit, config.metrics) from None


class MetricsServer:
    """Serves what `config.metrics` names, if it names anything. `address`: with the port that was bound."""

    def __init__(
        self, config: FrontendConfig, frontend: Frontend, clock: Callable[[], float] = perf_counter
    ) -> None:
        """clock: times how long a page takes to make."""
        self.address = config.metrics
        self._config = config
        self._frontend = frontend
        self._collector = Collector(frontend)
        self._clock = clock
        self._page = b""
        self._page_until = float("-inf")
        self._server: asyncio.Server | None = None
        self._answering: dict[asyncio.Task[None], bool] = {}  # oldest first; whether a head has come

    async def start(self) -> None:
        """Bind and listen. Raises ConfigError if the address is taken, or reached from other machines without
        `insecure`."""
        address = metrics_address(self._config)
        if address is None:
            return
        try:
            if isinstance(address, UnixAddress):
                remove_stale(address.path)
                self._server = await asyncio.start_unix_server(self._connected, address.path, limit=MAX_HEAD_BYTES)
                return
            self._server = await asyncio.start_server(
                self._connected, address.host, address.port, limit=MAX_HEAD_BYTES, start_serving=False
            )
        except OSError as error:
            raise ConfigError(
                f"metrics cannot listen on {address}: {error.strerror or error}",
                field="metrics",
                limit="an address that is free",
                value=address,
            ) from error
        names = [sock.getsockname() for sock in self._server.sockets]
        if not self._config.insecure and not all(ip_address(name[0]).is_loopback for name in names):
            self._server.close()
            raise refusal("metrics", "an address of this machine alone, unless insecure is given", str(address))
        self.address = str(TcpAddress(address.host, names[0][1]))
        await self._server.start_serving()

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._server is None:
            return
        self._server.close()
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        unbind(parse_address(self.address))

    def metrics(self) -> bytes:
        """The page of metrics, made now or a moment ago."""
        began = self._clock()
        if began >= self._page_until:
            self._page = generate_latest(self._collector)
            ended = self._clock()
            self._page_until = ended + KEPT_TIMES * (ended - began)
        return self._page

    def page(self, head: bytes) -> Page:
        """The answer to the head of a request."""
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _words(HTTPStatus.BAD_REQUEST)
        method, path = words[0], words[1].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _words(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, self.metrics()
        if path not in PROBES:
            return _words(HTTPStatus.NOT_FOUND)
        probes = self._frontend.probes
        is_well = getattr(probes, PROBES[path])
        told = {PROBES[path]: is_well, "state": self._frontend.health, "notes": probes.notes}
        status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
        return status, "application/json", msgspec.json.encode(told) + b"\n"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._answering) >= MAX_CONNECTIONS:  # a probe is always answered, so it is another one that goes
            oldest = min(self._answering, key=self._answering.__getitem__)  # that has sent no head, if any
            del self._answering[oldest]
            oldest.cancel()
        self._answering[task] = False
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._answer(reader, writer, task)
        except (OSError, TimeoutError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._answering.pop(task, None)
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[None]
    ) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            head, (status, kind, body) = b"", _words(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            status, kind, body = self.page(head)
        self._answering[task] = True
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("latin-1")
        )
        if not head.startswith(b"HEAD "):
            writer.write(body)
        await writer.drain()
        writer.write_eof()
        await reader.read(MAX_HEAD_BYTES)  # until the peer closes: a reset would take the answer with it


def _words(status: HTTPStatus) -> Page:
    return status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode()
