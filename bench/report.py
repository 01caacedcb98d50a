"""Results as JSON: what ran, on what machine, with which versions, and every raw sample."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from cierzo.bench.machine import Machine, describe_machine
from cierzo.bench.revision import installed_versions
from cierzo.engine.errors import CierzoError, ConfigError

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


def check_writable(path: Path) -> None:
    """Raise ConfigError where a report could not be written to `path`, and leave the path as it is."""
    file = path.resolve()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", field="json", limit="a path that can be written", value=path)


def run_benchmark(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Give a benchmark of one command the option --json, parse, and run it; exit status 2, with the words, for what
    cannot be measured."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")
    try:
        return run(parser.parse_args(argv))
    except CierzoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


class Recording:
    """A report in the making: it goes to `path`, if there is one, when there are results."""

    def __init__(self, benchmark: str, path: Path | None, command: Sequence[str] = ()) -> None:
        """Note the time, and the command: by default that of this process, which is `cierzo`. Raises ConfigError
        where `path` cannot be written: before the measurement, not after it."""
        if path is not None:
            check_writable(path)
        words = shlex.join(command or ["cierzo", *sys.argv[1:]])
        told = words.encode("utf-8", "backslashreplace").decode()  # a path may hold bytes that are no text
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._path = path
        self._about: dict[str, Any] = {"benchmark": benchmark, "command": told, "started": started}

    def write(self, settings: Any, results: Any) -> None:
        """Write one line of JSON, if the report has a place."""
        if self._path is not None:
            about = self._about | {"machine": describe_machine(), "versions": installed_versions()}
            report = Report(**about, settings=settings, results=results)
            self._path.write_bytes(msgspec.json.encode(report) + b"\n")
