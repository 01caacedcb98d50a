"""Processes that answer, raise, die and hang: the one that asks is told, and is left with nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cierzo.bench.campaign.isolation import Isolated


@contextmanager
def isolated(prepare: Callable[[], Callable[..., Any]]) -> Iterator[Isolated]:
    process = Isolated(prepare)
    try:
        yield process
    finally:
        process.end()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def has_ended(pid: int) -> bool:
    end = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def test_what_a_process_answers_and_keeps() -> None:
    kept: list[int] = []

    def add(value: int) -> tuple[int, list[int]]:
        kept.append(value)
        return os.getpid(), kept

    with isolated(lambda: add) as process:
        assert process.answer(20) is None
        pid, first = process.ask(20, 3)
        assert process.ask(20, 4) == (pid, [3, 4])
        assert first == [3]
    assert pid != os.getpid()
    assert kept == []


def test_a_process_that_dies_is_told_at_once_though_a_child_of_it_lives() -> None:
    def die() -> None:
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(7)

    with isolated(lambda: die) as process:
        process.answer(20)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="exit status 7"):
            process.ask(60)
        assert time.monotonic() - began < 20


def test_what_is_raised_there_is_told_and_the_process_lives_on() -> None:
    def half(value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value // 2

    with isolated(lambda: half) as process:
        process.answer(20)
        with pytest.raises(RuntimeError, match=r"^ValueError: 3 is odd$"):
            process.ask(20, 3)
        assert process.ask(20, 4) == 2


def test_a_process_that_does_not_get_ready_says_why() -> None:
    def prepare() -> Callable[..., Any]:
        raise OSError("no device")

    with isolated(prepare) as process, pytest.raises(RuntimeError, match="OSError: no device"):
        process.answer(20)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_is_told_with_its_signal(how: signal.Signals) -> None:
    with isolated(lambda: lambda: os.kill(os.getpid(), how)) as process:
        process.answer(20)
        with pytest.raises(RuntimeError, match=f"died with exit status -{int(how)}"):
            process.ask(20)
        with pytest.raises((RuntimeError, OSError)):
            process.ask(20)


def test_who_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    def hang(folder: str) -> None:
        with subprocess.Popen(["sleep", "3600"]) as other:
            Path(folder, "other").write_text(str(other.pid))
            Path(folder, "own").write_text(str(os.getpid()))

    with isolated(lambda: hang) as process:
        process.answer(20)
        with pytest.raises(TimeoutError, match="hung: no answer within 2 s"):
            process.ask(2.0, str(tmp_path))
    assert has_ended(int((tmp_path / "own").read_text()))
    assert has_ended(int((tmp_path / "other").read_text()))


def test_a_process_dies_with_the_one_that_it_works_for(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\nfrom pathlib import Path\nfrom cierzo.bench.campaign.isolation import Isolated\n"
        "process = Isolated(lambda: lambda: time.sleep(3600))\nprocess.answer(20)\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(process._process.pid))\n"
        "process._here.send(())\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert has_ended(int((tmp_path / "pid").read_text()))
