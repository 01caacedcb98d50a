"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable


class Repeated:
    """Stands in for a CUDA graph: it does the work again."""

    recordings = 0
    replays = 0

    def __init__(self, work: Callable[[], None]) -> None:
        Repeated.recordings += 1
        work()
        self._work = work

    def replay(self) -> None:
        Repeated.replays += 1
        self._work()
