"""The client's side of one connection: what is sent, and whom what comes is for. `client` is the public face."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any, Self, cast

import msgspec

from cierzo.engine.errors import BY_CODE, CierzoError, ConnectionLost, FrameTooLarge, ProtocolError
from cierzo.engine.frontend.frames import LENGTH_BYTES, UNDECODABLE, FrameSplitter, pack
from cierzo.engine.messages import (
    Cancel,
    Delta,
    Drain,
    Failure,
    Final,
    Generate,
    GetHealth,
    GetModel,
    GetStats,
    Hello,
    Message,
    Ping,
    ServerMessage,
    Welcome,
)

MAX_WELCOME_FRAME_BYTES = 65536  # the first bytes of another protocol, read as a length, are nearly all larger
SHOWN_BYTES = 40  # of what another protocol answers
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
    """Messages that have come for one generation and were not taken yet."""

    __slots__ = ("cancelled", "deltas", "dropped", "error", "final", "waiters")

    def __init__(self, error: CierzoError | None) -> None:
        self.deltas: deque[Delta] = deque()
        self.final: Final | None = None
        self.error = error
        self.waiters: set[asyncio.Future[bool]] = set()  # True: there is news; False: the time is over
        self.cancelled = False
        self.dropped = False

    @property
    def ended(self) -> bool:
        return self.final is not None or self.error is not None

    def wake(self) -> None:
        for waiter in self.waiters:
            _settle(waiter, True)


def _settle(waiter: asyncio.Future[bool], has_news: bool) -> None:
    if not waiter.done():
        waiter.set_result(has_news)


class Generation:
    """A request under way: iterate over its Deltas. `final` is the last record, set when the iteration has ended.

    Dropping it (leaving the loop early) cancels the request; so does cancelling the task that waits in it, which is
    what `asyncio.wait_for` does. To wait for a limited time and go on afterwards, use `timeout_s`:

        while (delta := await generation.next(timeout_s=5.0)) is not None:  # TimeoutError: nothing came for 5 s
            print(delta.text, end="")

    Several iterators of one Generation share it: each delta goes to one of them, and all of them end.
    """

    __slots__ = ("_inbox", "_link", "_stream")

    def __init__(self, link: ClientLink, stream: int, inbox: _Inbox) -> None:
        self._link = link
        self._stream = stream
        self._inbox = inbox

    @property
    def final(self) -> Final:
        """Usage, timings, seed, and how each sample ended. Raises RuntimeError while the generation still runs, and
        the error of one that failed."""
        if self._inbox.error is not None:
            raise self._inbox.error
        if self._inbox.final is None:
            raise RuntimeError("the generation has not ended")
        return self._inbox.final

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if not await self._has_more():
            raise StopAsyncIteration
        return self._inbox.deltas.popleft()

    async def next(self, timeout_s: float | None = None) -> Delta | None:
        """The next delta; None at the end. Raises TimeoutError if none comes in time: the generation goes on, and
        nothing of it is lost."""
        return self._inbox.deltas.popleft() if await self._has_more(timeout_s) else None

    async def next_batch(self, timeout_s: float | None = None) -> list[Delta]:
        """All deltas that have come and were not taken, at least one; none at the end. `timeout_s` as in `next`."""
        await self._has_more(timeout_s)
        deltas = list(self._inbox.deltas)
        self._inbox.deltas.clear()
        return deltas

    def cancel(self) -> None:
        """Ask the server to stop. What it had sent still comes, then `final` says "cancelled"."""
        if not self._inbox.ended and not self._inbox.cancelled:
            self._inbox.cancelled = True
            self._link.send(Cancel(stream=self._stream))

    def __del__(self) -> None:
        if not self._inbox.ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
                self._link.loop.call_soon_threadsafe(self._link.drop, self._stream)

    async def _has_more(self, timeout_s: float | None = None) -> bool:
        """Wait until there is a delta to take (True), or the generation has ended (False)."""
        inbox, loop = self._inbox, self._link.loop
        until_s = None if timeout_s is None else loop.time() + timeout_s
        while not inbox.deltas:
            if inbox.error is not None:
                raise inbox.error
            if inbox.final is not None:
                return False
            waiter = loop.create_future()
            inbox.waiters.add(waiter)
            timer = None if until_s is None else loop.call_at(until_s, _settle, waiter, False)
            try:
                if not await waiter:
                    raise TimeoutError(f"nothing came for {timeout_s:g} s; the generation goes on")
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                inbox.waiters.discard(waiter)
                if timer is not None:
                    timer.cancel()
        return True


class ClientLink(asyncio.Protocol):
    """The connection to `peer`: frames out, and each message in to whom it is for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, peer: str) -> None:
        self.loop = loop
        self.welcome: asyncio.Future[Welcome] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._peer = peer
        self._error: CierzoError | None = None
        self._transport: asyncio.Transport | None = None
        self._splitter = FrameSplitter(MAX_WELCOME_FRAME_BYTES)
        self._max_frame_bytes = MAX_WELCOME_FRAME_BYTES
        self._inboxes: dict[int, _Inbox] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_stream = 0
        self._outbox = bytearray()

    @property
    def is_connected(self) -> bool:
        """Whether somebody has accepted the connection, whoever that is."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(pack([Hello(client="cierzo python")]))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._splitter.feed(data):
                self._receive(_decode(body))
        except (*UNDECODABLE, ProtocolError) as error:
            begins = "" if self.welcome.done() else f" (its answer begins with {data[:SHOWN_BYTES]!r})"
            self.close(ProtocolError(f"{self._peer} does not speak cierzo's protocol{begins}: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        when = "" if self.welcome.done() else " before it said welcome: is it a cierzo server?"
        reason = f": {exc}" if exc is not None and not when else ""
        self._error = self._error or ConnectionLost(f"{self._peer} has closed the connection{when}{reason}")
        for inbox in self._inboxes.values():
            inbox.error = self._error
            inbox.wake()
        for call in [self.welcome, *self._calls.values()]:
            if not call.done():
                call.set_exception(self._error)
                call.exception()  # if nobody waits any more, nobody misses it
        self._inboxes.clear()
        self._calls.clear()
        self.closed.set_result(None)

    def open(self, request: Generate) -> Generation:
        """Send a request under a new stream id. Raises FrameTooLarge for one that the server would not read."""
        self._next_stream += 1
        stream = self._next_stream
        inbox = _Inbox(self._error)
        if self._error is None:
            self.send(msgspec.structs.replace(request, stream=stream))
            self._inboxes[stream] = inbox
        return Generation(self, stream, inbox)

    async def call(self, method: type[Ping | GetHealth | GetStats | GetModel | Drain]) -> Any:
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
        """Pack a message, now: one that cannot be sent is refused to its sender, and takes no other with it.

        All that is sent in one turn of the loop leaves in one write. Raises FrameTooLarge.
        """
        frame = pack([message])
        size = len(frame) - LENGTH_BYTES
        if size > self._max_frame_bytes:
            raise FrameTooLarge(
                f"the request is {size} bytes long, the server's max_frame_bytes {self._max_frame_bytes}",
                field="max_frame_bytes",
                limit=self._max_frame_bytes,
                value=size,
            )
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox += frame

    def drop(self, stream: int) -> None:
        """Nobody reads this generation any more."""
        inbox = self._inboxes.get(stream)
        if inbox is not None:
            inbox.dropped = True
            inbox.deltas.clear()
            if not inbox.cancelled:
                self.send(Cancel(stream=stream))

    def close(self, reason: CierzoError | None = None) -> None:
        """Send what waits, then close. What still waits for an answer fails with `reason`."""
        self._error = self._error or reason
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, bytearray()
        if outbox and self._transport is not None and not self._transport.is_closing():
            self._transport.write(outbox)

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
                self._max_frame_bytes = message.limits.max_frame_bytes
                self._splitter.max_frame_bytes = MAX_SERVER_FRAME_BYTES
        else:
            call = self._calls.pop(message.stream, None)
            if call is not None and not call.done():
                call.set_result(message)

    def _failed(self, message: Failure) -> None:
        error = error_of(message)
        if message.stream < 0:
            self.close(error)
            return
        inbox = self._inboxes.pop(message.stream, None)
        if inbox is not None:
            inbox.error = error
            inbox.wake()
        call = self._calls.pop(message.stream, None)
        if call is not None and not call.done():
            call.set_exception(error)
