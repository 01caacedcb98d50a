"""`LLM` where a program has several threads or processes: calls run one after the other, or are refused by name."""

from __future__ import annotations

import contextlib
import copy
import itertools
import linecache
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from cierzo.engine import LLM, SamplingParams
from cierzo.engine.weights.make import make_checkpoint

PARAMS = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
PROMPTS = [[1, 2, 3]] * 8
JOIN_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("llm") / "fake", like="small3"))


@pytest.fixture
def llm(folder: str) -> LLM:
    return LLM(folder, runner="fake", dtype="float32", threads=1, max_model_len=128, kv_cache_gib=0.02)


class Gate:
    """Holds a step of the core until it is opened, and tells when one has come."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.opened = threading.Event(), threading.Event()
        plain = llm._core.step

        def step() -> list[Any]:
            self.came.set()
            assert self.opened.wait(JOIN_S)
            return plain()

        monkeypatch.setattr(llm._core, "step", step)


@contextlib.contextmanager
def running(*calls: Callable[[], object]) -> Iterator[list[object]]:
    """Each call in a thread of its own; their results or errors, once they have ended with the block."""
    ends: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            ends[number] = calls[number]()
        except BaseException as error:
            ends[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    yield ends
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive()


def tokens(llm: LLM) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


def test_calls_of_several_threads_run_one_after_the_other(llm: LLM) -> None:
    expected = tokens(llm)
    with running(*[lambda: tokens(llm)] * 4, llm.expert_statistics) as ends:
        pass
    assert ends == [expected] * 4 + [None]
    llm._core.check()
    assert not llm._core.has_work()


def test_a_turn_that_another_thread_has_just_taken_is_waited_for(llm: LLM) -> None:
    """Before that thread could say that the turn is its own."""
    expected = tokens(llm)
    assert llm._lock.acquire(blocking=False)
    threading.Timer(0.1, llm._lock.release).start()
    assert tokens(llm) == expected


def test_closing_waits_for_the_call_that_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm)
    gate = Gate(llm, monkeypatch)
    with running(lambda: tokens(llm)) as first:
        assert gate.came.wait(JOIN_S)
        with running(llm.close) as closing:
            time.sleep(0.05)
            assert llm._core is not None
            gate.opened.set()
    assert (first, closing, llm._core) == ([expected], [None], None)
    for call in (lambda: tokens(llm), lambda: llm.generate([]), llm.expert_statistics):
        with pytest.raises(RuntimeError, match="this LLM is closed"):
            call()
    llm.close()


def test_a_call_from_within_a_call_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, inner = llm._core.step, []

    def step() -> list[Any]:
        for call in (lambda: llm.generate([1]), llm.expert_statistics, llm.close):
            with pytest.raises(RuntimeError, match="runs in this thread already"):
                call()
            inner.append(call)
        return plain()

    expected = tokens(llm)
    monkeypatch.setattr(llm._core, "step", step)
    assert tokens(llm) == expected
    assert inner


def test_a_generator_of_prompts_may_ask_the_same_llm(llm: LLM) -> None:
    """It is read before the call takes its turn."""

    def prompts() -> Iterator[list[int]]:
        for prompt in PROMPTS:
            yield llm.generate(prompt, PARAMS)[0].prompt_token_ids

    assert [output.token_ids for output in llm.generate(prompts(), PARAMS)] == tokens(llm)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a foreground job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_the_turn_to_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that computes is interrupted, then one that waits for its turn."""
    expected = tokens(llm)
    gate = Gate(llm, monkeypatch)
    with running(lambda: tokens(llm)) as ends:
        assert gate.came.wait(JOIN_S)
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            tokens(llm)
        gate.opened.set()
    assert ends == [expected]
    monkeypatch.undo()

    def interrupted() -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens(llm)
    monkeypatch.undo()
    with running(lambda: tokens(llm)) as ends:
        pass
    assert ends == [expected] == [tokens(llm)]


def test_an_interrupt_at_any_line_leaves_the_turn_to_others(llm: LLM) -> None:
    expected = tokens(llm)
    for lines in itertools.count():
        with contextlib.suppress(KeyboardInterrupt), interruption_after(lines) as interrupted:
            llm.generate([[1], [2]], PARAMS, max_tokens=2)
        assert not llm._lock.locked()
        if not interrupted:
            break
    assert lines > 100
    with running(lambda: tokens(llm)) as ends:
        pass
    assert ends == [expected] == [tokens(llm)]


@contextlib.contextmanager
def interruption_after(lines: int) -> Iterator[list[bool]]:
    """Raise KeyboardInterrupt before some line of llm.py, if so many are run; then the list is not empty."""
    left, interrupted = lines, []

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if not frame.f_code.co_filename.endswith("/engine/llm.py"):
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        left -= event == "line" and line not in ("with self._lock:", "try:")  # there Python looks for no signals
        if left < 0:
            sys.settrace(None)
            interrupted.append(True)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield interrupted
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_is_refused_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """Also where the lock was held when the process forked, by a thread that the child does not have."""
    expected = tokens(llm)
    gate = Gate(llm, monkeypatch)
    with running(*([lambda: tokens(llm)] if busy else [])) as ends:
        assert not busy or gate.came.wait(JOIN_S)
        child = os.fork()
        if child == 0:
            os._exit(status_in_child(llm))
        try:
            deadline = time.monotonic() + JOIN_S
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                assert time.monotonic() < deadline, "the child hangs"
                time.sleep(0.01)
        finally:
            gate.opened.set()
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert ends == [expected] * busy
    assert tokens(llm) == expected


def status_in_child(llm: LLM) -> int:
    """0 if every call is refused by name."""
    calls = (lambda: llm.generate([1]), lambda: llm.chat([]), lambda: llm.generate([]), llm.expert_statistics)
    for number, call in enumerate(calls, 1):
        try:
            call()
            return number
        except RuntimeError as error:
            if f"process {os.getpid()}, a fork of it" not in str(error):
                return number
        except BaseException:
            return number
    llm.close()
    return 0


@pytest.mark.parametrize("leave", [copy.copy, copy.deepcopy, pickle.dumps, lambda llm: pickle.dumps({"a": [llm]})])
def test_it_is_neither_copied_nor_pickled(llm: LLM, leave: Callable[[LLM], object]) -> None:
    with pytest.raises(TypeError, match="LLM objects cannot be pickled or copied: make one in each process"):
        leave(llm)
