"""Loading shows its bytes: a bar on a terminal, a line every few seconds in a server's log."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from cierzo.engine.worker.progress import LINE_EVERY_S, loading_progress

GB = 10**9


def test_a_log_gets_a_line_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    with caplog.at_level(logging.INFO), loading_progress(lambda: now[0]) as show:
        for step in range(1, 25):
            now[0] += 1.0
            show(step * GB, 120 * GB)
    expected = [f"loading: {step}.{'00' if step < 10 else '0'} of 120.0 GB in {step} s" for step in (5, 10, 15, 20)]
    assert [record.getMessage() for record in caplog.records] == expected
    assert LINE_EVERY_S == 5.0


def test_what_is_quick_says_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), loading_progress(lambda: 0.0) as show:
        show(GB, GB)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_cores_log_has_these_lines() -> None:
    """The logger would tell warnings alone otherwise."""
    code = """
import logging, sys
from cierzo.engine.worker import __main__ as core
core.end_with_parent = lambda: None
def run(socket):
    logging.getLogger("cierzo.engine.weights").info("not this")
    core.progress.log.info("this")
    return 0
core.run = run
sys.argv = ["core", "--socket", "x"]
sys.exit(core.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.endswith("cierzo.engine.worker.progress: this\n")
    assert done.stderr.count("\n") == 1
