"""Samples on disk, a line of JSON each, so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cierzo.engine.errors import ConfigError

CEILINGS = "ceilings"  # the cell of what the machine can do; the subject is the block that it was measured for
STARTED = "started"  # the error of a cell that has begun: the last word where it took the whole run with it
TIME_OVER = "the run's time was over"  # before the cell was, which is no failure of it


@dataclass(frozen=True, slots=True)
class Sample:
    """An attempt to measure a cell of a subject in a round: a result as JSON, or the error that left it without."""

    cell: str
    subject: str
    round: int
    started: str
    took_s: float
    error: str = ""
    result: Any = None


class Store:
    """The samples of one file. Its first line is their identity: commit, device, checkpoints."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """Read `path`, which the first sample begins; a last line that a killed run left unfinished is dropped.

        Raises ConfigError where the file holds samples of another identity, or anything but samples.
        """
        self.path, self.identity = path, dict(identity)
        self._all: list[Sample] = []
        self._samples: dict[tuple[str, str], list[Sample]] = {}  # the same, by cell and subject
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._begun = bool(whole)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                if number == 1:
                    self._require(json.loads(line))
                else:
                    self._keep(Sample(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}", field="samples", value=str(path)) from error

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._all)

    def add(self, sample: Sample) -> None:
        """Append a sample; it is on disk when this returns."""
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.identity)
            self._begun = True
        self._append({name: getattr(sample, name) for name in Sample.__slots__})
        self._keep(sample)

    def of(self, cell: object, subject: object) -> list[Sample]:
        """Every attempt at a cell of a subject, in order; both are named by their text."""
        return self._samples.get((str(cell), str(subject)), [])

    def measured(self, cell: object, subject: object) -> dict[int, Any]:
        """Round -> result; the last one counts. A failure is no measurement."""
        return {sample.round: sample.result for sample in self.of(cell, subject) if not sample.error}

    def error(self, cell: object, subject: object) -> str:
        """The reason why the last attempt failed; empty if it did not, or was not made."""
        attempts = self.of(cell, subject)
        return attempts[-1].error if attempts else ""

    def failed(self, cell: object, subject: object) -> bool:
        """Whether the last attempt failed, or was the end of its run."""
        return self.error(cell, subject) not in ("", TIME_OVER)

    def ceilings(self) -> list[Any]:
        """Every measurement of the machine's ceilings, in order."""
        return [sample.result for sample in self if sample.cell == CEILINGS and not sample.error]

    def _keep(self, sample: Sample) -> None:
        self._all.append(sample)
        self._samples.setdefault((sample.cell, sample.subject), []).append(sample)

    def _append(self, value: Any) -> None:
        with self.path.open("ab", buffering=0) as file:
            end, line = file.tell(), json.dumps(value, ensure_ascii=False).encode() + b"\n"
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:  # half a line would spoil the next one
                file.truncate(end)
                raise

    def _require(self, there: Any) -> None:
        for name, wanted in self.identity.items():
            theirs = there.get(name) if isinstance(there, dict) else None
            if theirs != wanted:
                told = f"{self.path} holds samples of {name} {theirs!r}, this run is of {wanted!r}"
                remedy = "name another file, or remove it"
                raise ConfigError(f"{told}: {remedy}", field=name, limit=theirs, value=wanted)


def has_samples(path: Path) -> bool:
    """Whether a file holds any sample behind its identity."""
    return path.exists() and path.read_bytes().count(b"\n") > 1
