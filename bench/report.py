"""Results as JSON: what ran, on what machine, with which versions, and every raw sample."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.machine import Machine, describe_machine
from cierzo.bench.revision import installed_versions
from cierzo.engine.errors import ConfigError


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one benchmark. `settings` and `results` are the benchmark's own frozen structs."""

    benchmark: str
    command: str
    started: str
    machine: Machine
    versions: dict[str, str]
    settings: Any
    results: Any


def make_report(benchmark: str, *, command: str, started: str, settings: Any, results: Any) -> Report:
    """Add machine and versions; `started` is UTC, ISO 8601."""
    return Report(
        benchmark=benchmark,
        command=command.encode("utf-8", "backslashreplace").decode(),  # a path may hold bytes that are no text
        started=started,
        machine=describe_machine(),
        versions=installed_versions(),
        settings=settings,
        results=results,
    )


def check_writable(path: Path) -> None:
    """Raise ConfigError where `write_report` could not write `path`, and leave the path as it is."""
    file = path.resolve()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", field="json", limit="a path that can be written", value=path)


def write_report(report: Report, path: Path) -> None:
    """Write one line of JSON; raises OSError where the path cannot be written."""
    path.write_bytes(msgspec.json.encode(report) + b"\n")
