"""A network between scripted clients and the real `Connection`: delays, splits, resets, half-open, frozen links.

Bytes of one direction of one connection stay in order, as TCP keeps them; everything else is up to the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from cierzo.engine.frontend.rpc import RpcServer

MOST_DELAY_S = 0.02


class Way:
    """One direction of a connection: chunks that arrive in order, each a random time later; or not at all."""

    def __init__(self, rng: random.Random, deliver: Callable[[bytes], None]) -> None:
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._due: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.num_bytes = 0  # on their way
        self._last_s = 0.0
        self.is_held = False

    def put(self, data: bytes) -> None:
        """Send `data` in pieces; empty is the end."""
        pieces = [data]
        if len(data) > 1 and self._rng.random() < 0.3:
            cut = self._rng.choice((1, self._rng.randrange(1, len(data))))
            pieces = [data[:cut], data[cut:]]
        for piece in pieces:
            self._last_s = max(self._last_s, self._loop.time() + self._rng.random() ** 3 * MOST_DELAY_S)
            self._due.append((self._last_s, piece))
            self.num_bytes += len(piece)
        self._plan()

    def hold(self, is_held: bool) -> None:
        """Stop delivering, or go on."""
        self.is_held = is_held
        self._plan()

    def cut(self) -> None:
        """Lose what is on its way."""
        self._due.clear()
        self.num_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _plan(self) -> None:
        if self._due and self._timer is None and not self.is_held:
            self._timer = self._loop.call_at(self._due[0][0], self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        if self._due and not self.is_held:
            _, data = self._due.popleft()
            self.num_bytes -= len(data)
            self._deliver(data)
        self._plan()


class ServerTransport(asyncio.Transport):
    """The server's end of a connection, as the real `Connection` knows it."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self.buffer = bytearray()
        self.is_closing_ = False
        self.eof_wanted = False
        self._high, self._low = 65536, 16384
        self._is_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Tell nothing: there is no socket."""
        return ("127.0.0.1", self._wire.number) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks between which the protocol is paused and resumed."""
        self._high = 65536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Bytes that the network has not taken."""
        return len(self.buffer)

    def write(self, data: Any) -> None:
        """Queue bytes for the client."""
        if not self.is_closing_ and not self.eof_wanted:
            self.buffer += data
            self._wire.pump()
        if len(self.buffer) > self._high and not self._is_paused:
            self._is_paused = True
            self._wire.protocol.pause_writing()

    def drained(self) -> None:
        """The network has taken some of the buffer."""
        if self._is_paused and len(self.buffer) <= self._low:
            self._is_paused = False
            self._wire.protocol.resume_writing()

    def can_write_eof(self) -> bool:
        """Tell that half of the connection can be closed."""
        return True

    def write_eof(self) -> None:
        """End the server's half behind what is buffered."""
        self.eof_wanted = True
        self._wire.pump()

    def is_closing(self) -> bool:
        """Tell whether the connection is closed or closing."""
        return self.is_closing_

    def close(self) -> None:
        """End the connection behind what is buffered."""
        if not self.is_closing_:
            self.write_eof()
            self.is_closing_ = True
            self._wire.pump()

    def abort(self) -> None:
        """End the connection at once; the client sees a reset."""
        if not self.is_closing_ or self.buffer:
            self.is_closing_ = True
            self._wire.reset()

    def pause_reading(self) -> None:
        """Take nothing more from the client."""
        self._wire.up.hold(True)

    def resume_reading(self) -> None:
        """Take bytes again."""
        self._wire.up.hold(self._wire.is_frozen)


