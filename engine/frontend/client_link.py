"""The client's side of one connection: what is sent, and whom what comes is for. `client` is the public face."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import Any, cast

import msgspec

from cierzo.engine.errors import CierzoError, ConfigError, ConnectionLost, Overloaded, ProtocolError
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.failures import error_of
from cierzo.engine.frontend.frames import UNDECODABLE, FrameSplitter, pack
from cierzo.engine.frontend.generation import Inbox
from cierzo.engine.frontend.request_frames import frame_of, request_frames
from cierzo.engine.messages import (
    FEATURES,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Credit,
    Delta,
    Deltas,
    Failure,
    Final,
    Generate,
    Hello,
    Limits,
    Message,
    Ping,
    Pong,
    Reply,
    Resume,
    ServerMessage,
    Welcome,
)

MAX_WELCOME_FRAME_BYTES = 65536  # the first bytes of another protocol, read as a length, are nearly all larger
SHOWN_BYTES = 40  # of what another protocol answers
TLS_ALERT = b"\x15\x03"  # begins what a server that speaks TLS says to one that does not
DISTRUST = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")  # in the names of a server's alerts
MAX_SERVER_FRAME_BYTES = 1 << 30  # a final record can hold a whole long answer with log-probabilities
KEEPALIVE_S = 20.0  # of a server that does not tell
MAX_UNREAD_BYTES = 4 << 20  # cost of deltas that nobody has taken, over all generations of a server without credit
CREDIT_PARTS = 4  # credit is given back when such a part of it has been consumed
CREDIT_S = 1.0  # and after so long whatever has been: a server ends a stream whose reader gives none for long
NO_WELCOME = Welcome(
    version=0,
    server="",
    model="",
    limits=Limits(max_frame_bytes=MAX_WELCOME_FRAME_BYTES, max_streams=0, max_model_len=0, max_samples=0),
)
_decode = msgspec.msgpack.Decoder(ServerMessage).decode


def _tls_question(speaks_tls: bool) -> str:
    return " does it want a certificate of its clients?" if speaks_tls else " does it want TLS?"


def tls_failure(peer: str, error: ssl.SSLError) -> CierzoError:
    """The error for a connection that TLS has ended: who did not trust whom, or that one side does not speak it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the certificate of {peer} is not trusted: {error.verify_message}"
    elif isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return ConnectionLost(f"{peer} has closed the connection within TLS's handshake: does it speak TLS?")
    elif "ALERT" in (error.reason or "") and any(word in (error.reason or "") for word in DISTRUST):
        why = f"{peer} does not trust this client: {_reason(error)}"
        why = f"{why}; it shows who it is by tls_certificate= (--tls-certificate)"
    else:
        why = f"{peer} does not speak TLS, or none that this client understands: {_reason(error)}"
        why = f"{why}; to a plain port connect without tls= (--tls-ca)"
    return ConfigError(why, field="tls")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def _all(inboxes: list[Inbox], error: CierzoError) -> list[Inbox]:
    return inboxes


