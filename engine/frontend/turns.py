"""Turns at the event loop: input of all connections is worked off for a few milliseconds, then the loop goes on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

TURN_S = 0.005  # for all connections together
SLICE_S = 0.001  # for one of those that wait


class Worker(Protocol):
    """Someone with input: a connection."""

    def work(self, until: float) -> bool:
        """Work until the clock shows `until`, or all is done; True if something is left."""
        ...

    def hold(self) -> None:
        """Let no more input come: this one waits for its turn."""
        ...

    def release(self) -> None:
        """Let input come again."""
        ...


class Turns:
    """Gives each worker its time, in order."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._until: float | None = None
        self._waiting: deque[Worker] = deque()

    def enter(self, worker: Worker) -> None:
        """Let `worker` work now if the turn has time left, which it has not while someone waits; else later."""
        if self._until is None:
            self._open()
        assert self._until is not None
        if self.clock() < self._until and not worker.work(self._until):
            return
        worker.hold()
        self._waiting.append(worker)

    def _open(self) -> None:
        self._until = self.clock() + TURN_S
        asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """A new turn, if someone waits for it."""
        self._until = None
        if not self._waiting:
            return
        self._open()
        assert self._until is not None
        now = self.clock()
        while self._waiting:
            worker = self._waiting.popleft()
            if worker.work(min(self._until, now + SLICE_S)):
                self._waiting.append(worker)
            else:
                worker.release()
            if (now := self.clock()) >= self._until:
                break
