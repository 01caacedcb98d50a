"""A generation for callers without an event loop; `client` is the public face."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from cierzo.engine.errors import ConnectionLost
from cierzo.engine.frontend.answer import Answer, Answers
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.messages import Accepted, Delta, Final

TOLD_S, TOLD_PARTS = 0.25, 4  # a caller's taking is told to the loop's thread after such a time or part of a batch
T = TypeVar("T")
Run = Callable[[Callable[[], Coroutine[Any, Any, T]]], T]  # runs the coroutine that a function makes


class SyncGeneration:
    """A `Generation` for a plain `for` loop. Threads may share it: each delta goes to one of them."""

    def __init__(self, generation: Generation, run: Run) -> None:
        self._generation = generation
        self._run = run
        self._batch: deque[Delta] = deque()
        self._part = 0
        self._untold = 0  # cost of deltas that the caller took, and the loop's thread does not know
        self._told_s = time.monotonic()
        self._answers = Answers(joins="parts" in generation._inbox.link.features)
        self._lock = threading.Lock()  # of these five

    @property
    def final(self) -> Final:
        """As `Generation.final`."""
        return self._generation.final

    def answer(self, sample: int = 0) -> Answer:
        """As `Generation.answer`."""
        with self._lock:
            return self._answers.of(sample, self._generation._inbox.final)

    @property
    def request_id(self) -> str | None:
        """As `Generation.request_id`."""
        return self._generation.request_id

    @property
    def seed(self) -> int | None:
        """As `Generation.seed`."""
        return self._generation.seed

    @property
    def queue_position(self) -> int | None:
        """As `Generation.queue_position`."""
        return self._generation.queue_position

    def accepted(self, timeout_s: float | None = None) -> Accepted:
        """As `Generation.accepted`."""
        return self._run(lambda: self._generation.accepted(timeout_s))

    def next(self, timeout_s: float | None = None) -> Delta | None:
        """As `Generation.next`: None at the end; after a TimeoutError the generation goes on."""
        while True:
            with self._lock:
                if self._batch:
                    delta = self._batch.popleft()
                    if self._answers.joins:
                        self._answers.add(delta)
                    self._count(delta_cost(delta))
                    return delta
                self._tell()
            batch, cost = self._run(lambda: self._generation.take_batch(timeout_s))
            if not batch:
                return None
            with self._lock:
                self._batch.extend(batch)
                self._part = cost // TOLD_PARTS

    def _count(self, cost: int) -> None:
        """The caller has taken so much: tell it in parts, but soon, as the server waits for it."""
        self._untold += cost
        if time.monotonic() - self._told_s >= TOLD_S or (self._batch and self._untold > self._part):
            self._tell()

    def _tell(self) -> None:
        if self._untold:
            self._generation.consumed(self._untold)
            self._untold = 0
        self._told_s = time.monotonic()

    def cancel(self) -> None:
        """As `Generation.cancel`."""

        async def cancel() -> None:
            self._generation.cancel()

        with contextlib.suppress(ConnectionLost):  # which has cancelled it already
            self._run(cancel)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if (delta := self.next()) is None:
            raise StopIteration
        return delta
