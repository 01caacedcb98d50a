"""The client's side of one connection: what is sent, and whom what comes is for. `client` is the public face."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Self, cast

import msgspec

from cierzo.engine.errors import BY_CODE, CierzoError, ConnectionLost, ProtocolError
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.messages import (
    Cancel,
    Delta,
    Drain,
    Failure,
    Final,
    Generate,
    GetExperts,
    GetHealth,
    GetModel,
    GetStats,
    Hello,
    Message,
    Ping,
    ServerMessage,
    Welcome,
)

MAX_SERVER_FRAME_BYTES = 1 << 30  # a final record can hold a whole long answer with log-probabilities
_decode = msgspec.msgpack.Decoder(ServerMessage).decode


def error_of(message: Failure) -> CierzoError:
    """The exception that a Failure stands for."""
    return BY_CODE.get(message.code, CierzoError)(
        message.message,
        field=message.field,
        limit=message.limit,
        value=message.value,
        retry_after_s=message.retry_after_s,
    )


class _Inbox:
    """What has come for one generation and was not taken yet."""

    __slots__ = ("deltas", "dropped", "error", "final", "waiter")

    def __init__(self, error: CierzoError | None) -> None:
        self.deltas: list[Delta] = []
        self.final: Final | None = None
        self.error = error
        self.waiter: asyncio.Future[None] | None = None
        self.dropped = False

    @property
    def ended(self) -> bool:
        return self.final is not None or self.error is not None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Generation:
    """One request: iterate to get its Deltas. `final` is the last record, there once the iteration has ended.

    Dropping it (leaving the loop early) cancels the request; so does cancelling the task that waits in it.
    """

    __slots__ = ("_batch", "_inbox", "_link", "_stream")

    def __init__(self, link: ClientLink, stream: int, inbox: _Inbox) -> None:
        self._link = link
        self._stream = stream
        self._inbox = inbox
        self._batch: deque[Delta] = deque()

    @property
    def final(self) -> Final:
        """Usage, timings, seed, and how each sample ended; RuntimeError while the generation still runs."""
        if self._inbox.final is None:
            raise RuntimeError("the generation has not ended")
        return self._inbox.final

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if not self._batch:
            self._batch.extend(await self.next_batch())
            if not self._batch:
                raise StopAsyncIteration
        return self._batch.popleft()

    async def next_batch(self) -> list[Delta]:
        """All deltas that have come since the last call, at least one; empty at the end."""
        inbox = self._inbox
        while not inbox.deltas:
            if inbox.error is not None:
                raise inbox.error
            if inbox.final is not None:
                return []
            inbox.waiter = self._link.loop.create_future()
            try:
                await inbox.waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        deltas, inbox.deltas = inbox.deltas, []
        return deltas

    def cancel(self) -> None:
        """Ask the server to stop. What it had sent still comes, then `final` says "cancelled"."""
        if not self._inbox.ended:
            self._link.send(Cancel(stream=self._stream))

    def __del__(self) -> None:
        if not self._inbox.ended and not self._link.loop.is_closed():
            self._link.loop.call_soon_threadsafe(self._link.drop, self._stream)


class ClientLink(asyncio.Protocol):
    """The connection: frames out, and each message in to whom it is for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.welcome: asyncio.Future[Welcome] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._error: CierzoError | None = None
        self._transport: asyncio.Transport | None = None
        self._splitter = FrameSplitter(MAX_SERVER_FRAME_BYTES)
        self._inboxes: dict[int, _Inbox] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_stream = 0
        self._outbox: list[Message] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(pack([Hello(client="cierzo python")]))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._splitter.feed(data):
                self._receive(_decode(body))
        except (msgspec.DecodeError, ProtocolError) as error:
            self._error = ProtocolError(f"the server sent something that is not the protocol: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        error = self._error = self._error or ConnectionLost("the connection to the server was lost")
        for inbox in self._inboxes.values():
            inbox.error = error
            inbox.wake()
        for call in [self.welcome, *self._calls.values()]:
            if not call.done():
                call.set_exception(error)
        self._inboxes.clear()
        self._calls.clear()
        self.closed.set_result(None)

    def open(self, request: Generate) -> Generation:
        """Send a request under a new stream id."""
        self._next_stream += 1
        stream = self._next_stream
        inbox = _Inbox(self._error)
        if self._error is None:
            self._inboxes[stream] = inbox
            self.send(msgspec.structs.replace(request, stream=stream))
        return Generation(self, stream, inbox)

    async def call(self, method: type[Ping | GetHealth | GetStats | GetExperts | GetModel | Drain]) -> Any:
        """Send a message that has one answer, and wait for it."""
        if self._error is not None:
            raise self._error
        self._next_stream += 1
        stream = self._next_stream
        answer = self._calls[stream] = self.loop.create_future()
        self.send(method(stream=stream))
        try:
            return await answer
        finally:
            self._calls.pop(stream, None)

    def send(self, message: Message) -> None:
        """Everything sent in one turn of the loop leaves in one write."""
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox.append(message)

    def drop(self, stream: int) -> None:
        """Nobody reads this generation any more."""
        inbox = self._inboxes.get(stream)
        if inbox is not None:
            inbox.dropped = True
            inbox.deltas.clear()
            self.send(Cancel(stream=stream))

    def close(self) -> None:
        """Send what waits, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(outbox))

    def _receive(self, message: ServerMessage) -> None:
        if isinstance(message, Delta):
            inbox = self._inboxes.get(message.stream)
            if inbox is not None and not inbox.dropped:
                inbox.deltas.append(message)
                inbox.wake()
        elif isinstance(message, Final):
            ended = self._inboxes.pop(message.stream, None)
            if ended is not None:
                ended.final = message
                ended.wake()
        elif isinstance(message, Failure):
            self._failed(message)
        elif isinstance(message, Welcome):
            if not self.welcome.done():
                self.welcome.set_result(message)
        else:
            call = self._calls.pop(message.stream, None)
            if call is not None and not call.done():
                call.set_result(message)

    def _failed(self, message: Failure) -> None:
        error = error_of(message)
        if message.stream < 0:
            self._error = error
            self.close()
            return
        inbox = self._inboxes.pop(message.stream, None)
        if inbox is not None:
            inbox.error = error
            inbox.wake()
        call = self._calls.pop(message.stream, None)
        if call is not None and not call.done():
            call.set_exception(error)
