"""Lines of the log: an object each, nothing in them that a request said, and nobody waits for them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import msgspec
import pytest

from cierzo.engine import log_lines
from cierzo.engine.log_lines import (
    BY_STRANGERS,
    LINES_BY_STRANGERS,
    MAX_LINES,
    JsonLines,
    LineQueue,
    Sparing,
    TextLines,
    plain_lines,
    queued_lines,
)

log = logging.getLogger("tests.log_lines")


@pytest.fixture(autouse=True)
def root():
    """Leave the root logger as it was."""
    logger = logging.getLogger()
    level, handlers, formatters = logger.level, [*logger.handlers], [each.formatter for each in logger.handlers]
    yield logger
    logging.captureWarnings(False)
    logger.setLevel(level)
    logger.handlers = handlers
    for handler, formatter in zip(handlers, formatters, strict=True):
        handler.setFormatter(formatter)


def record(message, *arguments, exc_info=None, **extra):
    made = logging.LogRecord("some.logger", logging.WARNING, "file", 1, message, arguments, exc_info)
    made.__dict__.update(extra)
    return made


def test_a_line_is_an_object():
    line = JsonLines().format(record("%d of\n%s", 3, "x", told={"tenant": "a", "peer": None}))
    assert "\n" not in line
    told = msgspec.json.decode(line)
    assert datetime.fromisoformat(told.pop("time")).tzinfo is not None
    assert told == {
        "level": "WARNING",
        "logger": "some.logger",
        "message": "3 of\nx",
        "tenant": "a",
        "peer": None,
    }


def test_strangers_fill_no_disk():
    now = 100.0
    lines = Sparing(lambda: now)
    stranger = record("%s came", "x", **BY_STRANGERS)
    assert [lines.filter(stranger) for _ in range(LINES_BY_STRANGERS + 7)] == [True] * LINES_BY_STRANGERS + [
        False
    ] * 7
    elsewhere = record("%s came", "x", **BY_STRANGERS)
    elsewhere.lineno = 2
    assert lines.filter(elsewhere)
    assert all(lines.filter(record("our own")) for _ in range(2 * LINES_BY_STRANGERS))
    now += 1.0
    later = record("%s came", "x", **BY_STRANGERS)
    assert lines.filter(later)
    assert later.getMessage() == "x came (and 7 others before)"
    now += 1.0
    quiet = record("%s came", "x", **BY_STRANGERS)
    assert lines.filter(quiet)
    assert quiet.getMessage() == "x came"


def test_lines_of_strangers_are_spared_where_a_server_logs(root, capfd):
    with queued_lines("text"):
        for _ in range(3 * LINES_BY_STRANGERS):
            log.warning("a stranger", extra=BY_STRANGERS)
    assert LINES_BY_STRANGERS <= capfd.readouterr().err.count("a stranger") <= 2 * LINES_BY_STRANGERS


def test_a_name_that_is_no_text_is_spelled():
    assert msgspec.json.decode(JsonLines().format(record("caf\udce9")))["message"] == "caf\\udce9"


@pytest.mark.parametrize("formatter", [TextLines, JsonLines])
def test_a_trace_has_no_words_of_the_exception(formatter):
    def fails():
        try:
            {}["secret"]
        except KeyError as error:
            raise ValueError("a secret") from error

    try:
        fails()
    except ValueError:
        line = formatter().format(record("it failed", exc_info=sys.exc_info()))
    assert "ValueError" in line
    assert "KeyError" in line
    assert "in fails" in line
    assert "'secret'" not in line.replace('{}["secret"]', "").replace('{}[\\"secret\\"]', "")
    assert "ValueError: a secret" not in line


def test_a_queue_that_nobody_takes_from_loses_lines_and_counts_them(root):
    lines = LineQueue(TextLines())
    root.handlers = [lines]
    root.setLevel(logging.INFO)
    for number in range(MAX_LINES + 7):
        log.info("%d", number)
    assert lines.lost() == 7


def test_lines_are_written_in_order_and_all_of_them(root, capsys):
    root.handlers = []
    with queued_lines("json") as lines:
        for number in range(500):
            log.info("%d", number)
    told = [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]
    assert [each["message"] for each in told] == [str(number) for number in range(500)]
    assert lines.lost() == 0
    assert root.handlers == []


def test_a_reader_who_is_stuck_holds_up_neither_the_log_nor_its_end(root, monkeypatch):
    class Stuck:
        def __init__(self):
            self.freed = threading.Event()

        def write(self, text):
            self.freed.wait()

        def flush(self):
            """Nothing is kept."""

    stuck = Stuck()
    monkeypatch.setattr(log_lines, "CLOSE_S", 0.05)
    monkeypatch.setattr(sys, "stderr", stuck)
    root.handlers = []
    began = time.monotonic()
    with queued_lines("text") as lines:
        for number in range(MAX_LINES + 100):
            log.info("%d", number)
        assert lines.lost() in (99, 100)  # one is in the writer's hands
    assert time.monotonic() - began < 20.0
    stuck.freed.set()


def test_a_process_learns_later_how_lines_are_written(root, capsys):
    root.handlers = []
    plain_lines("text")
    log.warning("before")
    log.info("too small")
    plain_lines("json")
    log.warning("after")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING tests.log_lines: before")
    assert msgspec.json.decode(second)["message"] == "after"


def test_warnings_of_libraries_are_lines_too():
    code = "from cierzo.engine.log_lines import plain_lines; plain_lines('json')"
    code += "; import warnings; warnings.warn('old')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "old" in msgspec.json.decode(done.stderr)["message"]


def test_the_end_of_a_process_waits_for_no_reader(tmp_path):
    """Standard error is a pipe that is full, and that nobody reads."""
    code = (
        "import logging; from cierzo.engine.log_lines import queued_lines\n"
        "with queued_lines('text'):\n"
        "    for number in range(5000): logging.info('x' * 200)\n"
        "print('ended')"
    )
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=writing, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ended\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finally:
        os.close(reading)
        os.close(writing)
