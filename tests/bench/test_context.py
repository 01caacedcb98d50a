"""The benchmark of long contexts, at short ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cierzo.bench.context import main
from cierzo.engine.weights.make import make_checkpoint


def test_it_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    arguments = ["--decode", "64", "128", "--repeats", "1", "--prefill", "96", "--chunk-tokens", "40"]
    assert main([str(checkpoint), *arguments, "--json", str(tmp_path / "report.json")]) == 0
    results = msgspec.json.decode((tmp_path / "report.json").read_bytes())["results"]
    assert [row["context"] for row in results["decode"]] == [64, 128]
    assert [(row["start"], row["tokens"]) for row in results["prefill"]] == [(0, 40), (40, 40), (80, 16)]
    assert "chunk ms" in capsys.readouterr().out
