"""What was measured, on disk, a JSON line each, so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from cierzo.bench.headline.cells import Cell, Subject
from cierzo.bench.headline.figures import Figure
from cierzo.bench.headline.search import Point
from cierzo.bench.latency import RequestSample
from cierzo.bench.machine import Ceilings
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics

T = TypeVar("T")


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all figures of a file belong to; the first line."""

    commit: str
    device: str
    small4: str
    small3: str


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A cell of one subject: the figure, and how it came about.

    layout: of several cards; `others`: what else they could do, and why it lost or cannot be. points: of the search
    for a concurrency; bounded_by: what kept it from being higher. kv_room_requests: of this cell, at their full
    length. experts: that tokens chose, where they were counted. samples: of the load that `figure` is of.
    """

    figure: Figure
    layout: str = ""
    others: list[str] = []
    points: list[Point] = []
    bounded_by: str = ""
    kv_room_requests: int = 0
    ceilings: Ceilings | None = None
    experts: ExpertStatistics | None = None
    command: str = ""
    samples: list[RequestSample] = []


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement in one round, or why there is none."""

    cell: Cell
    subject: Subject
    round: int
    started: str
    took_s: float
    measurement: Measurement | None = None
    error: str = ""


class Records:
    """The records of one file. Raises ConfigError where it is of something else, or malformed."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._records: list[Record] = []
        lines = path.read_bytes().splitlines() if path.exists() else []
        if lines:
            self._require(_decode(path, 1, lines[0], Identity), identity)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(identity) + b"\n")
        for number, line in enumerate(lines[1:], start=2):
            self._records.append(_decode(path, number, line, Record))

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def add(self, record: Record) -> None:
        """Append, to disk too."""
        self._records.append(record)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, cell: Cell, subject: Subject, number: int) -> bool:
        """Whether this was measured. A failure is no measurement."""
        return number in self.measured(cell, subject)

    def measured(self, cell: Cell, subject: Subject) -> dict[int, Measurement]:
        """By round."""
        return {
            record.round: record.measurement for record in self._of(cell, subject) if record.measurement is not None
        }

    def error(self, cell: Cell, subject: Subject) -> str:
        """Why the last attempt failed; empty if it did not, or was not made."""
        attempts = list(self._of(cell, subject))
        return attempts[-1].error if attempts else ""

    def _of(self, cell: Cell, subject: Subject) -> Iterator[Record]:
        return (record for record in self if (record.cell, record.subject) == (cell, subject))

    def _require(self, there: Identity, ours: Identity) -> None:
        for name in Identity.__struct_fields__:
            theirs, wanted = getattr(there, name), getattr(ours, name)
            if theirs != wanted:
                raise ConfigError(
                    f"{self._path} holds results of {name} {theirs!r}, this run is of {wanted!r}: name another "
                    "file with --samples, or remove it",
                    field=name,
                    limit=theirs,
                    value=wanted,
                )


def _decode(path: Path, number: int, line: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=type_)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}, line {number}: {error}", field="samples", value=str(path)) from error