class ClientLink(asyncio.Protocol):
    """The connection to `peer`: frames out, and each message in to whom it is for.

    on_lost: called once with the generations that were open and the reason; gives back those that it ends.
    had_news: whether the server has done more than to take requests.
    question: what to ask of a peer that does not say welcome; nothing if it did before (is_known).
    last_used: number of the request that was sent last, among those of the whole client.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        peer: str,
        *,
        version: int = PROTOCOL_VERSION,
        features: Iterable[str] = FEATURES,
        keepalive_s: float | None = None,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        key: str | None = None,
        speaks_tls: bool = False,
        is_known: bool = False,
    ) -> None:
        self.loop = loop
        self.welcomed: asyncio.Future[Welcome] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.welcome = NO_WELCOME
        self.features: frozenset[str] = frozenset()
        self.error: CierzoError | None = None
        self.on_lost: Callable[[list[Inbox], CierzoError], list[Inbox]] = _all
        self.had_news = False
        self.speaks_tls = speaks_tls
        self.question = "" if is_known else f": is it a cierzo server?{_tls_question(speaks_tls)}"
        self.last_used = 0
        self._key = key
        self.peer = peer
        self._version = version
        self._wanted = [] if version <= OLDEST_VERSION else [*features]
        self._keepalive_s = keepalive_s
        self._max_unread_bytes = max_unread_bytes
        self._unread_bytes = 0
        self._credit_part = 0  # without the feature
        self._crediting: asyncio.TimerHandle | None = None
        self._is_reading = True
        self._transport: asyncio.Transport | None = None
        self._splitter = FrameSplitter(MAX_WELCOME_FRAME_BYTES)
        self._inboxes: dict[int, Inbox] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_stream = 0
        self._outbox = bytearray()
        self._heard_s = self._pinged_s = loop.time()
        self._watch: asyncio.TimerHandle | None = None

    @property
    def is_connected(self) -> bool:
        """Whether somebody has accepted the connection, whoever that is."""
        return self._transport is not None

    @property
    def num_open(self) -> int:
        """Generations that are open on it."""
        return len(self._inboxes)

    # --- asyncio.Protocol ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        is_told = self._key is not None and self._version > OLDEST_VERSION  # which has no keys
        key = cast(str, self._key) if is_told else msgspec.UNSET
        hello = Hello(version=self._version, client="cierzo python", features=self._wanted, key=key)
        self._transport.write(pack([hello]))

    def data_received(self, data: bytes) -> None:
        self._heard_s = self.loop.time()
        try:
            for body in self._splitter.feed(data):
                message = _decode(body)
                if isinstance(message, Deltas):
                    self._take(message.deltas)
                elif isinstance(message, Delta):
                    self._take((message,))
                else:
                    self._receive(message)
        except (*UNDECODABLE, ProtocolError) as error:
            if not self.welcomed.done() and data.startswith(TLS_ALERT):
                self.close(self._wants_tls())
                return
            begins = "" if self.welcomed.done() else f" (its answer begins with {data[:SHOWN_BYTES]!r})"
            self.close(ProtocolError(f"{self.peer} does not speak cierzo's protocol{begins}: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._watch, self._crediting):
            if timer is not None:
                timer.cancel()
        if isinstance(exc, ssl.SSLError) and not self.welcomed.done():
            self.error = self.error or tls_failure(self.peer, exc)
        when = "" if self.welcomed.done() else f" before it said welcome{self.question}"
        reason = f": {exc}" if exc is not None and not when else ""
        error = self.error or ConnectionLost(f"{self.peer} has closed the connection{when}{reason}")
        self.error = error
        inboxes, self._inboxes = [*self._inboxes.values()], {}
        for inbox in inboxes:
            inbox.uncertain = True
        for inbox in self.on_lost(inboxes, error):
            inbox.put(error)
        for call in [self.welcomed, *self._calls.values()]:
            if not call.done():
                call.set_exception(error)
                call.exception()  # if nobody waits any more, nobody misses it
        self._calls.clear()
        self.closed.set_result(None)

    # --- what is sent ----------------------------------------------------------------------------------

    def open(self, inbox: Inbox, request: Generate | Resume) -> None:
        """Send a request under a new stream id; its inbox gets what comes.

        Raises FrameTooLarge for one that the server would not read, and Overloaded beyond its max_streams.
        """
        inbox.link = self
        if self.error is not None:
            inbox.put(self.error)
            return
        num_open, limit = len(self._inboxes) + 1, self.welcome.limits.max_streams
        if num_open > limit:
            raise Overloaded(
                f"the server's max_streams is {limit}", field="max_streams", limit=limit, value=num_open
            )
        message = msgspec.structs.replace(request, stream=self._next_stream + 1)
        if isinstance(message, Generate):
            self._write(request_frames(message, self.welcome))
        else:
            self.send(message)
        inbox.stream, inbox.settles_at = self._new_stream(), self._credit_part
        inbox.sent(isinstance(request, Resume))
        self._inboxes[inbox.stream] = inbox
        self._credit_soon()
        self._watch_on()

    async def call(self, method: Callable[..., Message], **fields: Any) -> Any:
        """Send a message that has one answer, and wait for it."""
        if self.error is not None:
            raise self.error
        stream = self._new_stream()
        self.send(method(stream=stream, **fields))
        answer = self._calls[stream] = self.loop.create_future()
        self._watch_on()
        try:
            return await answer
        finally:
            self._calls.pop(stream, None)

    def send(self, message: Message) -> None:
        """Pack a message, now: one that cannot be sent is refused to its sender, and takes no other with it.

        All that is sent in one turn of the loop leaves in one write. Raises FrameTooLarge.
        """
        self._write(frame_of(message, self.welcome.limits))

    def tell(self, method: Callable[..., Message], **fields: Any) -> None:
        """Send a message whose answer nobody waits for."""
        self.send(method(stream=self._new_stream(), **fields))

    def cancel(self, inbox: Inbox) -> None:
        """Ask the server to end a generation."""
        if self._inboxes.get(inbox.stream) is inbox:
            self.send(Cancel(stream=inbox.stream))

    def consumed(self, inbox: Inbox, cost: int) -> None:
        """Deltas that cost so much have left the inbox for good: the server may send others."""
        cost = min(cost, inbox.held)  # deltas of an earlier connection count no more
        inbox.held -= cost
        inbox.unsettled += cost
        if inbox.unsettled >= inbox.settles_at:
            self.settle(inbox)

    def settle(self, inbox: Inbox) -> None:
        """Give credit back for what was consumed; on a connection without credit, read on if it is enough."""
        if self._credit_part:
            self._credit(inbox)
            return
        self._unread_bytes -= inbox.unsettled
        inbox.unsettled = 0
        if not self._is_reading and 2 * self._unread_bytes < self._max_unread_bytes:
            self._is_reading = True
            self._heard_s = self.loop.time()  # the silence until now was our own
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def _credit(self, inbox: Inbox) -> None:
        """Give back what has been consumed."""
        if inbox.unsettled and self._inboxes.get(inbox.stream) is inbox:
            self.send(Credit(stream=inbox.stream, bytes=inbox.unsettled))
            inbox.unsettled = 0

    def _credit_all(self) -> None:
        """Once in a while, what is too little to be given back by itself."""
        self._crediting = None
        for inbox in self._inboxes.values():
            self._credit(inbox)
        self._credit_soon()

    def _credit_soon(self) -> None:
        """Look at what has been consumed after a while, as long as something is open."""
        if self._credit_part and self._inboxes and self._crediting is None:
            self._crediting = self.loop.call_later(CREDIT_S, self._credit_all)

    def close(self, reason: CierzoError | None = None) -> None:
        """Send what waits, then close. What still waits for an answer fails with `reason`."""
        self.error = self.error or reason
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def cancel_all(self) -> None:
        """Ask the server to end all generations: one that can be resumed goes on without its connection."""
        for inbox in self._inboxes.values():
            inbox.cancel()

    def _new_stream(self) -> int:
        self._next_stream += 1
        return self._next_stream

    def _write(self, frames: bytearray) -> None:
        if not self._outbox:
            self.loop.call_soon(self._flush)
        self._outbox += frames

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, bytearray()
        if outbox and self._transport is not None and not self._transport.is_closing():
            self._transport.write(outbox)

    # --- what comes ------------------------------------------------------------------------------------

    def _receive(self, message: Welcome | Accepted | Final | Failure | Ping | Reply) -> None:
        if isinstance(message, Final):
            self.had_news = True
            ended = self._inboxes.pop(message.stream, None)
            if ended is not None:
                ended.put(message)
        elif isinstance(message, Accepted):
            if message.stream in self._inboxes:
                self._inboxes[message.stream].put(message)
        elif isinstance(message, Failure):
            self._failed(message)
        elif isinstance(message, Welcome):
            self._greeted(message)
        elif isinstance(message, Ping):
            self.had_news = True
            self.send(Pong(stream=message.stream))
        else:
            self.had_news = True
            call = self._calls.pop(message.stream, None)
            if call is not None and not call.done():
                call.set_result(message)

    def _take(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            inbox = self._inboxes.get(delta.stream)
            if inbox is None:
                continue
            self.had_news = True
            cost = delta_cost(delta)
            inbox.held += cost
            if not self._credit_part:
                self._unread_bytes += cost
                if self._is_reading and self._unread_bytes > self._max_unread_bytes and self._transport is not None:
                    self._is_reading = False
                    self._transport.pause_reading()
            if inbox.dropped or (inbox.reopened and inbox.repeats(delta)):
                self.consumed(inbox, cost)
            else:
                inbox.add(delta, cost)

    def _greeted(self, welcome: Welcome) -> None:
        if self.welcomed.done():
            return
        self.welcome, self.features = welcome, frozenset(welcome.features)
        if "credit" in self.features:
            self._credit_part = max(1, welcome.limits.stream_credit_bytes // CREDIT_PARTS)
        self._splitter.max_frame_bytes = MAX_SERVER_FRAME_BYTES
        if self._keepalive_s is None:
            self._keepalive_s = welcome.limits.keepalive_s or KEEPALIVE_S
        self.welcomed.set_result(welcome)

    def _failed(self, message: Failure) -> None:
        error = error_of(message)
        if message.stream < 0:
            self.close(self._wants_tls() if error.field == "tls" and not self.welcomed.done() else error)
            return
        inbox = self._inboxes.pop(message.stream, None)
        if inbox is not None:
            inbox.put(error)
        call = self._calls.pop(message.stream, None)
        if call is not None and not call.done():
            call.set_exception(error)

    def _wants_tls(self) -> CierzoError:
        why = f"{self.peer} speaks TLS, and this client does not: connect with tls= (--tls-ca)"
        return ConfigError(why, field="tls", limit="True, or a file of certificates")

    # --- keepalive -------------------------------------------------------------------------------------

    def _watch_on(self) -> None:
        """Look after the server's silence, from now on until nothing is awaited."""
        if self._watch is None and self._keepalive_s is not None:
            self._heard_s = self.loop.time()
            self._watch = self.loop.call_later(self._keepalive_s, self._look)

    def _look(self) -> None:
        """Ping a server that has been silent for long; end the connection if it stays so."""
        assert self._keepalive_s is not None
        self._watch, now = None, self.loop.time()
        if not self._inboxes and not self._calls:
            return
        if not self._is_reading:
            self._heard_s = now  # the silence is our own
        is_silent = now >= max(self._heard_s, self._pinged_s) + self._keepalive_s
        if is_silent and self._pinged_s > self._heard_s:
            self.error = self.error or ConnectionLost(
                f"{self.peer} has been silent for {now - self._heard_s:.3g} s, and does not answer a ping",
                field="keepalive_s",
                limit=self._keepalive_s,
            )
            if self._transport is not None:
                self._transport.abort()
            return
        if is_silent:
            self._pinged_s = now
            self.tell(Ping)
        self._watch = self.loop.call_at(max(self._heard_s, self._pinged_s) + self._keepalive_s, self._look)
