"""Results as JSON: what ran, on what machine, with which versions, and every raw sample."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from cierzo.bench.machine import Machine, describe_machine
from cierzo.bench.revision import installed_versions
from cierzo.engine.errors import ConfigError

progress = partial(tqdm, delay=2.0, leave=False, disable=None)  # a bar of what takes longer than seconds


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a benchmark. `settings` and `results` are the benchmark's own frozen structs."""

    benchmark: str
    command: str
    started: str
    machine: Machine
    versions: dict[str, str]
    settings: Any
    results: Any


def write_report(path: Path, benchmark: str, *, command: str, started: str, settings: Any, results: Any) -> None:
    """Write one line of JSON; `started` is UTC, ISO 8601. Raises OSError where the path cannot be written."""
    report = Report(
        benchmark=benchmark,
        command=command.encode("utf-8", "backslashreplace").decode(),  # a path may hold bytes that are no text
        started=started,
        machine=describe_machine(),
        versions=installed_versions(),
        settings=settings,
        results=results,
    )
    path.write_bytes(msgspec.json.encode(report) + b"\n")


def check_writable(path: Path) -> None:
    """Raise ConfigError where `write_report` could not write `path`, and leave the path as it is."""
    file = path.resolve()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", field="json", limit="a path that can be written", value=path)


class Recording:
    """A report in the making: it goes to `path`, if there is one, when there are results."""

    def __init__(self, benchmark: str, path: Path | None, program: Sequence[str] = ("cierzo",)) -> None:
        """Note the time, and the command: `program` with this process's arguments. Raises ConfigError where `path`
        cannot be written: before the measurement, not after it."""
        self._benchmark, self._path = benchmark, path
        self._command = shlex.join([*program, *sys.argv[1:]])
        self._started = now()
        if path is not None:
            check_writable(path)

    def write(self, settings: Any, results: Any) -> None:
        """Write the report, if it has a place."""
        if self._path is not None:
            about = {"command": self._command, "started": self._started, "settings": settings}
            write_report(self._path, self._benchmark, **about, results=results)


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
