"""The server of the HTTP door: uvicorn's protocol on sockets of ours, with TLS and bounds as the RPC has them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, cast

import uvicorn
from httptools import HttpParserError
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cierzo.engine.errors import CierzoError, ConfigError, InvalidRequest, Overloaded
from cierzo.engine.frontend.address import UnixAddress, parse_address
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.listening import LINGER_S, bound, in_kernel, listen, peer_of, unbind, watch_socket
from cierzo.engine.frontend.tls import Tls
from cierzo.engine.frontend.tls_layer import TlsLayer
from cierzo.engine.gateway.app import make_app
from cierzo.engine.gateway.backend import Backends
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.errors import encoded
from cierzo.engine.gateway.guard import allowed_hosts
from cierzo.engine.gateway.house import House
from cierzo.engine.log_lines import BY_STRANGERS

log = logging.getLogger(__name__)

FAREWELL_S = 0.5  # in which whoever is cut short takes the error
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_WAITING = 8  # requests of a connection that came before the one ahead of them was answered


def _last(status: bytes, error: CierzoError, more: bytes = b"") -> bytes:
    """An answer after which the connection is closed."""
    body = encoded(error)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%bconnection: close\r\n\r\n"
    return head % (status, len(body), more) + body


NO_HTTP = _last(b"400 Bad Request", InvalidRequest("this is no request of HTTP/1.1", field="request"))
TOO_MANY = _last(
    b"503 Service Unavailable",
    Overloaded("max_connections are open", field="max_connections", retry_after_s=1.0),
    b"retry-after: 1\r\n",
)
TOO_LONG = _last(
    b"431 Request Header Fields Too Large",
    InvalidRequest(
        f"a head has at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} fields",
        field="headers",
        limit=f"{MAX_HEAD_BYTES} bytes, {MAX_HEADERS} fields",
    ),
)


def _by_strangers(record: logging.LogRecord) -> bool:
    """Mark a line as caused by strangers: uvicorn writes none but about what peers send."""
    record.is_by_strangers = True
    return True


class Connection(HttpToolsProtocol):
    """A connection of HTTP. Heads are bounded, in length and in time; who takes nothing for long is dropped.

    Requests may follow each other unasked, a few at a time: each is begun when the one before has been answered.
    """

    def __init__(self, owner: HttpServer) -> None:
        super().__init__(owner.uvicorn, owner.state, {})
        self._owner = owner
        self._head_bytes = 0
        self._idle_bytes = 0  # that came since what they are part of began, or since some of a body came
        self._unread = 0
        self._is_in_head = False
        self._running: RequestResponseCycle | None = None

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
            self.pipeline.clear()
            if self._running is not None:  # it may not be the last one, which is all that uvicorn tells
                self._running.disconnected = True
                self._running.message_event.set()
        self._owner.left()

    def data_received(self, data: bytes) -> None:
        """Take what came. Also what is no beginning of a request yet, as empty lines, is to become one in time."""
        if self.transport is None or self.transport.is_closing():
            return
        if self._is_idle and self not in self._owner.arriving:
            self._owner.arriving.add(self)
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._end(TOO_LONG)  # of a field that has not ended, nobody else knows how long it is

    @property
    def _is_idle(self) -> bool:
        """Nothing is being answered."""
        return self._running is None or self._running.response_complete

    def send_400_response(self, msg: str) -> None:
        """End a connection on which something else than HTTP came."""
        self._end(NO_HTTP)

    def _end(self, last: bytes) -> None:
        """Close the connection, after this answer; in the middle of another one without a word."""
        if self._is_idle:
            self.transport.write(last)
            self.transport.close()
        else:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._head_bytes = self._idle_bytes = 0
        self._is_in_head = True
        self._owner.arriving.add(self)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the path."""
        self._measure(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What comes behind a body is none: no proxy that looks at heads has seen it."""
        self._measure(len(name) + len(value))
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._is_in_head = False
        if self.transport.is_closing():
            return
        if len(self.pipeline) >= MAX_WAITING:
            raise HttpParserError(f"more than {MAX_WAITING} requests wait")
        super().on_headers_complete()
        self.flow.resume_reading()  # else nobody would see the peer go away

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._idle_bytes = 0
        if self.transport.is_closing():
            return
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            raise HttpParserError("a long body comes before its turn")

    def on_message_complete(self) -> None:
        """The request is there."""
        self._idle_bytes = 0
        self._owner.arriving.discard(self)
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin with a request, whose turn it is."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

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
            self._end(TOO_LONG)


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
        logging.getLogger("uvicorn.error").addFilter(_by_strangers)

    async def start(self) -> None:
        """Bind and listen. Raises ConfigError if the address is taken, or may not be served like this."""
        address = parse_address(self.config.http)
        try:
            self._server = await listen(self.frontend, address, self._protocol)
        except ConfigError as error:
            raise ConfigError(f"http: {error}", field="http", limit=error.limit, value=self.config.http) from error
        self.address = str(bound(self._server, address))

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
        unbind(parse_address(self.address))

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
