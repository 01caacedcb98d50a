"""Lines of the log: as text or as JSON, written by a thread of their own where a loop must not wait for them.

A trace of an exception has its frames and its type, and not its words: these may hold what a request said.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from types import TracebackType

import msgspec

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_LINES = 10_000  # that wait to be written
CLOSE_S = 2.0  # for what is left of them at the end
LINES_BY_STRANGERS = 10  # in a second, of each place in the code: who may not come in must not fill the disk
BY_STRANGERS = {"is_by_strangers": True}
ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class TextLines(logging.Formatter):
    """A line of words, and the trace of an exception below it."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatException(self, exc_info: ExcInfo) -> str:
        """Give frames and types, of causes first."""
        return "\n".join(_trace(exc_info[1]))


class JsonLines(TextLines):
    """An object a line: time, level, logger, message, `trace` of an exception, and the fields of the record's
    `told`, which those who log may give as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "told", {}),
        }
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        try:
            line = msgspec.json.encode(told)
        except UnicodeEncodeError:  # lone surrogates, of a file's name
            line = msgspec.json.encode({name: _spelled(value) for name, value in told.items()})
        return line.decode()


FORMATTERS = {"text": TextLines, "json": JsonLines}


class Sparing(logging.Filter):
    """Filter of lines that strangers can cause, which are marked by `extra=BY_STRANGERS`: of each place in the code
    it lets a few pass in a second. The next one tells how many there were besides."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since: dict[tuple[str, int], tuple[float, int]] = {}  # by place: begin of its second, and lines

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is written."""
        if not getattr(record, "is_by_strangers", False):
            return True
        place, now = (record.pathname, record.lineno), self._clock()
        since_s, count = self._since.get(place, (now, 0))
        if now - since_s >= 1.0:
            if count > LINES_BY_STRANGERS:
                record.msg = f"{record.msg} (and {count - LINES_BY_STRANGERS} others before)"
            since_s, count = now, 0
        self._since[place] = since_s, count + 1
        return count < LINES_BY_STRANGERS


class LineQueue(QueueHandler):
    """Handler that never waits: lines that nobody takes in time are lost, and counted."""

    queue: queue.Queue[logging.LogRecord]

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(queue.Queue(MAX_LINES))
        self.setFormatter(formatter)
        self.addFilter(Sparing())
        self._num_lost = 0

    def lost(self) -> int:
        """Count the lines that were lost."""
        return self._num_lost

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hand over a line, ready to be written."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._num_lost += 1


class _Writer(QueueListener):
    """Thread that writes lines. It ends as soon as they are written, or is left behind."""

    queue: queue.Queue[logging.LogRecord | None]

    def stop(self) -> None:
        """Wait for the lines that are left, CLOSE_S at most: nobody may read them any more."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self.queue.put(None, timeout=CLOSE_S)  # ends it, as `enqueue_sentinel` would if it could wait
            self._thread.join(CLOSE_S)
            self._thread = None


@contextlib.contextmanager
def queued_lines(kind: str) -> Iterator[LineQueue]:
    """Log to stderr from now on, INFO and above, without ever waiting for it. kind: "text" or "json"."""
    lines, root = LineQueue(FORMATTERS[kind]()), logging.getLogger()
    writer = _Writer(lines.queue, logging.StreamHandler(sys.stderr))
    root.addHandler(lines)
    root.setLevel(logging.INFO)
    logging.captureWarnings(kind == "json")
    writer.start()
    try:
        yield lines
    finally:
        root.removeHandler(lines)
        writer.stop()


def plain_lines(kind: str) -> None:
    """Log to stderr from now on, WARNING and above, at once; called again, it changes how."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
        root.setLevel(logging.WARNING)
    for handler in root.handlers:
        handler.setFormatter(FORMATTERS[kind]())
    logging.captureWarnings(kind == "json")


def _trace(error: BaseException | None) -> Iterator[str]:
    if error is None:
        return
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _trace(before)
        yield "followed by"
    yield "Traceback (most recent call last):"
    yield from (line.rstrip("\n") for line in traceback.format_tb(error.__traceback__))
    yield type(error).__name__


def _spelled(value: object) -> object:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
