"""A client's connection by hand: streams by id, pings answered, credit given for what was taken."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from simulation.peer import delta_cost, frame

from cierzo.engine.frontend.address import TcpAddress, parse_address
from cierzo.engine.messages import FEATURES, PROTOCOL_VERSION

Body = dict[str, Any]
LOST: Body = {"type": "error", "code": "connection_lost"}


@dataclass
class Answer:
    """What came of a generation. times: of the deltas, seconds of a monotonic clock."""

    began_s: float
    tokens: dict[int, list[int]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    end: Body | None = None
    end_s: float = 0.0

    @property
    def reason(self) -> str:
        """The first sample's finish reason, or the error's code."""
        assert self.end is not None
        return str(self.end["samples"][0]["finish_reason"] if self.end["type"] == "final" else self.end["code"])


class Talk(asyncio.Protocol):
    """One connection. `start` a generation, `finished` waits for its end."""

    def __init__(self) -> None:
        self.features: frozenset[str] = frozenset()
        self.welcome: asyncio.Future[Body] = asyncio.get_running_loop().create_future()
        self.answers: dict[int, Answer] = {}
        self._news: dict[int, asyncio.Event] = {}
        self._replies: dict[int, asyncio.Future[Body]] = {}
        self._rest = bytearray()
        self._next_stream = 0
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls, address: str, features: tuple[str, ...] = FEATURES, receive_bytes: int | None = None
    ) -> Talk:
        """Say hello. `receive_bytes`: of the socket's buffer, for one that will not read."""
        where = parse_address(address)
        assert isinstance(where, TcpAddress)
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (where.host, where.port))
        _, talk = await loop.create_connection(cls, sock=sock)
        talk.say({"type": "hello", "magic": "cierzo", "version": PROTOCOL_VERSION, "features": list(features)})
        talk.features = frozenset((await talk.welcome).get("features", ()))
        return talk

    # --- what a client does ----------------------------------------------------------------------------

    def say(self, message: Body) -> None:
        """Send a message."""
        assert self._transport is not None
        self._transport.write(frame(message))

    def start(self, body: Body) -> int:
        """Send a generate; the stream id."""
        self._next_stream += 1
        stream = self._next_stream
        self.answers[stream] = Answer(time.monotonic())
        self._news[stream] = asyncio.Event()
        self.say({"type": "generate", **body, "stream": stream})
        if self._transport is None or self._transport.is_closing():
            self._end(stream, LOST)
        return stream

    def cancel(self, stream: int) -> None:
        """Cancel a generation."""
        self.say({"type": "cancel", "stream": stream})

    async def deltas(self, stream: int, count: int) -> None:
        """Wait until so many deltas have come, or the end."""
        answer, news = self.answers[stream], self._news[stream]
        while len(answer.times) < count and answer.end is None:
            news.clear()
            await news.wait()

    async def finished(self, stream: int) -> Answer:
        """Wait for the end of a generation, and forget it."""
        answer, news = self.answers[stream], self._news[stream]
        while answer.end is None:
            news.clear()
            await news.wait()
        del self.answers[stream], self._news[stream]
        return answer

    async def ask(self, kind: str, **fields: Any) -> Body:
        """Send a message that has one answer."""
        self._next_stream += 1
        reply = self._replies[self._next_stream] = asyncio.get_running_loop().create_future()
        self.say({"type": kind, "stream": self._next_stream, **fields})
        return await reply

    def pause(self) -> None:
        """Read nothing more."""
        assert self._transport is not None
        self._transport.pause_reading()

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits hears of it as an error."""
        for stream in list(self.answers):
            self._end(stream, LOST)
        for reply in self._replies.values():
            reply.set_result(LOST)
        if not self.welcome.done():
            self.welcome.set_result({})

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        self._rest += data
        while len(self._rest) >= 4 and len(self._rest) >= (end := 4 + int.from_bytes(self._rest[:4], "big")):
            message = msgspec.msgpack.decode(self._rest[4:end])
            del self._rest[:end]
            self._hear(message)

    def _hear(self, message: Body) -> None:
        kind, stream = message["type"], message.get("stream", -1)
        if kind == "deltas":
            for delta in message["deltas"]:
                self._hear(delta)
            return
        if kind == "welcome":
            self.welcome.set_result(message)
        elif kind == "ping":
            self.say({"type": "pong", "stream": stream})
        elif stream in self._replies:
            self._replies.pop(stream).set_result(message)
        elif stream in self.answers and kind == "delta":
            answer = self.answers[stream]
            answer.times.append(time.monotonic())
            answer.tokens.setdefault(message.get("sample", 0), []).extend(message.get("token_ids", []))
            if "credit" in self.features:
                self.say({"type": "credit", "stream": stream, "bytes": delta_cost(message)})
            self._news[stream].set()
        elif stream in self.answers and kind in ("final", "error"):
            self._end(stream, message)
        elif kind == "error":
            assert stream == -1, message

    def _end(self, stream: int, message: Body) -> None:
        answer = self.answers[stream]
        if answer.end is None:
            answer.end, answer.end_s = message, time.monotonic()
            self._news[stream].set()
