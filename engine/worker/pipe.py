"""The core's end of the Unix socket to the front end: frames in, frames out, never stuck on a slow peer.

A frame is a 4-byte big-endian length and one MessagePack message, as in engine/messages.py.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Iterator

import msgspec

from cierzo.engine.messages import CoreCommand, CoreEvent

LENGTH_BYTES = 4
RECEIVE_BYTES = 1 << 18
MAX_READ_BYTES = 1 << 22  # of a call: a peer that never stops sending holds nothing up
MAX_FRAMES = 256  # cut at a time


class PipeClosed(Exception):
    """The front end has closed its end, or died."""


class CorePipe:
    """Frames over a connected stream socket, which this object owns.

    What the socket does not take at once is kept and goes out in later calls: nothing is lost, and nothing
    waits. `backlog_bytes` says how much is kept; the caller holds further output back while it is not 0, so
    that at most one message is ever kept here.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._poll = select.poll()
        self._incoming = bytearray()
        self._outgoing = memoryview(b"")
        self._frames: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decode = msgspec.msgpack.Decoder(CoreCommand).decode

    @property
    def backlog_bytes(self) -> int:
        """Bytes accepted by `send` that the socket has not taken yet."""
        return len(self._outgoing)

    def send(self, event: CoreEvent) -> None:
        """Send a message, or keep what the socket does not take now. Raises PipeClosed."""
        assert not self._outgoing, f"{len(self._outgoing)} bytes of the last message are still here"
        frame = bytearray(LENGTH_BYTES)
        self._encoder.encode_into(event, frame, LENGTH_BYTES)
        frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")
        self._outgoing = memoryview(frame)
        self.flush()

    def flush(self) -> None:
        """Send what is kept, as far as the socket takes it. Raises PipeClosed."""
        while self._outgoing:
            try:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
            except BlockingIOError:
                return
            except OSError as error:
                raise PipeClosed(str(error)) from error

    def wait(self, timeout_s: float | None) -> None:
        """Wait for something to read, or until the kept bytes could move; at most `timeout_s` (None: for ever)."""
        if not self._has_frame():
            self._wait_for(select.POLLIN | (select.POLLOUT if self._outgoing else 0), timeout_s)

    def wait_writable(self, timeout_s: float) -> None:
        """Wait until the kept bytes could move; at most `timeout_s`."""
        self._wait_for(select.POLLOUT, timeout_s)

    def receive(self, limit: int = MAX_FRAMES) -> Iterator[CoreCommand]:
        """At most `limit` of the commands that have arrived in full; does not wait.

        Raises PipeClosed, msgspec.DecodeError.
        """
        if not self._has_frame():
            self._read()
        while limit > 0 and self._has_frame():
            yield self._decode(self._frames.popleft())
            limit -= 1

    def receive_frame(self) -> bytes | None:
        """The body of the next frame, None if it has not arrived in full. Raises PipeClosed once all are taken."""
        if not self._has_frame():
            self._read()
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _wait_for(self, events: int, timeout_s: float | None) -> None:
        self._poll.register(self._socket, events)
        self._poll.poll(None if timeout_s is None else timeout_s * 1000)

    def _has_frame(self) -> bool:
        """Whether a frame is here in full."""
        if not self._frames:
            self._cut()
        return bool(self._frames)

    def _read(self) -> None:
        """Take what the socket has and cut it into frames. Raises PipeClosed if that was nothing, and its end."""
        closed, most, num_bytes = False, len(self._incoming) + MAX_READ_BYTES, RECEIVE_BYTES
        while num_bytes == RECEIVE_BYTES and len(self._incoming) < most:  # less is all there was
            try:
                received = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                received = b""
            self._incoming += received
            num_bytes = len(received)
            closed = not received
        self._cut()
        if closed and not self._frames:
            raise PipeClosed("end of stream")

    def _cut(self) -> None:
        start, end = 0, len(self._incoming)
        while end - start >= LENGTH_BYTES and len(self._frames) < MAX_FRAMES:
            body = start + LENGTH_BYTES
            after = body + int.from_bytes(self._incoming[start:body], "big")
            if after > end:
                break
            self._frames.append(bytes(self._incoming[body:after]))
            start = after
        del self._incoming[:start]
