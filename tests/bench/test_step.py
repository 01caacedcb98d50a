"""The step benchmark runs, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cierzo.bench import step


def test_a_small_run_reports_every_row_and_its_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "step.json"
    arguments = ["--running", "2", "5", "--contexts", "64", "--steps", "40", "--output-tokens", "8"]
    assert step.main([*arguments, "--json", str(target)]) == 0
    report = msgspec.json.decode(target.read_bytes())
    rows = msgspec.convert(report["results"], list[step.StepRow])
    assert [(row.running, row.context) for row in rows] == [(2, 64), (5, 64)]
    for row in rows:
        assert row.step_ms.count == 40
        assert row.finished > 0
        assert row.output_tokens == 40 * row.running  # each step gives one token to each
    assert len(capsys.readouterr().out.splitlines()) == 4
