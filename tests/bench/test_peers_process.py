"""Workers and tools as processes: what they answer, how they fail, that they end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cierzo.bench.peers import process
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Engine, EngineFailed
from cierzo.bench.peers.process import Process, Worker, run_tool

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PYTHON = ["env", f"PYTHONPATH={SUPPORT}", sys.executable]
DECODE = Cell(name="decode-2", kind="decode", unit="tok/s", batch=2, prompt_tokens=8, new_tokens=5)
PREFILL = Cell(name="prefill-30", kind="prefill", unit="tok/s", prompt_tokens=30)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "engine-checkpoint.log"


def _worker(folder: Path, **options: Any) -> Worker:
    engine = Engine(name="engine", peer="fake", number_format="bf16", setting="", options=options)
    (folder / "config.json").write_text('{"vocab_size": 40}')
    return Worker(engine, Checkpoint("checkpoint", folder), folder, PYTHON)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with _worker(tmp_path, seconds_a_token=0.25) as started:
        yield started


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
    assert worker.top_logprobs([[4, 5]], 1) == [[[[4, -0.5]], [[5, -0.5]]]]
    assert worker.load_s is not None
    assert worker.load_s > 0
    assert 0.003 < worker.peak_memory_gb() < 1
    assert '"seconds_a_token": 0.25' in worker.command
    assert "libraries print" in log.read_text(), "what a library prints is no answer"


def test_closing_ends_the_process(worker: Worker) -> None:
    pid = worker.popen.pid
    assert not _ended(pid)
    worker.close()
    assert _ended(pid)


def test_an_error_is_an_answer(worker: Worker) -> None:
    with pytest.raises(EngineFailed, match="no_such_method: AttributeError"):
        worker.ask("no_such_method")
    assert worker.ask("history") == [[1, 16, 1]], "it goes on"


def test_a_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "missing").mkdir()
    with pytest.raises(EngineFailed, match="load: FileNotFoundError: no such checkpoint"):
        _worker(tmp_path / "missing")
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            assert str(tmp_path).encode() not in entry.read_bytes(), "it still runs"


def test_a_worker_that_dies_says_where_its_log_is(tmp_path: Path) -> None:
    worker = _worker(tmp_path, poison=7)
    with pytest.raises(EngineFailed, match=r"generate: it ended, see .*engine-checkpoint\.log: .*"):
        worker.ask("generate", prompts=[[7]], new_tokens=1)
    assert _ended(worker.popen.pid)


def test_tools(log: Path) -> None:
    output, peak_gb = run_tool([sys.executable, "-c", "print('x' * 3)"], log)
    assert output == "xxx\n"
    assert 0.003 < peak_gb < 4  # Linux counts what the forking process held, here pytest after many tests
    with pytest.raises(EngineFailed, match=r"exit status 5, see .*checkpoint\.log: .*no memory"):
        run_tool([sys.executable, "-c", "import sys; print('no memory', file=sys.stderr); sys.exit(5)"], log)
    with pytest.raises(EngineFailed, match="no end after 0 s"):
        run_tool([sys.executable, "-c", "import time; time.sleep(60)"], log, timeout_s=0.2)


def test_memory_is_summed_over_the_tree(log: Path) -> None:
    """A shell, which is small, and its child, which is not."""
    child = f"{sys.executable} -c 'print(1, flush=True); input()'; true"
    command = ["sh", "-c", child]
    with Process(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.popen.stdin is not None
        assert shell.popen.stdout is not None
        with shell.popen.stdin, shell.popen.stdout as output:
            assert output.readline() == b"1\n"
            own_gb = process._peak_kb(shell.popen.pid) * 1024 / 1e9
            assert shell.peak_memory_gb() > 2 * own_gb
