"""docs/operations.md tells whoever runs the server of every error, health state and setting of the front end."""

from __future__ import annotations

import re
from pathlib import Path

from cierzo.engine.errors import BY_CODE
from cierzo.engine.frontend.config import FrontendConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
HEALTH_STATES = ("loading", "ready", "stalled", "draining", "failed")


def _column(first_head: str) -> list[str]:
    """The names in the first column of every table whose head begins so."""
    tables = re.findall(rf"^\| {first_head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert tables, first_head
    firsts = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return [name for first in firsts for name in re.findall(r"`(\w+)`", first)]


def test_every_error_has_its_row() -> None:
    assert not set(BY_CODE) - set(_column("code"))


def test_every_health_state_has_its_row() -> None:
    assert sorted(_column("state")) == sorted(HEALTH_STATES)


def test_every_setting_is_named() -> None:
    assert not [name for name in FrontendConfig.__struct_fields__ if f"`{name}`" not in TEXT]


def test_defaults_are_those_of_the_code() -> None:
    """Where a row of limits tells defaults, they are the settings' own."""
    defaults = FrontendConfig()
    wrong = []
    for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", TEXT, re.MULTILINE):
        names = re.findall(r"`(\w+)`", row[0])
        if not all(hasattr(defaults, name) for name in names):
            continue
        told = re.split(r", (?=\d)", row[1].strip())
        shown = [_shown(getattr(defaults, name), text) for name, text in zip(names, told, strict=True)]
        wrong += [(names, told, shown)] if shown != told else []
    assert not wrong


def _shown(value: float, like: str) -> str:
    """A default in the words of the table."""
    for unit, size in (("KiB", 1024), ("MiB", 1024**2)):
        if like.endswith(unit):
            return f"{value / size:g} {unit}"
    return f"{value:,g}" if value < 1000 else f"{int(value):,}"
