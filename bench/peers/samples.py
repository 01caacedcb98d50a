"""Raw samples on disk, a JSON line each, so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.peers.cells import Cell
from cierzo.engine.errors import ConfigError


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One cell of one engine in one round: a value in the cell's unit, or why there is none.

    `raw` is what the value was computed from, `command` what ran, `commit` of this repository ("-dirty" with
    changes on top).
    """

    checkpoint: str
    cell: Cell
    engine: str
    round: int
    commit: str
    started: str
    command: str = ""
    value: float | None = None
    raw: Any = None
    error: str = ""


class Samples:
    """The samples of one file, those of one commit in view."""

    def __init__(self, path: Path, commit: str) -> None:
        """Read `path` if it exists. Raises ConfigError where a line of it is no sample."""
        self._path = path
        self._commit = commit
        self._samples: list[Sample] = []
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
            try:
                self._samples.append(msgspec.json.decode(line, type=Sample))
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}", field="samples", value=path) from error

    def __iter__(self) -> Iterator[Sample]:
        return (sample for sample in self._samples if sample.commit == self._commit)

    def add(self, sample: Sample) -> None:
        """Append, to disk too."""
        self._samples.append(sample)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(sample) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, checkpoint: str, cell: Cell, engine: str, round_number: int) -> bool:
        """Whether this was measured, with these sizes and by this commit. A failure is no measurement."""
        wanted = (checkpoint, cell, engine, round_number)
        return any(
            (sample.checkpoint, sample.cell, sample.engine, sample.round) == wanted and sample.value is not None
            for sample in self
        )

    def values(self, checkpoint: str, cell: Cell, engine: str) -> dict[int, float]:
        """Round -> value. The last one counts; of memory, which sessions of a round may report apart, the most."""
        found: dict[int, float] = {}
        for sample in self.of(checkpoint, cell, engine):
            if sample.value is not None:
                before = found.get(sample.round, 0.0) if cell.kind == "memory" else 0.0
                found[sample.round] = max(sample.value, before)
        return found

    def error(self, checkpoint: str, cell: Cell, engine: str) -> str:
        """Why the last attempt failed; empty if it did not, or was not made."""
        attempts = list(self.of(checkpoint, cell, engine))
        return attempts[-1].error if attempts else ""

    def of(self, checkpoint: str, cell: Cell, engine: str) -> Iterator[Sample]:
        """Every attempt at a cell, in order."""
        wanted = (checkpoint, cell, engine)
        return (sample for sample in self if (sample.checkpoint, sample.cell, sample.engine) == wanted)
