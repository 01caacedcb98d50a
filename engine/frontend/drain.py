"""The end of a server's work, step by step: lame duck, no admission, nothing left; and the way back."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from cierzo.engine.errors import Draining
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.limits import require_room
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.messages import Drained, Message

log = logging.getLogger(__name__)

LOOK_S = 0.02  # between two looks at what connections have not sent yet
TURN_ANSWERS = 256  # in a turn of the loop


class Work(Protocol):
    """Streams and connections that a drain waits for."""

    @property
    def num_open(self) -> int:
        """Streams that run, or whose reader has not been given all."""
        ...

    @property
    def num_left(self) -> int:
        """Requests among these, each counted once; slow, for a log."""
        ...

    @property
    def num_unsent(self) -> int:
        """Connections with messages that are not on their way yet."""
        ...

    def interrupt(self) -> None:
        """End what is still open, without waiting for its readers."""
        ...


class Drain:
    """A drain that may be under way. The front end begins it, and tells when streams end.

    From `begin`, `active`: health says so. After `lame_duck_s`, `refusing`: no request is taken. After `drain_s`
    more, what is still open is interrupted. It is over when nothing is open, and every connection has sent what was
    put or was interrupted. for_good: the process ends with it, so it is not undone.
    """

    def __init__(self, config: FrontendConfig, work: Work) -> None:
        self.active = False
        self.refusing = False
        self._config = config
        self._work = work
        self._for_good = False
        self._waits_for_sending = False
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._answering: asyncio.Handle | None = None
        self._over = asyncio.Event()
        self._waiters: dict[Sink, dict[int, None]] = {}  # connections, and the stream ids of their questions
        self._answers: deque[tuple[Sink, Message]] = deque()

    def begin(self, *, for_good: bool = False) -> None:
        """Begin, unless one is under way."""
        self._for_good |= for_good
        if self.active:
            return
        self.active = self._waits_for_sending = True
        if self._config.lame_duck_s > 0:
            text = "a lame duck for %g s: %d requests are open, and others are taken"
            log.info(text, self._config.lame_duck_s, self._work.num_left)
            self._later(self._config.lame_duck_s, self._refuse)
        else:
            self._refuse()

    def wait_for(self, sink: Sink, stream_id: int, num_streams: int) -> None:
        """Remember who asked for it, once for each stream id. Raises Overloaded if the connection, with so many
        streams, has asked too often."""
        waiters = self._waiters.get(sink, {})
        if stream_id not in waiters:
            require_room(self._config, "max_streams_per_connection", num_streams + len(waiters) + 1)
            self._waiters.setdefault(sink, {})[stream_id] = None

    def leave(self, sink: Sink) -> None:
        """A connection is gone."""
        self._waiters.pop(sink, None)

    def undo(self) -> None:
        """Take requests again, and tell who waits that the end will not come. Raises Draining if the server is to
        stop."""
        if self._for_good:
            raise Draining("the server stops after this drain: it cannot be undone", field="undo")
        if self.active:
            log.info("the drain is undone: requests are taken")
        self.active = self.refusing = False
        self._over.clear()
        self._stop_timers()
        undone = Draining("the drain was undone before it was complete")
        self._answer(lambda stream_id: failure(stream_id, undone))

    def interrupted(self) -> None:
        """Wait no longer for what connections have not sent."""
        self._waits_for_sending = False

    def check(self) -> None:
        """A stream may have ended: if it was the last one, and all is sent, say so to all who asked."""
        if not self.refusing or self._work.num_open:
            return
        if self._waits_for_sending and self._work.num_unsent:
            if self._look is None:
                self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_again)
            return
        self._stop_timers()
        self._answer(lambda stream_id: Drained(stream=stream_id))

    async def wait(self) -> None:
        """Wait until nothing is open, and nothing will be."""
        await self._over.wait()

    def close(self) -> None:
        """Stop what is to come."""
        self._stop_timers()
        if self._answering is not None:
            self._answering.cancel()

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()
        self._look = None

    def _look_again(self) -> None:
        self._look = None
        self.check()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, action)

    def _refuse(self) -> None:
        self.refusing = True
        log.info(
            "draining %d requests, at most %g s; no others are taken", self._work.num_left, self._config.drain_s
        )
        self._later(self._config.drain_s, self._work.interrupt)
        self.check()

    def _answer(self, message: Callable[[int], Message]) -> None:
        """Answer all who asked, some in each turn of the loop."""
        for sink, stream_ids in self._waiters.items():
            self._answers.extend((sink, message(stream_id)) for stream_id in stream_ids)
        self._waiters.clear()
        if self._answering is None:
            self._answer_some()

    def _answer_some(self) -> None:
        self._answering = None
        for _ in range(min(TURN_ANSWERS, len(self._answers))):
            sink, message = self._answers.popleft()
            sink.put(message)
        if self._answers:
            self._answering = asyncio.get_running_loop().call_soon(self._answer_some)
        elif self.refusing and not self._work.num_open:
            self._over.set()
