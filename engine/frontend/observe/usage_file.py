"""The usage file: a line of JSON for each request, appended in one write a turn of the loop.

A killed process leaves all lines but the last whole, and the next one begins on a new line. What cannot be written
waits, up to MAX_WAITING records; those beyond are lost, and counted. Nothing here ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable

import msgspec

from cierzo.engine.errors import ConfigError
from cierzo.engine.frontend.observe.usage_record import UsageRecord

log = logging.getLogger(__name__)

KEPT_FILES = 4  # old ones
MAX_WAITING = 10_000
RETRY_S = 1.0
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO}  # at the start too, these are no fault of the setting
_encode_lines = msgspec.json.Encoder().encode_lines


def aged(path: str, age: int) -> str:
    """The name of an old file; age 0: one that was about to become the first of them."""
    return f"{path}.{age}"


class UsageFile:
    """Appends records. The file is readable by its owner alone; at `max_bytes` a new one is begun, and KEPT_FILES
    old ones are kept. num_written, num_lost: records."""

    def __init__(self, path: str, max_bytes: int, write: Callable[[int, bytes], int] = os.write) -> None:
        """Raises ConfigError if the file cannot be had, unless the disk is full."""
        self.num_written = self.num_lost = 0
        self._path = path
        self._max_bytes = max_bytes
        self._write = write
        self._fd = -1
        self._size = 0
        self._records: list[UsageRecord] = []
        self._data = b""  # encoded lines
        self._piece = b""  # of these, the ones that this file has room for; a write may have taken the beginning
        self._is_cut = False  # the file ends within a line, whose end `_piece` begins with
        self._timer: asyncio.Handle | None = None
        self._trouble = ""
        try:
            self._open()
        except OSError as error:
            if error.errno not in PASSING:
                raise ConfigError(
                    f"usage_file must be a file that can be written: {path}: {error.strerror}",
                    field="usage_file",
                    limit="a file that can be written",
                    value=path,
                ) from error
            self._failed(error)

    def why_not(self) -> str | None:
        """Tell why records are not written, if so."""
        return f"cost records cannot be written: {self._trouble}" if self._trouble else None

    def add(self, record: UsageRecord) -> None:
        """Write a record, with others of this turn of the loop."""
        if len(self._records) >= MAX_WAITING:
            self.num_lost += 1
            return
        self._records.append(record)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        """Write what waits, if that can be done."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            while self._waits:
                self._write_some()
        except OSError as error:
            num_lost = len(self._records) + (self._piece + self._data).count(b"\n")
            self.num_lost += num_lost
            log.error("%d cost records are lost: %s: %s", num_lost, self._path, error.strerror)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- inside ----------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        return bool(self._records or self._data or self._piece)

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._write_some()
        except OSError as error:
            self._failed(error)
            self._timer = loop.call_later(RETRY_S, self._flush)
            return
        if self._trouble and not self._is_cut:
            log.warning("cost records are written again; %d were lost", self.num_lost)
            self._trouble = ""
        self._timer = loop.call_soon(self._flush) if self._waits else None

    def _write_some(self) -> None:
        """Write once: all that waits, or the lines of it that the file has room for."""
        if self._fd < 0:
            self._open()
        if not self._piece:
            if not self._data:
                self._data, self._records = _encode_lines(self._records), []
            if self._size and self._size + len(self._data) > self._max_bytes:
                self._rotate()
            room = self._data.rfind(b"\n", 0, self._max_bytes - self._size) + 1
            whole = len(self._data) if len(self._data) <= self._max_bytes - self._size else room
            whole = whole or self._data.find(b"\n") + 1  # a line that is longer than a file may be
            self._piece, self._data = self._data[:whole], self._data[whole:]
        count = self._write(self._fd, self._piece)
        self._size += count
        self.num_written += self._piece.count(b"\n", 0, count)
        self._is_cut = self._piece[count - 1 : count] != b"\n" if count else self._is_cut
        self._piece = self._piece[count:]

    def _failed(self, error: OSError) -> None:
        if not self._trouble:
            log.error(
                "cost records cannot be written: %s: %s; %d wait, others are lost",
                *(self._path, error.strerror, MAX_WAITING),
            )
        self._trouble = error.strerror or str(error)
        if not self._is_cut:  # else the end of its last line belongs into this very file
            self._data, self._piece = self._piece + self._data, b""
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _open(self) -> None:
        """Open the file to append to it, on a new line."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block us
        fd = os.open(self._path, flags, 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            os.fchmod(fd, 0o600)
            self._size = status.st_size
            if self._size and os.pread(fd, 1, self._size - 1) != b"\n":
                self._size += self._write(fd, b"\n")
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _rotate(self) -> None:
        """Begin a new file."""
        self._shift()
        os.replace(self._path, aged(self._path, 0))
        os.close(self._fd)
        self._fd = -1
        self._shift()
        self._open()

    def _shift(self) -> None:
        """Make room for the file of age 0 among the old ones, if there is one: a crash may have left it."""
        if not os.path.exists(aged(self._path, 0)):
            return
        for age in range(KEPT_FILES, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(aged(self._path, age - 1), aged(self._path, age))
