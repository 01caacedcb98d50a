"""Workers and tools as processes: what they answer, how they fail, that they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cierzo.bench.peers import process
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import EngineFailed
from cierzo.bench.peers.process import Worker, run_tool

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PYTHON = ["env", f"PYTHONPATH={SUPPORT}", sys.executable]
DECODE = Cell(name="decode-2", kind="decode", unit="tok/s", batch=2, prompt_tokens=8, new_tokens=5)
PREFILL = Cell(name="prefill-30", kind="prefill", unit="tok/s", prompt_tokens=30)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "worker.log"


@pytest.fixture
def worker(log: Path) -> Iterator[Worker]:
    started = Worker(PYTHON, "fake_backend", Path("/checkpoint"), {"seconds_a_token": 0.25}, vocab_size=40, log=log)
    yield started
    started.close()


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_measures(worker: Worker, log: Path) -> None:
    assert worker.measure(DECODE, seed=1).value == pytest.approx(2 / 0.25)
    assert worker.measure(PREFILL, seed=1).value == pytest.approx(30 / 0.25)
    warm_up, load = [2, 16, process.WARM_UP_TOKENS], [1, 16, 1]
    assert worker.ask("history") == [load, warm_up, [2, 8, 5], [1, 16, process.WARM_UP_TOKENS], [1, 30, 1]]
    assert worker.top_logprobs([[4, 5]], 1) == [[[(4, -0.5)], [(5, -0.5)]]]
    assert worker.load_s is not None
    assert worker.load_s > 0
    assert 0.003 < worker.peak_memory_gb() < 1
    assert '"seconds_a_token": 0.25' in worker.command
    assert "libraries print" in log.read_text(), "what a library prints is no answer"


def test_closing_ends_the_process(worker: Worker) -> None:
    pid = worker.ask("load", checkpoint="x", options={}) and worker._process.pid
    worker.close()
    assert _ended(pid)


def test_an_error_is_an_answer(worker: Worker) -> None:
    with pytest.raises(EngineFailed, match="no_such_method: AttributeError"):
        worker.ask("no_such_method")
    assert worker.ask("history") == [[1, 16, 1]], "it goes on"


def test_a_checkpoint_that_does_not_load(log: Path) -> None:
    with pytest.raises(EngineFailed, match="load: FileNotFoundError: no such checkpoint"):
        Worker(PYTHON, "fake_backend", Path("/missing"), {}, vocab_size=40, log=log)


def test_a_worker_that_dies_says_where_its_log_is(log: Path) -> None:
    worker = Worker(PYTHON, "fake_backend", Path("/checkpoint"), {"poison": 7}, vocab_size=40, log=log)
    with pytest.raises(EngineFailed, match=r"generate: it ended, see .*worker\.log"):
        worker.ask("generate", prompts=[[7]], new_tokens=1)
    assert _ended(worker._process.pid)


def test_tools(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, peak_gb = run_tool([sys.executable, "-c", "print('x' * 3)"], log)
    assert output == "xxx\n"
    assert 0.003 < peak_gb < 4  # Linux counts what the forking process held, here pytest after many tests
    with pytest.raises(EngineFailed, match=r"exit status 5, see .*worker\.log: .*no memory"):
        run_tool([sys.executable, "-c", "import sys; print('no memory', file=sys.stderr); sys.exit(5)"], log)
    with pytest.raises(EngineFailed, match="no end after 0 s"):
        run_tool([sys.executable, "-c", "import time; time.sleep(60)"], log, timeout_s=0.2)


def test_memory_is_summed_over_the_tree(log: Path) -> None:
    """A shell, which is small, and its child, which is not."""
    child = f"{sys.executable} -c 'print(1, flush=True); input()'; true"
    shell = process.spawn(["sh", "-c", child], log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        assert shell.stdout.readline() == b"1\n"
        own_gb = int(process._status(Path(f"/proc/{shell.pid}"), "VmHWM").split()[0]) * 1024 / 1e9
        assert process.peak_memory_gb(shell.pid) > 2 * own_gb
    finally:
        process.stop(shell)
        shell.stdin.close()
        shell.stdout.close()
