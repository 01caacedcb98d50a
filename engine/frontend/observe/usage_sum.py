"""Sums over usage files, by tenant. Files are read a line at a time, the oldest first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from cierzo.engine.errors import refusal
from cierzo.engine.frontend.observe.usage_file import KEPT_FILES, aged
from cierzo.engine.frontend.observe.usage_record import UsageRecord

MAX_LINE_BYTES = 1 << 16
BEGINNING = b'{"time":'  # of a record
_decode = msgspec.json.Decoder(UsageRecord).decode


class Sums(msgspec.Struct):
    """Sums over the requests of a tenant. `ends`: how many samples, or requests with an error, ended how."""

    requests: int = 0
    ends: dict[str, int] = {}
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    kv_block_s: float = 0.0
    total_s: float = 0.0

    def add(self, record: UsageRecord) -> None:
        """Count a record."""
        self.requests += 1
        for end in record.end:
            self.ends[end] = self.ends.get(end, 0) + 1
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(record, name))


SUMMED = [name for name in Sums.__struct_fields__ if name not in ("requests", "ends")]


class Reader:
    """Reads usage files. `bad` hears of each line that is no record: file, number, and why. num_bad: such lines;
    num_cut: lines besides that a process which was killed has not finished."""

    def __init__(self, bad: Callable[[str, int, str], None]) -> None:
        self.num_bad = self.num_cut = 0
        self._bad = bad

    def sums(self, paths: Iterable[str], since: datetime | None, until: datetime | None) -> dict[str, Sums]:
        """Sums by tenant of what ended from `since` on, and before `until`."""
        found: dict[str, Sums] = {}
        for path in paths:
            for record in self.records(path):
                if (since is None or record.time >= since) and (until is None or record.time < until):
                    found.setdefault(record.tenant, Sums()).add(record)
        return dict(sorted(found.items()))

    def records(self, path: str) -> Iterator[UsageRecord]:
        """The records of a file."""
        for number, line in enumerate(_lines(path), start=1):
            line = line.removesuffix(b"\n")  # the next start has ended one that was cut
            try:
                record = _decode(line)
                if record.time.tzinfo is None:
                    raise ValueError("time has no zone")
                yield record
            except (ValueError, UnicodeDecodeError) as error:  # a DecodeError is a ValueError
                is_cut = line[: len(BEGINNING)] == BEGINNING[: len(line)] and "truncated" in str(error)
                self.num_cut += is_cut
                self.num_bad += not is_cut
                self._bad(path, number, "was cut short" if is_cut else str(error))


def files_of(paths: Iterable[str]) -> list[str]:
    """These files and what was rotated out of each, the oldest first, every one once. Raises ConfigError for one
    that is not there."""
    found: dict[str, str] = {}
    for path in paths:
        ages = [aged(path, age) for age in range(KEPT_FILES, -1, -1)]
        there = [name for name in (*ages, path) if Path(name).is_file()]
        if not there:
            raise refusal("FILE", "a usage file", path)
        found |= {os.path.realpath(name): name for name in there if os.path.realpath(name) not in found}
    return [*found.values()]


def moment(text: str) -> datetime:
    """A date, or date and time, in ISO 8601; without a zone it is UTC. Raises ValueError for anything else."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _lines(path: str) -> Iterator[bytes]:
    """Lines, each as far as it is not longer than any record."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                pass
