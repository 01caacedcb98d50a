"""Properties of every process of a server: its log lines, and a child's end together with its parent, also while
the child is stopped or in a native call."""

from __future__ import annotations

import ctypes
import signal
import sys

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Only Linux can.

    A parent that is gone already is not seen here: who calls this first and then connects to the parent's socket
    finds nobody there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
