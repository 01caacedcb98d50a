"""The end of a server's work, step by step: lame duck, no admission, nothing left; and the way back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.messages import Drained

log = logging.getLogger(__name__)

Waiter = tuple[Sink, int]  # a connection, and the stream id of its question


class Drain:
    """A drain that may be under way. The front end begins it, and tells when streams end.

    From `begin`, `active`: health says so. After `lame_duck_s`, `refusing`: no request is taken. After `drain_s`
    more, `interrupt` is called, which is to end what is still open. It is `over` when nothing is.
    """

    def __init__(
        self,
        config: FrontendConfig,
        is_idle: Callable[[], bool],
        num_open: Callable[[], int],
        interrupt: Callable[[], None],
    ) -> None:
        self.active = False
        self.refusing = False
        self._config = config
        self._is_idle = is_idle
        self._num_open = num_open
        self._interrupt = interrupt
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._waiters: list[Waiter] = []

    def begin(self) -> None:
        """Begin, unless one is under way."""
        if self.active:
            return
        self.active = True
        if self._config.lame_duck_s > 0:
            text = "a lame duck for %g s: %d requests are open, and others are taken"
            log.info(text, self._config.lame_duck_s, self._num_open())
            self._later(self._config.lame_duck_s, self._refuse)
        else:
            self._refuse()

    def wait_for(self, sink: Sink, stream_id: int) -> None:
        """Remember who asked for it."""
        self._waiters.append((sink, stream_id))

    def leave(self, sink: Sink) -> None:
        """A connection is gone."""
        self._waiters = [waiter for waiter in self._waiters if waiter[0] is not sink]

    def undo(self) -> list[Waiter]:
        """Take requests again; who waits in vain for the end."""
        if self.active:
            log.info("the drain is undone: requests are taken")
        self.active = self.refusing = False
        self._over.clear()
        self.close()
        return self._all_waiters()

    def check(self) -> None:
        """A stream may have ended: if it was the last one, say so to all who asked."""
        if not self.refusing or not self._is_idle():
            return
        self._over.set()
        self.close()
        for sink, stream_id in self._all_waiters():
            sink.put(Drained(stream=stream_id))
            sink.flush()

    async def wait(self) -> None:
        """Wait until nothing is open, and nothing will be."""
        await self._over.wait()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, action)

    def _refuse(self) -> None:
        self.refusing = True
        log.info("draining %d requests, at most %g s; no others are taken", self._num_open(), self._config.drain_s)
        self._later(self._config.drain_s, self._interrupt)
        self.check()

    def _all_waiters(self) -> list[Waiter]:
        waiters, self._waiters = self._waiters, []
        return waiters
