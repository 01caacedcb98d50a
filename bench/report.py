"""Results as JSON: what ran, on what machine, with which versions, and every raw sample."""

from __future__ import annotations

import hashlib
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.machine import Machine, describe_machine
from cierzo.engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]  # of the repository
PACKAGES = ("cierzo", "torch", "transformers", "numpy", "msgspec", "uvloop")


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


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can move a figure; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_writable(path: Path) -> None:
    """Raise ConfigError where `write_report` could not write `path`, and leave the path as it is."""
    file = path.resolve()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", field="json", limit="a path that can be written", value=path)


def write_report(report: Report, path: Path) -> None:
    """Write one line of JSON; raises OSError where the path cannot be written."""
    path.write_bytes(msgspec.json.encode(report) + b"\n")


def current_commit() -> str:
    """HEAD of this repository; with "-dirty" and a digest of the changes where there are any."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD").strip() or "unknown"
    changes = git("diff", "HEAD", "--", ".", ":(exclude)bench/results")
    if not changes:
        return head
    digest = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return f"{head}-dirty-{digest}"
