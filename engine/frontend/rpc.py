"""The RPC server: sockets, frames, handshake, and what happens to bytes that are not the protocol.

docs/rpc.md is the protocol in words. Nothing a peer sends ends the server: a message that cannot be decoded but
whose stream id can be read ends that stream; anything worse ends that connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from typing import cast, get_args

import msgspec

from cierzo import __version__
from cierzo.engine.errors import (
    CierzoError,
    ConfigError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    UnknownMethod,
    VersionMismatch,
)
from cierzo.engine.frontend.address import TcpAddress, UnixAddress, parse_address
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frames import UNDECODABLE, FrameSplitter, pack
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.methods import Methods
from cierzo.engine.frontend.stream import failure
from cierzo.engine.frontend.validate import mistyped
from cierzo.engine.messages import MAGIC, OLDEST_VERSION, PROTOCOL_VERSION, ClientMessage, Limits, Message, Welcome

log = logging.getLogger(__name__)

GRANTED = frozenset({"accounting", "credit", "resume"})  # of messages.FEATURES, what this server has
LINGER_S = 2.0  # how long a peer may take to read why its connection ends


class _AnyHello(msgspec.Struct, tag="hello"):
    """Hello of whatever version: fields that this version does not know are passed over."""

    magic: str = ""
    version: int = -1
    features: list[str] = []


class _Envelope(msgspec.Struct):
    """The fields of a message that can be read even if the rest cannot be decoded."""

    type: str = ""
    stream: int = -1


_decode = msgspec.msgpack.Decoder(ClientMessage).decode
_decode_hello = msgspec.msgpack.Decoder(_AnyHello).decode
_decode_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_METHODS = {cast(str, cls.__struct_config__.tag) for cls in get_args(ClientMessage)}


class Connection(asyncio.Protocol):
    """A client's connection. Messages are `put`, then sent by one `flush`: one write for all that a step gives."""

    def __init__(self, server: RpcServer) -> None:
        self.features: frozenset[str] = frozenset()
        self._server = server
        self._splitter = FrameSplitter(server.config.max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._welcomed = False
        self._ending = False
        self.is_paused = False
        self._outbox: list[Message] = []
        self._late = bytearray()  # frames that wait for a slow reader; no deltas, which wait in their streams' logs

    # --- asyncio.Protocol ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer has connected; it has `handshake_timeout_s` to say Hello."""
        config = self._server.config
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=config.high_water_bytes)
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        self._outbox.clear()
        self._late.clear()
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        """Take what came, however it is cut."""
        if self._ending:
            return
        try:
            for body in self._splitter.feed(data):
                self._receive(body)
                if self._ending:
                    return
        except CierzoError as error:
            self._end(error)
        else:
            self.flush()

    def eof_received(self) -> bool:
        """Half-closed counts as closed."""
        return False

    def pause_writing(self) -> None:
        """The peer reads too slowly: from now on its streams keep their output."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """The peer has caught up: send what waited, then what the streams have."""
        self.is_paused = False
        if self._transport is None or self._ending:
            return
        late, self._late = self._late, bytearray()
        if late:
            self._transport.write(late)
        self._server.frontend.writable(self)

    # --- Sink ------------------------------------------------------------------------------------------

    def put(self, message: Message) -> None:
        """Add to what the next flush sends."""
        self._outbox.append(message)

    def flush(self) -> None:
        """Write what was put; behind what waits for a slow reader, if something does."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []
        if self._transport is None or self._ending:
            return
        if not self.is_paused:
            self._transport.write(pack(outbox))
            return
        self._late += pack(outbox)
        limit = self._server.config.max_pending_bytes
        if len(self._late) > limit:
            log.error("closing a connection that left more than %d bytes of answers unread", limit)
            self._ending = True
            self._transport.abort()

    def drop(self) -> None:
        """Close at once."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    # --- inside ----------------------------------------------------------------------------------------

    def _receive(self, body: memoryview) -> None:
        if not self._welcomed:
            self._greet(body)
            return
        try:
            message = _decode(body)
        except UNDECODABLE as error:
            self._undecodable(body, error)
            return
        try:
            self._server.methods.dispatch(self, message)
        except CierzoError:
            raise
        except Exception as error:
            log.exception("a %s message failed", type(message).__name__)
            reason = CierzoError(f"internal error: {type(error).__name__}")
            self._server.frontend.fail(self, getattr(message, "stream", -1), reason)

    def _greet(self, body: memoryview) -> None:
        try:
            hello = _decode_hello(body)
        except UNDECODABLE as error:
            raise ProtocolError(f"the first frame is no hello: {error}", field="type", limit="hello") from error
        if hello.magic != MAGIC:
            raise ProtocolError("hello has the wrong magic", field="magic", limit=MAGIC, value=hello.magic)
        if not OLDEST_VERSION <= hello.version <= PROTOCOL_VERSION:
            raise VersionMismatch(
                f"the server speaks versions {OLDEST_VERSION} to {PROTOCOL_VERSION}, the client {hello.version}",
                field="version",
                limit=PROTOCOL_VERSION,
                value=hello.version,
            )
        self._welcomed = True
        if hello.version > OLDEST_VERSION:
            self.features = GRANTED.intersection(hello.features)
        if self._timer is not None:
            self._timer.cancel()
        self._server.frontend.connect(self)
        self.put(self._server.welcome(hello.version, self.features))

    def _undecodable(self, body: memoryview, error: Exception) -> None:
        """End the stream that the message is about, or raise ProtocolError if that cannot be read."""
        try:
            envelope = _decode_envelope(body)
        except UNDECODABLE:
            raise ProtocolError(f"a frame holds no message: {error}", field="frame") from error
        not_utf8 = isinstance(error, UnicodeDecodeError)  # which does not say in which field
        reason = _reason(envelope, f"a text must be UTF-8: {error}" if not_utf8 else str(error))
        if envelope.stream < 0:
            raise ProtocolError(reason.message, field=reason.field, value=reason.value) from error
        self._server.frontend.fail(self, envelope.stream, reason)

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
        self._ending = True
        self._transport.write(self._late + pack(self._outbox))
        if self._transport.can_write_eof():
            self._transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)
        self._server.frontend.disconnect(self)


def _reason(envelope: _Envelope, text: str) -> InvalidRequest:
    """The error for a message that msgspec refused with `text` ("... - at `$.sampling.top_k`")."""
    if envelope.type not in _METHODS:
        known = ", ".join(sorted(_METHODS - {"hello"}))
        return UnknownMethod("there is no such method", field="type", limit=known, value=envelope.type)
    return mistyped(text)


class RpcServer:
    """Listens, and keeps the set of connections."""

    def __init__(self, config: FrontendConfig, frontend: Frontend) -> None:
        self.config = config
        self.frontend = frontend
        self.methods = Methods(frontend)
        self.address = config.address
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._socket_path: str | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self) -> None:
        """Bind and listen. `address` then names the port that was bound. Raises ConfigError if it is taken."""
        loop, address = asyncio.get_running_loop(), parse_address(self.config.address)
        try:
            if isinstance(address, UnixAddress):
                _remove_stale(address.path)
                self._server = await loop.create_unix_server(self._connection, address.path)
                self._socket_path = address.path
            else:
                self._server = await loop.create_server(self._connection, address.host, address.port)
                port = self._server.sockets[0].getsockname()[1]
                self.address = str(TcpAddress(address.host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror or error}",
                field="address",
                limit="one that is free",
                value=address,
            ) from error

    async def close(self) -> None:
        """Stop listening, drop every connection, and wait until they are gone."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.drop()
        await self._empty.wait()
        if self._server is not None:
            await self._server.wait_closed()
        if self._socket_path is not None and os.path.exists(self._socket_path):
            os.unlink(self._socket_path)

    def welcome(self, version: int, features: frozenset[str]) -> Welcome:
        """The answer to a Hello of this version, to which these features are granted."""
        config, model = self.config, self.frontend.model
        return Welcome(
            version=version,
            server=f"cierzo {__version__}",
            model=model.name,
            limits=Limits(
                max_frame_bytes=config.max_frame_bytes,
                max_streams=config.max_streams_per_connection,
                max_model_len=model.max_model_len,
                max_samples=config.max_samples,
                max_attached_bytes=config.max_attached_bytes if "attach" in features else 0,
                stream_credit_bytes=config.stream_credit_bytes if "credit" in features else 0,
                keepalive_s=config.keepalive_s if "keepalive" in features else 0.0,
            ),
            features=sorted(features),
        )

    def joined(self, connection: Connection) -> None:
        """Count a connection, until it leaves. Raises Overloaded if it is one too many."""
        self._connections.add(connection)
        self._empty.clear()
        limit = self.config.max_connections
        if len(self._connections) > limit:
            raise Overloaded(
                f"max_connections is {limit}",
                field="max_connections",
                limit=limit,
                value=len(self._connections),
                retry_after_s=self.config.retry_after_s,
            )

    def left(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self.frontend.disconnect(connection)
        if not self._connections:
            self._empty.set()

    def _connection(self) -> Connection:
        return Connection(self)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that died; raises OSError if one listens, or if it is another file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "the file exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise OSError(98, "another server listens there")
