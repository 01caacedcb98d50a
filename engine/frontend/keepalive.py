"""Signs of life of a client that has the feature "keepalive": a ping after a silence, the end after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Keepalive:
    """Watches one connection. One timer, which is only moved when it fires: bytes come much more often."""

    __slots__ = ("_gone", "_heard_s", "_loop", "_ping", "_pinged", "_quiet_s", "_timer")

    def __init__(self, quiet_s: float, ping: Callable[[], None], gone: Callable[[], None]) -> None:
        """`ping` is called after `quiet_s` without a byte, `gone` after as long again."""
        self._quiet_s = quiet_s
        self._ping = ping
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._pinged = False
        self._timer = self._loop.call_later(quiet_s, self._look)

    def heard(self) -> None:
        """Note that bytes came."""
        self._heard_s = self._loop.time()
        self._pinged = False

    def cancel(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due_s = self._heard_s + self._quiet_s * (2 if self._pinged else 1)
        if now >= due_s:
            if self._pinged:
                self._gone()
                return
            self._pinged = True
            due_s = self._heard_s + 2 * self._quiet_s
            self._ping()
        self._timer = self._loop.call_at(max(due_s, now), self._look)
