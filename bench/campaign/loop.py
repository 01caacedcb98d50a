"""The measurement: rounds outside, then blocks, subjects in alternation inside; each sample on disk at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from cierzo.bench.campaign.store import CEILINGS, STARTED, TIME_OVER, Sample, Store

C = TypeVar("C")  # cells and subjects; their text names them in the store
S = TypeVar("S")


class DeviceLost(Exception):
    """The device takes nobody any more: the run ends, and the cells that are left stay untried."""


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

        Whatever this raises is why they have no results; but DeviceLost ends the run.
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
    """A campaign over a store; cells that it holds already are not measured again.

    deadline: of time.monotonic(); no cell is begun behind it. announce: each cell leaves a sample before it begins,
    which tells what took a run with it that was killed. retry: cells that failed are tried again. failed: attempts
    without a result.
    """

    campaign: Campaign[C, S]
    store: Store
    say: Callable[[str], None] = print
    deadline: float = math.inf
    announce: bool = False
    retry: bool = True
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
                        if self.retry or not self.store.failed(cell, subject)
                    ]
                    for subject in (block.subjects if number % 2 == 0 else block.subjects[::-1])
                }
                if any(missing.values()):
                    if time.monotonic() >= self.deadline:
                        self.say("time is over: run it again for the rest")
                        return
                    self._block(number, block, missing)

    def _block(self, number: int, block: Block[C, S], missing: dict[S, list[C]]) -> None:
        began = time.monotonic()
        try:
            if (ceilings := self.campaign.ceilings()) is not None:
                self._record((number, CEILINGS, block.name), began, ceilings, "measured")
        except Exception as error:  # whatever it is, the cells go on
            self._record((number, CEILINGS, block.name), began, error=error)
        for subject, cells in missing.items():
            while (
                cells and time.monotonic() < self.deadline
            ):  # after a failure a new session for those that are left
                self._session(number, block, subject, cells)

    def _session(self, number: int, block: Block[C, S], subject: S, missing: list[C]) -> None:
        """Measure cells, and take them off `missing`, until one fails or time is over."""
        began = time.monotonic()
        try:
            session = self.campaign.open(block, subject)
        except DeviceLost:
            raise
        except Exception as error:  # whatever it is, the other subjects go on
            for cell in missing:
                self._record((number, cell, subject), began, error=error)
            session = None
        if session is None:
            missing.clear()
            return
        try:
            while missing and time.monotonic() < self.deadline:
                cell, cell_began = missing.pop(0), time.monotonic()
                if self.announce:
                    self._add((number, cell, subject), cell_began, STARTED)
                try:
                    result = session.measure(cell, number)
                except KeyboardInterrupt:  # no failure of the cell
                    if self.announce:
                        self._add((number, cell, subject), cell_began, TIME_OVER)
                    raise
                except Exception as error:  # whatever it is, the other cells go on
                    self._record((number, cell, subject), cell_began, error=error)
                    break
                self._record((number, cell, subject), cell_began, result, self._told(cell, result))
            for cell, result in session.by_products().items():
                self._record((number, cell, subject), began, result, self._told(cell, result))
        finally:
            session.close()

    def _told(self, cell: C, result: Any) -> str:
        try:
            return self.campaign.told(cell, result)
        except Exception as error:  # whatever it is, the result counts
            return f"measured; {type(error).__name__} in telling it: {error}"

    def _record(
        self, place: tuple[int, object, object], began: float, result: Any = None, told: str = "", error: Any = None
    ) -> None:
        """Write a sample to disk, and a line to the terminal. place: round, cell, subject."""
        (number, cell, subject), why = place, "" if error is None else str(error) or type(error).__name__
        self.failed += why not in ("", TIME_OVER)
        self._add(place, began, why, result)  # before a terminal that may be gone
        told = told if error is None else why if why == TIME_OVER else f"FAILED: {why}"
        self.say(f"{time.monotonic() - self.start:6.0f} s  round {number + 1}  {subject}  {cell}: {told}")

    def _add(self, place: tuple[int, object, object], began: float, why: str, result: Any = None) -> None:
        (number, cell, subject), took_s = place, round(time.monotonic() - began, 3)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.store.add(Sample(str(cell), str(subject), number, now, took_s, why, result))
