"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable


class Repeated:
    """Stands in for a CUDA graph: it does the work again, into the memory that it first wrote its result to."""

    recordings = 0
    replays = 0

    def __init__(self, work: Callable[[], None]) -> None:
        Repeated.recordings += 1
        work()
        self._work = work

    def replay(self) -> None:
        Repeated.replays += 1
        found = next(
            cell.cell_contents for cell in self._work.__closure__ or () if type(cell.cell_contents) is list
        )
        (kept,) = found
        self._work()
        kept.copy_(found[0])
        found[0] = kept
