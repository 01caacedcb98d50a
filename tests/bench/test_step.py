"""The step benchmark runs, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cierzo.bench import grammars, step
from cierzo.bench.stats import Summary
from cierzo.cli import main
from cierzo.engine.weights.make import make_checkpoint


def ended(settings: step.StepSettings, running: int, context: int) -> int:
    """Requests that end within the timed steps: each of the running ones makes a token a step, and makes room."""
    lengths = (request.sampling.max_tokens or 0 for request in step._requests(settings, running, context))
    next(lengths)  # it brings the prefix into the cache
    left = [next(lengths) for _ in range(running)]
    count = 0
    for number in range(step.WARM_UP_STEPS + settings.steps):
        left = [tokens - 1 for tokens in left]
        count += left.count(0) * (number >= step.WARM_UP_STEPS)
        left = [tokens or next(lengths) for tokens in left]
    return count


def test_a_small_run_reports_every_row_and_its_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "step.json"
    arguments = ["--running", "2", "5", "--contexts", "64", "--steps", "40", "--output-tokens", "8"]
    assert main(["bench", "step", *arguments, "--json", str(target)]) == 0
    report = msgspec.json.decode(target.read_bytes())
    rows = msgspec.convert(report["results"], list[step.StepRow])
    assert [(row.running, row.context) for row in rows] == [(2, 64), (5, 64)]
    settings = msgspec.convert(report["settings"], step.StepSettings)
    for row in rows:
        assert row.step_ms.count == 40
        assert row.finished == ended(settings, row.running, row.context)
        assert row.output_tokens == 40 * row.running  # each step gives one token to each
    assert capsys.readouterr().out == step.table(rows) + "\n"


def test_the_shortest_context_has_steps_that_compute(tmp_path: Path) -> None:
    target = tmp_path / "step.json"
    assert main(["bench", "step", "--running", "2", "--contexts", "2", "--steps", "5", "--json", str(target)]) == 0
    (row,) = msgspec.convert(msgspec.json.decode(target.read_bytes())["results"], list[step.StepRow])
    assert row.output_tokens == 5 * row.running


def test_the_table() -> None:
    times, submits = (Summary(1, 0.0, p50, 0.0, p99, 0.0) for p50, p99 in ((0.25, 1.5), (0.125, 10.0)))
    row = step.StepRow(running=64, context=1024, step_ms=times, submit_ms=submits, finished=3, output_tokens=64_000)
    assert step.table([row]).splitlines() == [
        "running  context  step ms p50  step ms p99  submit ms p50  submit ms p99",
        "64          1024        0.250        1.500          0.125         10.000",
    ]


def test_the_cost_of_grammars_is_told_for_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "ROUNDS", 2)
    monkeypatch.setattr(grammars, "STEPS", 4)
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    target = tmp_path / "grammars.json"
    arguments = ["--grammars", str(checkpoint), "--sequences", "5", "--temperature", "1", "--json", str(target)]
    assert main(["bench", "step", *arguments]) == 0
    cost = msgspec.convert(msgspec.json.decode(target.read_bytes())["results"], grammars.GrammarCost)
    assert [(row.sequences, row.with_grammar) for row in cost.rows] == [(5, 0), (5, 5), (5, 3)]
    assert cost.rows[0].ratio == 1.0
    assert cost.same_tokens
    assert "had the same tokens in all of them" in capsys.readouterr().out
