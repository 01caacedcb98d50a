"""Properties of every process of a server: its end together with its parent, its collections and its heap, and how
it opens files of its own."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LARGE_BYTES = 256 * 1024
GC_THRESHOLDS = (20_000, 50, 1_000)  # the last: young collections between two full ones


def private(path: str, flags: int) -> int:
    """The `opener` of a file that its owner alone may read."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, even while it is stopped. Only Linux
    can.

    A parent that is gone already is not seen here: who calls this first and then connects to the parent's socket
    finds nobody there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_memory() -> None:
    """Keep the cycle collector out of the steps, and out of the turns of the front end's loop.

    What was allocated up to now stays, so it is never looked at again. A full collection walks every known token
    of every request in the core, and every stream that is kept in the front end: up to hundreds of milliseconds.
    Both make next to no cycles: it becomes rare enough to bound what could gather, and no more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def return_large_blocks() -> None:
    """Have glibc take each large block from the system, and give it back when it is freed.

    By itself it takes them from its heap once a first one was freed, and tables of as many entries as requests are
    kept, rebuilt as they turn over, leave gaps there: the heap grows in steps. Not for a process that computes,
    whose arrays would be mapped anew in each step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
