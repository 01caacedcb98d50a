"""The measurement: rounds outside, then profiles, models in alternation inside; each figure on disk at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.records import Measurement, Record, Records
from cierzo.bench.machine import Ceilings


class Session(Protocol):
    """A loaded engine."""

    def measure(self, cell: Cell, subject: Subject, number: int) -> Measurement:
        """A cell, in the round of this number. Whatever it raises is why the cell has no figure."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Backend(Protocol):
    """Where engines run."""

    def ceilings(self) -> Ceilings | None:
        """What the machine can do, measured now; None where that is on a data sheet."""
        ...

    def open(self, subject: Subject, cells: list[Cell]) -> Session:
        """Load an engine for cells of one profile. Whatever it raises is why they have no figures."""
        ...


class Run:
    """One plan over one file of records; what is in there already is not measured again."""

    def __init__(self, plan: Plan, backend: Backend, records: Records, say: Callable[[str], None] = print) -> None:
        self._plan, self._backend, self._records, self._say = plan, backend, records, say
        self._start = time.monotonic()

    def measure(self, rounds: int) -> None:
        """All rounds. No subject always goes first."""
        for number in range(rounds):
            for profile in dict.fromkeys(cell.profile for cell in self._plan.cells):
                cells = [cell for cell in self._plan.cells if cell.profile == profile]
                subjects = self._plan.subjects if number % 2 == 0 else self._plan.subjects[::-1]
                self._profile(number, cells, subjects)

    def _profile(self, number: int, cells: list[Cell], subjects: tuple[Subject, ...]) -> None:
        pending = {
            subject: [cell for cell in cells if not self._records.has(cell, subject, number)]
            for subject in subjects
        }
        if not any(pending.values()):
            return
        ceilings = self._backend.ceilings()
        if ceilings is not None:
            rates = f"{ceilings.read.rate:.1f} GB/s, {ceilings.bf16.rate:.0f} GFLOP/s in bf16"
            self._say(f"round {number + 1}, {cells[0].profile}: this machine can do {rates}")
        for subject, missing in pending.items():
            self._subject(number, subject, cells, missing, ceilings)

    def _subject(
        self, number: int, subject: Subject, cells: list[Cell], missing: list[Cell], ceilings: Ceilings | None
    ) -> None:
        """A session for the cells; after a failure a new one for those that are left."""
        while missing:
            started = time.monotonic()
            try:
                session = self._backend.open(subject, cells)
            except Exception as error:  # whatever it is, the other subjects go on
                for cell in missing:
                    self._record(number, cell, subject, started, error=error)
                return
            try:
                failed = False
                while missing and not failed:
                    failed = not self._cell(number, missing.pop(0), subject, session, ceilings)
            finally:
                session.close()

    def _cell(self, number: int, cell: Cell, subject: Subject, session: Session, ceilings: Ceilings | None) -> bool:
        started = time.monotonic()
        try:
            measurement = session.measure(cell, subject, number)
        except Exception as error:  # whatever it is, the other cells go on
            self._record(number, cell, subject, started, error=error)
            return False
        self._record(number, cell, subject, started, msgspec.structs.replace(measurement, ceilings=ceilings))
        return True

    def _record(
        self,
        number: int,
        cell: Cell,
        subject: Subject,
        began: float,
        measurement: Measurement | None = None,
        error: Exception | None = None,
    ) -> None:
        """One record to disk, and a line to the terminal."""
        told = "" if error is None else str(error) or type(error).__name__
        if measurement is None:
            figure = f"FAILED: {told}"
        elif cell.is_throughput:
            found = measurement.figure
            figure = f"{found.requests_per_s:.4g} requests/s at {found.concurrency:,} concurrent"
        else:
            figure = f"{measurement.figure.completion_s.p50:.4g} s"
        took_s = time.monotonic() - began
        self._say(f"{time.monotonic() - self._start:6.0f} s  round {number + 1}  {cell.name}  {subject}: {figure}")
        self._records.add(
            Record(
                cell=cell,
                subject=subject,
                round=number,
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                took_s=round(took_s, 3),
                measurement=measurement,
                error=told,
            )
        )
