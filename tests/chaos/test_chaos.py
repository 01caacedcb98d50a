"""Reduced forms of `make chaos` that take seconds, and what its figures are made by."""

from __future__ import annotations

import pytest

from chaos import cancels, kills, readers
from chaos.report import Report, percentile
from chaos.soak import slope_per_minute


def test_a_core_that_is_killed_loses_nothing(capsys):
    assert kills.run(count=2), capsys.readouterr().out


def test_cancels_leave_nothing(capsys):
    assert cancels.run(count=2000), capsys.readouterr().out


def test_readers_that_stall_are_cheap(capsys):
    assert readers.run(count=30, rounds=1, seconds=0.5), capsys.readouterr().out


def test_a_report_fails_with_one_figure(capsys):
    report = Report("name")
    report.at_most("a", 1.0, 2.0)
    report.at_least("b", 1.0, 2.0)
    report.need("c", [1], [1])
    assert not report.verdict()
    told = capsys.readouterr().out.splitlines()
    assert [line.endswith("FAIL") for line in told] == [False, True, False, False]
    assert told[-1] == "FAIL  name"


def test_figures():
    assert percentile([5.0, 1.0, 3.0], 99) == 5.0
    assert percentile(range(1, 101), 50) == 50
    assert slope_per_minute([(0.0, 10.0), (30.0, 15.0), (60.0, 20.0)]) == pytest.approx(10.0)
    assert slope_per_minute([(1.0, 7.0)]) == 0.0
