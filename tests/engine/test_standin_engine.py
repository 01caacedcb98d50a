"""Whole engines on the stand-in for a card: loaded, staged, recorded and overlapped as there, they give the tokens
of plain steps in the interpreter, though everything runs as late as it may and what was freed is poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from standin.ask import ask
from standin.engines import MODELS, load, make_config
from standin.library import available
from standin.plain import plainly

pytestmark = pytest.mark.skipif(not available(), reason="Triton's wheels are for Linux on x86-64")


def served(folder: Path, name: str, seed: int, count: int) -> dict[str, list[Any]]:
    """On the stand-in; its last act is to fail, which ends the engine (engines.ends_with_its_card)."""
    make_config(folder, name)
    found: dict[str, list[Any]] = ask("engines", str(folder), name, str(seed), str(count))
    return found


def test_overlapped_recorded_steps_give_the_tokens_of_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The dense model's steps; test_standin_server.py has the other. `make standin` adds larger loads of both."""
    more = range(request.config.getoption("--standin-loads"))
    for name, seed, count in [("small3", 1, 2), *((name, seed, 8) for seed in more for name in MODELS)]:
        found = served(tmp_path, name, seed, count)
        assert plainly(tmp_path, name, load(seed, count), monkeypatch) == found, (name, seed)
