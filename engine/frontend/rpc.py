"""The RPC server: sockets, frames, handshake, and what happens to bytes that are not the protocol.

docs/rpc.md is the protocol in words. Nothing a peer sends ends the server: a message that cannot be decoded but
whose stream id can be read ends that stream; anything worse ends that connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import msgspec

from cierzo import __version__
from cierzo.engine.errors import CierzoError, ProtocolError, refusal
from cierzo.engine.frontend.address import UnixAddress, parse_address
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frame_reader import SMALL_FRAME_BYTES, FrameReader, Large, Skipped
from cierzo.engine.frontend.frames import Buffer, in_batches, pack
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.keepalive import Keepalive
from cierzo.engine.frontend.keys import Door, digest_of
from cierzo.engine.frontend.limits import require_room
from cierzo.engine.frontend.listening import LINGER_S, bound, in_kernel, listen, peer_of, unbind, watch_socket
from cierzo.engine.frontend.methods import Methods
from cierzo.engine.frontend.receiving import foreign, greeting, receive_large, receive_skipped, receive_small
from cierzo.engine.frontend.tenants import EVERYBODY, Visitor
from cierzo.engine.frontend.tls import Tls
from cierzo.engine.frontend.tls_layer import TlsLayer
from cierzo.engine.frontend.turns import Turns
from cierzo.engine.frontend.versions import as_version_2
from cierzo.engine.log_lines import BY_STRANGERS
from cierzo.engine.messages import FEATURES, OLDEST_VERSION, PROTOCOL_VERSION, Limits, Message, Ping, Welcome

log = logging.getLogger(__name__)

FEATURE_OF_LIMIT = {
    "max_attached_bytes": "attach",
    "stream_credit_bytes": "credit",
    "keepalive_s": "keepalive",
    **dict.fromkeys(("max_images", "max_image_bytes", "max_image_pixels", "max_image_tokens"), "images"),
}
MAX_REFUSED = 16  # connections past `max_connections` that may linger: each has a descriptor


class Connection(asyncio.Protocol):
    """A client's connection. All messages that are `put` in a turn of the loop leave in one write at its end."""

    def __init__(self, server: RpcServer) -> None:
        self.features: frozenset[str] = frozenset()
        self.access = EVERYBODY
        self.visitor = Visitor()
        self.peer = ""
        self.subject = ""  # of its certificate, where clients show one
        self._server = server
        self._frames = FrameReader(SMALL_FRAME_BYTES, server.frontend.budget)  # until it has said hello
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keepalive: Keepalive | None = None
        self._version = PROTOCOL_VERSION
        self._has_spoken = self._welcomed = self._is_local = self._ending = False
        self.is_paused = False
        self.is_refused = False  # it is one too many
        self._is_full = False
        self._pieces: Iterator[Buffer] | None = None  # of a frame that is half sent
        self._is_deaf = False  # nothing more is read from a peer that lets too many answers wait
        self._num_written = self._num_taken = 0
        self._outbox: list[Message] = []
        self._late = bytearray()  # frames that wait for a slow reader; no deltas, which wait in their streams' logs

    # --- asyncio.Protocol ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer has connected; it has `handshake_timeout_s` to say Hello."""
        config = self._server.config
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=config.high_water_bytes)
        self.subject = self._transport.get_extra_info("subject", "")
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            watch_socket(sock, config.keepalive_s)
        self.peer, self._is_local = peer_of(transport.get_extra_info("peername"))
        self._timer = asyncio.get_running_loop().call_later(config.handshake_timeout_s, self._silent)
        try:
            self._server.joined(self)
        except CierzoError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone, or we closed: its streams are cancelled."""
        self._ending = True
        if self._timer is not None:
            self._timer.cancel()
        if self._keepalive is not None:
            self._keepalive.cancel()
        self._frames.close()
        self._outbox.clear()
        self._late.clear()
        self._server.deaf.discard(self)
        # they know us, and the cycle collector comes so rarely that the cycles would gather for hours
        self._transport = self._keepalive = self._timer = self._pieces = None
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        """Take what came, however it is cut."""
        if self._ending:
            return
        if self._keepalive is not None:
            self._keepalive.heard()
        if not self._has_spoken and (protocol := foreign(data)) is not None:
            self._turn_away(*protocol)
            return
        self._has_spoken = True
        self._frames.feed(data)
        self._server.turns.enter(self)

    # --- turns.Worker ----------------------------------------------------------------------------------

    def work(self, until: float) -> bool:
        """Work off what came, until the clock shows `until`; True if something is left."""
        clock = self._server.turns.clock
        try:
            while not (self._ending or self._is_deaf) and (frame := self._frames.next()) is not None:
                self._receive(frame)
                if clock() >= until:
                    break
            else:
                return False
            return not self._ending
        except CierzoError as error:
            self._end(error)
            return False

    def look_again(self, door: Door) -> None:
        """The keys have changed: end a connection that is nobody's now, or another one's."""
        if not self._welcomed or self._ending:
            return
        try:
            self.access = door.again(self.visitor, self.access)
        except CierzoError as error:
            log.warning("a connection from %s is closed: %s", self.peer, error.message)
            self._end(error)

    def hold(self) -> None:
        """Read no more from the peer: what came waits for its turn."""
        if self._transport is not None:
            self._transport.pause_reading()

    def release(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing() and not self._is_deaf:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        """Half-closed counts as closed."""
        return False

    def pause_writing(self) -> None:
        """The peer reads too slowly: from now on its streams keep their output."""
        self._is_full = self.is_paused = True

    def resume_writing(self) -> None:
        """The peer has caught up: send the rest of a frame, what waited, then what the streams have."""
        self._is_full = False
        self._go_on()

    # --- Sink ------------------------------------------------------------------------------------------

    def put(self, message: Message) -> None:
        """Add to what is sent at the end of this turn of the loop; of a full connection, to what waits."""
        message = message if self._version > OLDEST_VERSION else as_version_2(message)
        if self.is_paused:
            self._wait((message,))
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def put_frame(self, pieces: Iterator[Buffer]) -> None:
        """Send a frame in pieces, one in a turn of the loop; meanwhile the connection counts as full."""
        self._flush()
        self.is_paused = True
        self._pieces = pieces
        self._go_on()

    @property
    def num_taken(self) -> int:
        """Bytes that the peer's kernel has taken: finer than the events of a connection that was full."""
        if self._transport is None or self._transport.is_closing():
            return self._num_written
        queued = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        written = self._transport.get_extra_info("num_written", self._num_written)  # TLS counts what it makes of it
        return written - queued - in_kernel(sock)

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were put, and that the kernel has not taken yet."""
        if self._transport is None or self._ending:
            return 0
        waits = bool(self._outbox) + (self._pieces is not None)
        return self._transport.get_write_buffer_size() + len(self._late) + waits

    def drop(self) -> None:
        """Close at once."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """Close once the peer has all that was put, or after a while."""
        if self._ending or self._transport is None:
            return
        self._ending = True
        self._close(bytes(self._packed(self._outbox) + self._late))
        self._server.frontend.disconnect(self)

    # --- inside ----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write what was put while there was room, also if there is none any more: it comes before what waits."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None and not self._ending:
            self._write(self._packed(outbox))

    def _packed(self, messages: Iterable[Message]) -> bytearray:
        return pack(in_batches(messages) if "batches" in self.features else messages)

    def _wait(self, messages: Sequence[Message]) -> None:
        """Keep what is no delta until there is room. Who lets too much of it wait is not heard until then: what it
        asks stays in its own buffers."""
        if self._transport is None or self._ending:
            return
        self._late += pack(messages)
        if len(self._late) > self._server.config.max_pending_bytes and not self._is_deaf:
            self._is_deaf = True
            self._num_taken = self.num_taken
            self._server.deaf.add(self)
            self.hold()

    def look(self) -> None:
        """End a connection that is not heard, if its peer has taken nothing since the last look."""
        taken, config = self.num_taken, self._server.config
        if taken == self._num_taken:
            text = "closing a connection: more than %d bytes of answers were left unread for %g s"
            log.error(text, config.max_pending_bytes, config.slow_reader_s)
            self.drop()
            return
        self._num_taken = taken
        self._server.deaf.add(self)
        if self._keepalive is not None:
            self._keepalive.heard()  # taking is a sign of life as well

    def _write(self, data: Buffer) -> None:
        assert self._transport is not None
        self._num_written += len(data)
        self._transport.write(data)

    def _go_on(self) -> None:
        """Write what has waited for room, if there is room."""
        if self._transport is None or self._ending or self._is_full or not self.is_paused:
            return
        self._flush()
        if self._is_full:  # by what was flushed
            return
        if self._pieces is not None:
            if (piece := next(self._pieces, None)) is not None:
                self._write(piece)
                if not self._is_full:
                    asyncio.get_running_loop().call_soon(self._go_on)
                return
            self._pieces = None
        self.is_paused = False
        late, self._late = self._late, bytearray()
        if late:
            self._write(late)
        if self._is_deaf:
            self._is_deaf = False
            self._server.deaf.discard(self)
            self.release()
            self._server.turns.enter(self)
        self._server.frontend.writable(self)

    def _receive(self, frame: memoryview | Large | Skipped) -> None:
        if not self._welcomed:
            self._greet(frame)
        elif isinstance(frame, Large):
            receive_large(self, self._server.methods, self._server.frontend, frame)
        elif isinstance(frame, Skipped):
            receive_skipped(self, self._server.frontend, frame)
        else:
            receive_small(self, self._server.methods, self._server.frontend, frame)

    def _greet(self, frame: memoryview | Large | Skipped) -> None:
        if isinstance(frame, Skipped):
            raise frame.error
        assert not isinstance(frame, Large), "longer ones are skipped before hello"
        hello = greeting(frame)
        self.visitor = Visitor(digest_of(hello.key), self.subject, self._is_local)
        try:
            self.access = self._server.door.access(self.visitor)
        except CierzoError:
            log.warning("no key that is known came from %s: it is closed", self.peer, extra=BY_STRANGERS)
            raise
        frames, config = self._frames, self._server.config
        frames.tenant, frames.max_frame_bytes = self.access.tenant.name, config.max_frame_bytes
        self._welcomed = True
        self._version = hello.version
        if hello.version > OLDEST_VERSION:
            self.features = frozenset(FEATURES).intersection(hello.features)
        if self._timer is not None:
            self._timer.cancel()
        if "keepalive" in self.features:
            self._keepalive = Keepalive(config.keepalive_s, self._ping, self._gone)
        self._server.frontend.connect(self)
        self.put(self._server.welcome(hello.version, self.features))

    def _turn_away(self, protocol: str, answer: bytes) -> None:
        """The peer speaks another protocol: say so in its own words, where it has some."""
        log.warning("%s came to the RPC's port from %s: it is closed", protocol, self.peer, extra=BY_STRANGERS)
        self._ending = True
        self._close(answer)

    def _ping(self) -> None:
        self.put(Ping(stream=0))

    def _gone(self) -> None:
        """The peer has not answered a ping."""
        limit = self._server.config.keepalive_s
        self._end(ProtocolError("the client did not answer a ping in time", field="keepalive_s", limit=limit))

    def _silent(self) -> None:
        """The handshake did not come in time."""
        limit = self._server.config.handshake_timeout_s
        self._end(ProtocolError("no hello came in time", field="handshake_timeout_s", limit=limit))

    def _end(self, error: CierzoError) -> None:
        """Say why, stop writing, and read on until the peer closes: closing with bytes unread would reset the
        connection and take the reason with it."""
        if self._ending or self._transport is None:
            return
        self.put(failure(-1, error))
        self.finish()

    def _close(self, last_words: bytes) -> None:
        if self._transport is None:
            return
        self._is_deaf = False
        self.release()
        self._frames.close()
        for piece in self._pieces or ():
            self._transport.write(piece)
        self._transport.write(last_words)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        for timer in (self._timer, self._keepalive):
            if timer is not None:
                timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)


class Visit(Protocol):
    """Somebody who has come in by a key, and is still there."""

    def look_again(self, door: Door) -> None:
        """The keys have changed: end it if it is nobody's now, or another tenant's."""
        ...


class RpcServer:
    """Listens, and keeps the set of connections."""

    def __init__(self, config: FrontendConfig, frontend: Frontend) -> None:
        """Raises ConfigError for a key file that is wrong."""
        self.config = config
        self.frontend = frontend
        self.door = Door(config.keys)
        self._arrange()
        self.methods = Methods(frontend)
        self.turns = Turns()
        self.deaf: Expiry[Connection] = Expiry(config.slow_reader_s, time.monotonic, Connection.look)
        self.address = config.address
        self._connections: set[Connection] = set()
        self.visits: set[Visit] = set()  # that came by another door, with the same keys
        self._num_refused = 0  # of these, those past `max_connections`
        self._server: asyncio.Server | None = None
        self.tls: Tls | None = None
        self._shaking: set[TlsLayer] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Bind and listen. `address` then names the port that was bound. Raises ConfigError if it is taken, or may
        not be served like this."""
        address, config = parse_address(self.config.address), self.config
        if config.tls_certificate or config.tls_key or config.tls_client_ca:
            if isinstance(address, UnixAddress):
                raise refusal("address", "HOST:PORT with TLS", str(address), "a Unix socket has none")
            self.tls = Tls(config)
        self._server = await listen(config, address, self._protocol)
        self.address = str(bound(self._server, address))
        if self.tls is not None:
            self.tls.start()
            self.frontend.notes.append(self.tls.note)
            self.frontend.observer.certificate_expires_s = self.tls.expires_s

    def reload(self) -> None:
        """Read certificate and keys anew; connections of keys that are gone end. What is wrong changes nothing."""
        if self.tls is not None:
            self.tls.reload()
        if self.door.reload():
            self._arrange()
            for visit in (*self._connections, *self.visits):
                visit.look_again(self.door)

    async def close(self) -> None:
        """Stop listening, send every connection what is left for it, and wait until they are gone: at most
        `LINGER_S`."""
        if self._server is not None:
            self._server.close()
        if self.tls is not None:
            self.tls.close()
        for layer in list(self._shaking):
            layer.abort()
        for connection in list(self._connections):
            connection.finish()
        await self._empty.wait()
        if self._server is not None:
            await self._server.wait_closed()
            unbind(parse_address(self.address))

    def welcome(self, version: int, features: frozenset[str]) -> Welcome:
        """The answer to a Hello of this version, to which these features are granted."""
        config, model = self.config, self.frontend.model
        limits = Limits(
            max_frame_bytes=config.max_frame_bytes,
            max_streams=config.max_streams_per_connection,
            max_model_len=model.max_model_len,
            max_samples=config.max_samples,
        )
        told = {name: getattr(config, name) for name, feature in FEATURE_OF_LIMIT.items() if feature in features}
        return Welcome(
            version=version,
            server=f"cierzo {__version__}",
            model=model.name,
            limits=msgspec.structs.replace(limits, **told),
            features=sorted(features),
        )

    def joined(self, connection: Connection) -> None:
        """Count a connection, until it leaves. Raises Overloaded if it is one too many."""
        self._empty.clear()
        num_connections = len(self._connections) - self._num_refused + 1
        self._connections.add(connection)
        try:
            require_room(self.config, "max_connections", num_connections)
        except CierzoError:
            connection.is_refused = True
            self._num_refused += 1
            if self._num_refused > MAX_REFUSED:
                connection.drop()
            raise

    def left(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self._num_refused -= connection.is_refused
        self.frontend.disconnect(connection)
        if not self._connections:
            self._empty.set()

    def _protocol(self) -> asyncio.Protocol:
        """Whatever a peer meets first."""
        connection = self._connection()
        if self.tls is None:
            return connection
        return TlsLayer(self.tls.context, self.config, connection, self._shaking, self._has_room)

    def _connection(self) -> Connection:
        return Connection(self)

    def _arrange(self) -> None:
        """Have tenants counted, and told apart, as the key file says."""
        self.frontend.tenancy.arrange(self.door.tenants.values())
        self.frontend.observer.expect(self.door.tenants)

    def _has_room(self) -> bool:
        return len(self._connections) + len(self._shaking) < self.config.max_connections + MAX_REFUSED
