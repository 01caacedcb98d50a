"""Things that are due a fixed time after they were added, with one timer for all of them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Expiry(Generic[T]):
    """Calls `due` with each thing `delay_s` after it was added, unless it was discarded. As the delay is the same
    for all, the oldest is always the next one."""

    __slots__ = ("_clock", "_delay_s", "_due", "_things", "_timer")

    def __init__(self, delay_s: float, clock: Callable[[], float], due: Callable[[T], None]) -> None:
        self._delay_s = delay_s
        self._clock = clock
        self._due = due
        # of a plain dict the first entry is looked for among all that were deleted before it
        self._things: OrderedDict[T, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, thing: T) -> bool:
        return thing in self._things

    def add(self, thing: T) -> None:
        """Start the time of a thing, anew if it runs already."""
        self._things.pop(thing, None)
        self._things[thing] = self._clock() + self._delay_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._fire)

    def discard(self, thing: T) -> None:
        """Stop the time of a thing, if it runs."""
        self._things.pop(thing, None)
        if not self._things:
            self.close()

    def clear(self) -> None:
        """Stop the time of all."""
        self._things.clear()
        self.close()

    @property
    def next_s(self) -> float:
        """Seconds until the oldest is due; the whole delay if there is none."""
        oldest = next(iter(self._things.values()), None)
        return self._delay_s if oldest is None else max(0.0, oldest - self._clock())

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        now = self._clock()
        try:
            for _ in range(len(self._things)):  # and none of those that are added meanwhile
                if not self._things:
                    break
                thing, at_s = next(iter(self._things.items()))
                if at_s > now:
                    break
                del self._things[thing]
                self._due(thing)
        finally:  # not before: what is added meanwhile is not the next one that is due
            self.close()
            if self._things:
                self._timer = asyncio.get_running_loop().call_later(max(self.next_s, 0.001), self._fire)
