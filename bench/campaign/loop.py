"""The measurement: rounds outside, then blocks, subjects in alternation inside; each sample on disk at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from cierzo.bench.campaign.store import CEILINGS, Sample, Store

C = TypeVar("C")  # cells and subjects; their text names them in the store
S = TypeVar("S")


class DeviceLost(Exception):
    """The device is lost to this process: the run ends behind the cell that failed, and a new one goes on there."""


@dataclass(frozen=True, slots=True)
class Block(Generic[C, S]):
    """Cells that one session of a subject measures, and the subjects that take turns."""

    name: str
    cells: Sequence[C]
    subjects: Sequence[S]


@dataclass(frozen=True, slots=True)
class Session(Generic[C]):
    """A loaded subject. measure: a cell in the round of this number -> JSON; whatever it raises is why the cell has
    no result. close: lets go of the subject. by_products: further results, by cells of their own: the time to load,
    memory."""

    measure: Callable[[C, int], Any]
    close: Callable[[], object] = lambda: None
    by_products: Callable[[], Mapping[C, Any]] = dict


class Campaign(Generic[C, S]):
    """The part of a measurement that each benchmark defines."""

    @property
    def blocks(self) -> Sequence[Block[C, S]]:
        """Blocks in the order of a round."""
        raise NotImplementedError

    def open(self, block: Block[C, S], subject: S) -> Session[C] | None:
        """Load a subject for the block's cells; None for one that has none of them.

        Whatever this raises is why they have no results.
        """
        raise NotImplementedError

    def ceilings(self) -> Any | None:
        """The machine's ceilings, measured now, as JSON; None where that is on a data sheet."""
        return None

    def wanted(self, number: int, store: Store) -> Callable[[C, S], bool]:
        """Which cells of which subjects the round of this number measures; by default all."""
        return lambda cell, subject: True

    def told(self, cell: C, result: Any) -> str:
        """A result in a few words, for the terminal."""
        raise NotImplementedError


@dataclass
class Run(Generic[C, S]):
    """A campaign over a store; cells that it holds already are not measured again. block_s: after so many seconds
    of a block no further cell of it is begun. failed: attempts without a result."""

    campaign: Campaign[C, S]
    store: Store
    say: Callable[[str], None] = print
    block_s: float = math.inf
    failed: int = 0
    start: float = field(default_factory=time.monotonic)

    def measure(self, rounds: int) -> None:
        """All rounds. No subject always goes first. Raises DeviceLost."""
        for number in range(rounds):
            wanted = self.campaign.wanted(number, self.store)
            for block in self.campaign.blocks:
                missing = {
                    subject: [
                        cell
                        for cell in block.cells
                        if wanted(cell, subject) and number not in self.store.measured(cell, subject)
                    ]
                    for subject in (block.subjects if number % 2 == 0 else block.subjects[::-1])
                }
                if any(missing.values()):
                    self._block(number, block, missing)

    def _block(self, number: int, block: Block[C, S], missing: dict[S, list[C]]) -> None:
        began = time.monotonic()
        try:
            if (ceilings := self.campaign.ceilings()) is not None:
                self._record((number, CEILINGS, block.name), began, ceilings, "measured")
        except Exception as error:  # whatever it is, the cells go on
            self._record((number, CEILINGS, block.name), began, error=error)
        for subject, cells in missing.items():
            while cells:  # after a failure a new session for those that are left
                if time.monotonic() > began + self.block_s:
                    self.say(f"{block.name}: {self.block_s:.0f} s are over; run it again for the rest")
                    return
                self._session(number, block, subject, cells, began + self.block_s)

    def _session(self, number: int, block: Block[C, S], subject: S, missing: list[C], deadline: float) -> None:
        """Measure cells, and take them off `missing`, until one fails or time is over."""
        began = time.monotonic()
        try:
            session = self.campaign.open(block, subject)
        except Exception as error:  # whatever it is, the other subjects go on
            for cell in missing:
                self._record((number, cell, subject), began, error=error)
            session = None
        if session is None:
            missing.clear()
            return
        try:
            while missing and time.monotonic() <= deadline:
                cell, cell_began = missing.pop(0), time.monotonic()
                try:
                    result = session.measure(cell, number)
                except Exception as error:  # whatever it is, the other cells go on
                    self._record((number, cell, subject), cell_began, error=error)
                    if isinstance(error, DeviceLost):
                        raise
                    break
                self._record((number, cell, subject), cell_began, result, self.campaign.told(cell, result))
            for cell, result in session.by_products().items():
                self._record((number, cell, subject), began, result, self.campaign.told(cell, result))
        finally:
            session.close()

    def _record(
        self, place: tuple[int, object, object], began: float, result: Any = None, told: str = "", error: Any = None
    ) -> None:
        """Write a sample to disk, and a line to the terminal. place: round, cell, subject."""
        (number, cell, subject), why = place, "" if error is None else str(error) or type(error).__name__
        self.failed += error is not None
        told = told if error is None else f"FAILED: {why}"
        self.say(f"{time.monotonic() - self.start:6.0f} s  round {number + 1}  {subject}  {cell}: {told}")
        started, took_s = datetime.now(UTC).isoformat(timespec="seconds"), round(time.monotonic() - began, 3)
        self.store.add(Sample(str(cell), str(subject), number, started, took_s, why, result))
