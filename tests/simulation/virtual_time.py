"""An asyncio loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s


class _Selector(selectors.SelectSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let `timeout` pass; nothing ever comes from outside."""
        if timeout is None:
            raise RuntimeError("every task waits for another: the simulation would never end")
        self._clock.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in which only timers pass time."""

    def __init__(self, clock: Clock) -> None:
        self._virtual_clock = clock
        super().__init__(_Selector(clock))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual time, in seconds."""
        return self._virtual_clock.now_s

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """Timers that are still to come."""
        return [timer for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
