"""The paired form of `make bench-rpc`: turns, ratios, and another commit's tree."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cierzo.bench import rpc
from cierzo.bench.peers.process import Process
from cierzo.engine.errors import ConfigError


def turns_of(figures):
    """A turn that gives these figures, one after the other."""
    return iter(figures).__next__


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        ([(900.0, 940.0, 2.5), (880.0, 935.0, 2.0), (10.0, 10.0, 9.0)], 0),
        ([(860.0, 940.0, 2.5)] * 3, 1),
        ([(900.0, 920.0, 2.5)] * 3, 1),
    ],
)
def test_medians_are_judged(ours, status, capsys):
    theirs = [(1000.0, 1000.0, 2.0)] * 3
    assert rpc.paired([turns_of(ours), turns_of(theirs)], ("this tree", "abc"), 3, rpc.RATIOS) == status
    told = capsys.readouterr().out
    assert told.count("this tree") == told.count("abc") == 3
    assert ("BELOW" in told) == bool(status)
    assert "processors: medians of 2.50 and 2.00 s, 0.800" in told


def test_turns_alternate():
    order = []

    def turn(name):
        def run():
            order.append(name)
            return 1.0, 1.0, 1.0

        return run

    assert rpc.paired([turn("A"), turn("B")], ("this tree", "x"), 2, rpc.RATIOS) == 0
    assert order == ["A", "B", "A", "B"]


def test_processor_time_counts_children_too(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    with Process([sys.executable, "-c", parent], tmp_path / "log", stdout=subprocess.PIPE) as process:
        assert process.popen.stdout.readline() == b"\n"
        assert 0.15 < process.cpu_s() < 5


def test_a_commit_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no commit nonsense"):
        rpc.extracted("nonsense", tmp_path)


@pytest.mark.skipif(not (rpc.ROOT / ".git").exists(), reason="a copy without its history")
def test_this_tree_against_a_commit(tmp_path, monkeypatch, capsys):
    """For real, with few requests: the other tree has no compiled kernels, and needs none."""
    monkeypatch.setattr(rpc, "RATIOS", (0.0, 0.0))
    monkeypatch.setattr(sys, "argv", ["rpc", "--against", "HEAD", "--pairs", "1", "--requests", "70"])
    extracted = rpc.extracted
    monkeypatch.setattr(rpc, "extracted", lambda commit, folder: extracted(commit, tmp_path / "against"))
    assert rpc.main() == 0
    told = capsys.readouterr().out
    assert told.count("requests/s") == 3
    assert "1  this tree" in told
    assert "1  HEAD" in told


@pytest.mark.parametrize("guard", ["keys", "tls"])
def test_behind_keys_and_without(guard, monkeypatch, capsys):
    """For real, with few requests."""
    monkeypatch.setattr(rpc, "GUARDED", dict.fromkeys(rpc.GUARDED, (0.0, 0.0)))
    monkeypatch.setattr(sys, "argv", ["rpc", "--guard", guard, "--pairs", "1", "--requests", "70"])
    assert rpc.main() == 0
    told = capsys.readouterr().out
    assert f"1  {guard}" in told
    assert "1  without" in told
