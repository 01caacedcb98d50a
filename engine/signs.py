"""Signs of life of a core process: a page of memory that it writes and the front end reads, without locks.

::

    byte   0         8        16        24
           +---------+---------+---------+-------------+
           | beats   | turns   | begun_s | predicted_s |    uint64, uint64, float64, float64, native order
           +---------+---------+---------+-------------+

beats: counted up by a thread that does nothing else; 0 for a core that gives no signs. turns: that the core's loop
has ended. begun_s: when the one under way began, by the machine's monotonic clock; 0 while the loop waits for work.
predicted_s: how long its step is thought to take; 0 where that is not known.

Every field is written by one thread, whole: it is eight aligned bytes. The page is a file in the private folder of
the socket; both sides map it before that folder goes.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cierzo.engine.server_process import private

NAME = "signs"  # of the file, beside the socket
PAGE_BYTES = 4096
BEAT_S = 0.25
_BEATS, _TURNS, _BEGUN, _PREDICTED = range(4)  # 8-byte words


class Signs(NamedTuple):
    """A look at a page."""

    beats: int
    turns: int
    begun_s: float
    predicted_s: float


class SignsPage:
    """A mapped page: the front end makes one and reads it, the core opens it and writes."""

    def __init__(self, memory: mmap.mmap, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._counts = memoryview(memory).cast("Q")
        self._times = memoryview(memory).cast("d")
        self._clock = clock
        self._num_turns = 0

    @classmethod
    def create(cls, folder: str) -> SignsPage:
        """Make the page in a folder. Raises OSError."""
        with open(os.path.join(folder, NAME), "x+b", buffering=0, opener=private) as file:
            file.write(bytes(PAGE_BYTES))
            return cls(mmap.mmap(file.fileno(), PAGE_BYTES))

    @classmethod
    def beside(cls, socket_path: str) -> SignsPage:
        """Open the page beside a socket; where there is none, as for a core started by hand, nobody reads it."""
        try:
            with open(os.path.join(os.path.dirname(socket_path), NAME), "r+b", buffering=0) as file:
                return cls(mmap.mmap(file.fileno(), PAGE_BYTES))
        except FileNotFoundError:
            return cls.unread()

    @classmethod
    def unread(cls) -> SignsPage:
        """Make a page that only this process has."""
        return cls(mmap.mmap(-1, PAGE_BYTES))

    def close(self) -> None:
        """Give up the mapping, which holds a descriptor of the file."""
        self._counts.release()
        self._times.release()
        self._memory.close()

    def read(self) -> Signs:
        """Look at what the core says now."""
        counts, times = self._counts, self._times
        while True:
            begun_s = times[_BEGUN]
            signs = Signs(counts[_BEATS], counts[_TURNS], begun_s, times[_PREDICTED])
            if times[_BEGUN] == begun_s:  # else another turn has begun meanwhile
                return signs

    # --- written by the loop ---------------------------------------------------------------------------

    def begin(self) -> None:
        """A turn begins; what it will take is not known yet."""
        times = self._times
        times[_PREDICTED] = 0.0
        times[_BEGUN] = self._clock()

    def predict(self, predicted_s: float) -> None:
        """Say how long the step under way is thought to take; 0: not known."""
        self._times[_PREDICTED] = predicted_s

    def begin_step(self, step: int) -> None:
        """A step of a known number begins, where turns are not counted otherwise."""
        self._counts[_TURNS] = step
        self.begin()

    def end(self) -> None:
        """The turn has ended."""
        self._num_turns += 1
        self._counts[_TURNS] = self._num_turns
        self._times[_BEGUN] = 0.0

    # --- written by a thread ---------------------------------------------------------------------------

    def beat(self) -> None:
        """Show that the process runs and its interpreter is free."""
        self._counts[_BEATS] += 1

    def start_beating(self) -> None:
        """Beat for as long as the process lives, from a thread of its own."""
        self.beat()
        threading.Thread(target=self._beat_on, name="signs-of-life", daemon=True).start()

    def _beat_on(self) -> None:
        pause = threading.Event()  # never set
        while not pause.wait(BEAT_S):
            self.beat()