class Wire:
    """A connection. The client's end: `send`, `read`, `close`, `reset`, `vanish`."""

    def __init__(self, rng: random.Random, server: RpcServer, number: int, window: int) -> None:
        self.number = number
        self.protocol = server._connection()
        self.transport = ServerTransport(self)
        self.up = Way(rng, self._reach_server)
        self.down = Way(rng, self._reach_client)
        self.is_frozen = False
        self.is_narrow = window < 100_000  # answers may have to wait for room
        self.is_open = True  # at the server
        self.is_lost = False  # at the client
        self.on_freeze: Callable[[], None] = lambda: None  # who learns that times do not count for a while
        self._window = window
        self._unread: deque[bytes] = deque()
        self._num_unread = 0
        self._vanished = False
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.protocol.connection_made(self.transport)

    # --- the client's end ------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send bytes; nothing happens once the connection is lost."""
        if not self.is_lost and data:
            self.up.put(data)

    async def read(self) -> bytes:
        """The next bytes; empty at the end, whichever it is."""
        while not self._unread and not self.is_lost:
            self._news.clear()
            await self._news.wait()
        if not self._unread:
            return b""
        data = self._unread.popleft()
        self._num_unread -= len(data)
        self.pump()
        return data

    def close(self) -> None:
        """End the client's half, and read no more."""
        if not self.is_lost:
            self.up.put(b"")
            self._lose()

    def reset(self) -> None:
        """Break the connection for both sides; what is on its way is lost."""
        self.up.cut()
        self.down.cut()
        self._lose()
        self._close_server(ConnectionResetError("reset"))

    def vanish(self) -> None:
        """Half-open: the client is gone, and the server is not told."""
        self._vanished = True
        self.up.cut()
        self._lose()

    def freeze(self, is_frozen: bool) -> None:
        """Hold both directions, or let them go on."""
        self.is_frozen = is_frozen
        if is_frozen:
            self.on_freeze()
        self.up.hold(is_frozen)
        self.down.hold(is_frozen)

    def time_out(self) -> None:
        """What a system does to a half-open connection after long."""
        self._close_server(TimeoutError("timed out"))

    @property
    def is_hard(self) -> bool:
        """Tell whether answers may have to wait."""
        return self.is_frozen or self.is_narrow

    # --- between ---------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Move the server's bytes into the network, as far as the client's window allows."""
        transport = self.transport
        if not self.is_open:
            return
        room = self._window - self.down.num_bytes - self._num_unread
        if transport.buffer and room > 0:
            data = bytes(transport.buffer[:room])
            del transport.buffer[:room]
            if not self._vanished:
                self.down.put(data)
            else:
                self._num_unread += len(data)  # unacknowledged for ever
            transport.drained()
        if not transport.buffer and transport.eof_wanted:
            transport.eof_wanted = False
            if not self._vanished:
                self.down.put(b"")
        if not transport.buffer and transport.is_closing_:
            self._close_server(None)

    def _reach_server(self, data: bytes) -> None:
        if not self.is_open:
            return
        if data:
            self.protocol.data_received(data)
        elif not self.protocol.eof_received():
            self.transport.close()

    def _reach_client(self, data: bytes) -> None:
        if self.is_lost:
            self.reset()  # bytes for a closed socket
        elif not data:
            self._lose()
        else:
            self._unread.append(data)
            self._num_unread += len(data)
            self._news.set()

    def _lose(self) -> None:
        self.is_lost = True
        self._news.set()

    def _close_server(self, error: Exception | None) -> None:
        if self.is_open:
            self.is_open = False
            self.transport.is_closing_ = True
            self.transport.buffer.clear()
            self._loop.call_soon(self.protocol.connection_lost, error)


class Network:
    """All connections to one server."""

    def __init__(self, rng: random.Random, server: RpcServer) -> None:
        self._rng = rng
        self._server = server
        self.wires: list[Wire] = []

    def connect(self) -> Wire:
        """A new connection."""
        window = self._rng.choice((600, 3000, 20_000, 200_000))
        wire = Wire(random.Random(self._rng.random()), self._server, len(self.wires), window)
        self.wires.append(wire)
        return wire

    async def swizzle(self) -> None:
        """Freeze connections one after the other, and thaw them in another order."""
        chosen = [wire for wire in self.wires if wire.is_open and self._rng.random() < 0.6]
        for is_frozen in (True, False):
            self._rng.shuffle(chosen)
            for wire in chosen:
                await asyncio.sleep(self._rng.random() * 0.1)
                wire.freeze(is_frozen)
