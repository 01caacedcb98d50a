"""The server of the HTTP door: uvicorn's protocol on sockets of ours, with TLS and bounds as the RPC has them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.address import TcpAddress, UnixAddress, parse_address
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.listening import LINGER_S, in_kernel, listen, peer_of, watch_socket
from cierzo.engine.frontend.tls import Tls
from cierzo.engine.frontend.tls_layer import TlsLayer
from cierzo.engine.gateway.app import make_app
from cierzo.engine.gateway.backend import Backends
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.guard import allowed_hosts
from cierzo.engine.gateway.house import House
from cierzo.engine.log_lines import BY_STRANGERS

log = logging.getLogger(__name__)

FAREWELL_S = 0.5  # in which whoever is cut short takes the error
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_PIPELINED = 16  # requests of a connection that wait for the one before
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def _by_strangers(record: logging.LogRecord) -> bool:
    """Mark uvicorn's lines about what is no HTTP: whoever connects can cause them."""
    if record.levelno <= logging.WARNING:
        record.__dict__.update(BY_STRANGERS)
    return True


class Connection(HttpToolsProtocol):
    """A connection of HTTP. Heads are bounded, in length and in time; who takes nothing for long is dropped."""

    def __init__(self, owner: HttpServer) -> None:
        super().__init__(owner.uvicorn, owner.state, {})
        self._owner = owner
        self._head_bytes = 0
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer has connected; it has `request_timeout_s` for its first request."""
        owner = self._owner
        if len(owner.state.connections) >= owner.frontend.max_connections:
            most = owner.frontend.max_connections
            log.warning("an HTTP connection is refused: max_connections is %d", most, extra=BY_STRANGERS)
            transport.write(TOO_MANY)
            transport.close()
            return
        transport.set_write_buffer_limits(high=owner.frontend.high_water_bytes)
        sock = transport.get_extra_info("socket")
        peer, is_local = peer_of(transport.get_extra_info("peername"))
        if sock is not None and sock.family != sock.family.AF_UNIX:
            watch_socket(sock, owner.frontend.keepalive_s)
        self.app_state = {
            "peer": peer,
            "is_local": is_local,
            "certificate": transport.get_extra_info("subject", ""),
        }
        super().connection_made(transport)
        owner.arriving.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        self._owner.arriving.discard(self)
        self._owner.stuck.discard(self)
        if self.transport is not None:
            super().connection_lost(exc)
        self._owner.left()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self.transport is not None and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins. A few may come before they are answered: each takes memory."""
        self._head_bytes = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
        self._owner.arriving.add(self)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the path."""
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._measure(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there."""
        self._owner.arriving.discard(self)
        if not self.transport.is_closing():
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The peer does not take what it is sent."""
        super().pause_writing()
        self._unread = self._left_unread()
        self._owner.stuck.add(self)

    def resume_writing(self) -> None:
        """The peer has taken it."""
        super().resume_writing()
        self._owner.stuck.discard(self)

    def look(self) -> None:
        """Drop the connection if its peer has taken nothing since the last look."""
        unread = self._left_unread()
        if unread >= self._unread:
            log.info("an HTTP connection is dropped: %d bytes were left unread", unread, extra=BY_STRANGERS)
            self.transport.abort()
            return
        self._unread = unread
        self._owner.stuck.add(self)

    def _left_unread(self) -> int:
        """Bytes that the peer has not taken."""
        return self.transport.get_write_buffer_size() + in_kernel(self.transport.get_extra_info("socket"))

    def late(self) -> None:
        """Drop the connection: its request did not come in time."""
        self.transport.abort()

    def _measure(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        is_long = self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS
        if is_long and not self.transport.is_closing():
            self.transport.write(TOO_LONG)
            self.transport.close()


class HttpServer:
    """Listens, and serves an application. `address`: with the port that was bound.

    frontend: the limits of connections, and TLS, that are those of the RPC. tls: of the RPC's server, if it has
    any, whose certificate is read anew there.
    """

    def __init__(
        self, config: HttpConfig, frontend: FrontendConfig, backends: Backends, tls: Tls | None = None
    ) -> None:
        self.config = config
        self.frontend = frontend
        self.address = config.http
        self.state = ServerState()
        self.stuck: Expiry[Connection] = Expiry(frontend.slow_reader_s, time.monotonic, Connection.look)
        self.arriving: Expiry[Connection] = Expiry(config.request_timeout_s, time.monotonic, Connection.late)
        self._tls = tls
        self._shaking: set[TlsLayer] = set()
        self._server: asyncio.Server | None = None
        self._socket_path: str | None = None
        self._empty = asyncio.Event()
        self._house = House(config)
        self.uvicorn = uvicorn.Config(
            self._app(backends),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=cast(int, config.idle_s),
        )
        self.uvicorn.load()
        logging.getLogger("uvicorn.error").addFilter(_by_strangers)  # once, however often it is said

    async def start(self) -> None:
        """Bind and listen. Raises ConfigError if the address is taken, or may not be served like this."""
        try:
            self._server = await listen(self.frontend, parse_address(self.config.http), self._protocol)
        except ConfigError as error:
            raise ConfigError(f"http: {error}", field="http", limit=error.limit, value=self.config.http) from error
        address = parse_address(self.config.http)
        if isinstance(address, UnixAddress):
            self._socket_path = address.path
        else:
            self.address = str(TcpAddress(address.host, self._server.sockets[0].getsockname()[1]))

    async def close(self, linger_s: float = LINGER_S) -> None:
        """Stop listening, wait for what is open, at most `linger_s`, and tell what is left that it is cut short."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for layer in list(self._shaking):
            layer.abort()
        for connection in list(self.state.connections):
            connection.shutdown()
        await self._emptied(linger_s)
        tasks = list(self.state.tasks)
        for task in tasks:
            task.cancel()
        await self._emptied(FAREWELL_S)
        for connection in list(self.state.connections):
            connection.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._house.close()
        await server.wait_closed()
        if self._socket_path is not None and os.path.exists(self._socket_path):
            os.unlink(self._socket_path)

    async def _emptied(self, within_s: float) -> None:
        """Wait until no connection is left, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.state.connections:
                    self._empty.clear()
                    await self._empty.wait()

    def left(self) -> None:
        """A connection is gone."""
        self._empty.set()

    def _app(self, backends: Backends) -> Any:
        address = parse_address(self.config.http)
        hosts = () if isinstance(address, UnixAddress) else allowed_hosts(address.host, self.config.http_host)
        return make_app(self._house, backends, hosts)

    def _protocol(self) -> asyncio.Protocol:
        """Whatever a peer meets first."""
        connection = Connection(self)
        if self._tls is None:
            return connection
        return TlsLayer(self._tls.context, self.frontend, connection, self._shaking, self._has_room)

    def _has_room(self) -> bool:
        return len(self.state.connections) + len(self._shaking) < self.frontend.max_connections
