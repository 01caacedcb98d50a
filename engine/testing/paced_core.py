"""A core that makes each token when its time has come."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from functools import partial

from cierzo.engine.frontend.core_side import CoreSide
from cierzo.engine.messages import Abort, CoreCommand, Submit
from cierzo.engine.testing.fake_core import FakeCore
from cierzo.engine.testing.script import Scripted


class ManualClock:
    """Seconds that pass when a test says so, from any thread: `advance`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass. Tokens that are due by then come soon after."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"time goes forward by a finite number of seconds, not by {seconds}")
        with self._lock:
            self._now_s += seconds
            listeners = [*self._listeners]
        for tell in listeners:
            tell()

    def listen(self, tell: Callable[[], None]) -> Callable[[], None]:
        """Call `tell` whenever time has passed, until the function that is given back is called."""
        with self._lock:
            self._listeners.append(tell)

        def stop() -> None:
            with self._lock:
                self._listeners.remove(tell)

        return stop


class PacedCore:
    """The core of a `Frontend`, in its own event loop. `start` it once there is a front end; `stop` it."""

    def __init__(self, first_token_s: float, token_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_held = False  # it makes nothing and hears nothing: as if it hung
        self._first_token_s = first_token_s
        self._token_s = token_s
        self._clock = clock
        self._core = FakeCore(_answer)
        self._events: CoreSide | None = None
        self._timer: asyncio.Handle | None = None
        self._stop_listening: Callable[[], None] | None = None

    def start(self, events: CoreSide) -> None:
        """Tell these what is made."""
        self._events = events
        if isinstance(self._clock, ManualClock):
            loop = asyncio.get_running_loop()
            self._stop_listening = self._clock.listen(partial(_soon, loop, self.go_on))

    def stop(self) -> None:
        """Make nothing any more."""
        self.forget()
        if self._stop_listening is not None:
            self._stop_listening()

    def forget(self) -> None:
        """Lose all requests, as a core that dies."""
        self._core.running.clear()
        self.go_on()

    # --- core_side.Core --------------------------------------------------------------------------------

    def send(self, command: CoreCommand) -> None:
        """Take a command. What it leads to is told later: the caller is not ready for it."""
        if isinstance(command, Submit):
            due_s = self._clock() + self._first_token_s
            for sequence in self._core.take(command):
                sequence.due_s = due_s
            self.go_on()
        elif isinstance(command, Abort) and not self.is_held:
            asyncio.get_running_loop().call_soon(self._abort, command)

    def forgive(self) -> None:
        """No deaths are counted here."""

    # --- inside ----------------------------------------------------------------------------------------

    def _abort(self, command: Abort) -> None:
        assert self._events is not None
        self._events.step(self._core.drop(command))

    def go_on(self) -> None:
        """Look again for what is due, and set the timer for what will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._core.running and not self.is_held:
            loop, wait_s = asyncio.get_running_loop(), self._next_s() - self._clock()
            if wait_s <= 0:
                self._timer = loop.call_soon(self._step)
            elif not isinstance(self._clock, ManualClock):
                self._timer = loop.call_later(wait_s, self._step)

    def _next_s(self) -> float:
        return min(sequence.due_s for sequence in self._core.running.values())

    def _step(self) -> None:
        self._timer = None
        assert self._events is not None
        now = self._clock()
        due = [key for key, sequence in self._core.running.items() if sequence.due_s <= now]
        for key in due:
            self._core.running[key].due_s += self._token_s
        if due:
            self._events.step(self._core.make(due))
        self.go_on()


def _answer(submit: Submit, sample: int) -> list[int]:
    assert isinstance(submit, Scripted)
    return submit.tokens


def _soon(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """Call it on its loop, from whatever thread."""
    loop.call_soon_threadsafe(what)
