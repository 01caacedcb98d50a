"""Work in a process of its own: what crashes, hangs or loses its device there takes nothing else with it.

The process is forked, so that it has all that this one has imported and need not be told what to do; this one must
not have touched a GPU itself, whose driver does not survive a fork. It dies with this one, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG, linux/prctl.h
ERROR_LETTERS = 2000
POLL_S = 0.5  # between looks at whether a process that does not answer still lives
END_S = 5.0  # to wait for a killed process: one that hangs in a driver may take longer, and is left behind


class Isolated:
    """A forked process that answers questions, one at a time.

    prepare: called there at once; what it returns answers. `answer` tells whether that went well.
    """

    def __init__(self, prepare: Callable[[], Callable[..., Any]]) -> None:
        self._here, there = get_context("fork").Pipe()
        self._process = get_context("fork").Process(target=_serve, args=(prepare, there, os.getpid()))
        self._process.start()
        there.close()

    def ask(self, limit_s: float, *question: Any) -> Any:
        """The answer to a question; else as `answer`."""
        with suppress(OSError):  # it has died: `answer` says how
            self._here.send(question)
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> Any:
        """The result. Raises RuntimeError with the words of what was raised there, and, with the process at
        its end, where it died, or TimeoutError where it did not answer within `limit_s`."""
        until = time.monotonic() + limit_s
        while not self._here.poll(max(0.0, min(POLL_S, until - time.monotonic()))):
            # Its own children may hold the pipe open when it is dead.
            if self._process.exitcode is not None and not self._here.poll():
                break
            if time.monotonic() >= until:
                self.end()
                raise TimeoutError(f"hung: no answer within {limit_s:g} s")
        try:
            if not self._here.poll():
                raise EOFError
            error, result = self._here.recv()
        except (EOFError, OSError):
            self._process.join(END_S)
            status = self._process.exitcode
            self.end()
            raise RuntimeError(f"its process died with exit status {status}") from None
        if error:
            raise RuntimeError(error)
        return result

    def end(self) -> None:
        """Kill the process, and what it has started."""
        with suppress(OSError):  # ended already, or not yet the first of its group
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join(END_S)
        self._here.close()


def die_with(parent: int) -> None:
    """From now on this process is killed when its parent, the process of this number, dies."""
    ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(prepare: Callable[[], Callable[..., Any]], there: Connection, parent: int) -> None:
    os.setsid()
    die_with(parent)
    answer: Callable[..., Any] = prepare
    question: tuple[Any, ...] = ()
    while True:
        error, result = "", None
        try:
            result = answer(*question)
            if answer is prepare:
                answer, result = result, None
        except Exception as raised:  # whatever it is, the other process goes on
            error = f"{type(raised).__name__}: {raised}"[:ERROR_LETTERS]
        there.send((error, result))
        try:
            question = there.recv()
        except EOFError:
            return
