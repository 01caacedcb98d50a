"""The two files of a batch: requests that are read, and answers that are appended and never changed.

Whatever stands whole in the file of answers stays: a run goes on where an earlier one was ended, at any point.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from io import FileIO
from typing import Any, BinaryIO, NamedTuple, Self

import msgspec

from cierzo.engine.errors import InvalidRequest, refusal
from cierzo.engine.frontend.bounds import shown
from cierzo.engine.gateway.batch import Line, Response, read_line
from cierzo.engine.gateway.errors import body_of

BEGINNING = b'{"id":"batch_req_'  # of every line that is written here
_salted = re.compile(r"batch_req_([0-9a-f]{8})-[0-9]+").fullmatch


class Record(msgspec.Struct, frozen=True):
    """An answer in the file: `response`, or `error` for a line that is no request."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Any


class _Standing(msgspec.Struct, frozen=True):
    """An answer as far as it matters to a later run."""

    id: str
    custom_id: str | None
    response: _Status | None
    error: _Fault | None


class _Status(msgspec.Struct, frozen=True):
    status_code: int


class _Fault(msgspec.Struct, frozen=True):
    line: int | None = None


class Work(NamedTuple):
    """A line of the file of requests, by number from 1: a request, or why it is none."""

    number: int
    line: Line | None
    custom_id: str | None = None
    error: InvalidRequest | None = None


class Files:
    """The two files, in a `with` block. Raises ConfigError for files that cannot be those of a batch, and for those
    of another run. They are open as "rb" and, without a buffer, as "ab+"; whoever opened them closes them.

    salt: what tells the requests of this file of answers from those of others. num_standing, num_errors: answers
    that stand in it already, and those of them that are errors.
    """

    def __init__(self, requests: BinaryIO, answers: FileIO, max_line_bytes: int) -> None:
        self.salt = os.urandom(4).hex()
        self.num_standing = self.num_errors = 0
        self._requests, self._answers, self._most = requests, answers, max_line_bytes
        for name, file in (("IN", requests), ("OUT", answers)):
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise refusal(name, "a regular file", file.name)
        if os.path.sameopenfile(requests.fileno(), answers.fileno()):
            raise refusal("OUT", "another file than IN", answers.name)
        self._lock()
        self._index = _Index()
        try:
            self._size = self._read()
        except BaseException:
            self._index.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._index.close()

    def num_lines(self) -> int:
        """Count the lines of the file of requests."""
        self._requests.seek(0)
        count, last = 0, b"\n"
        while data := self._requests.read(1 << 20):
            count, last = count + data.count(b"\n"), data
        return count + (not last.endswith(b"\n"))

    def lines(self) -> Iterator[Work | None]:
        """All lines of the file of requests in order; None for one that is blank, or answered already."""
        for number, data in _lines(self._requests, self._most):
            yield self._work(number, data)

    def _work(self, number: int, data: bytes | None) -> Work | None:
        if data is not None and not data.strip():
            return None
        try:
            if data is None:
                what = f"it is longer than {self._most} bytes"
                raise InvalidRequest(what, field="line", limit=f"{self._most} bytes")
            line = read_line(data)
            earlier = self._index.find(line.custom_id)
            if earlier:
                what = f"line {earlier} has the custom_id {shown(line.custom_id)!r} too"
                limit = "unlike those of other lines"
                raise InvalidRequest(what, field="custom_id", limit=limit, value=line.custom_id)
            self._index.add(line.custom_id, number)
            return Work(number, line) if earlier is None else None
        except InvalidRequest as error:
            if self._index.find(number) is not None:
                return None
            return Work(number, None, None if data is None else _custom_id(data), error)

    def write(self, work: Work, response: Response | None = None) -> None:
        """Append the answer to a line. An OSError leaves nothing of it."""
        told, custom_id = None, work.custom_id if work.line is None else work.line.custom_id
        if work.error is not None:
            told = body_of(work.error)["error"] | {"line": work.number}
            told["message"] = f"line {work.number}: {told['message']}"
        record = Record(f"batch_req_{self.request_id(work)}", custom_id, response, told)
        data = memoryview(msgspec.json.encode(record) + b"\n")
        try:
            left = data
            while left:
                left = left[self._answers.write(left) :]
        except BaseException:
            os.ftruncate(self._answers.fileno(), self._size)
            raise
        self._size += len(data)
        self._count(response is None or response.status_code != 200)

    def request_id(self, work: Work) -> str:
        """The name of a line's request."""
        return f"{self.salt}-{work.number}"

    def _count(self, is_error: bool) -> None:
        self.num_standing += 1
        self.num_errors += is_error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal("OUT", "a file that no other run writes", self._answers.name) from None

    def _read(self) -> int:
        """Note what stands in the file of answers, and cut a last line that is not whole; the size then."""
        size, path = 0, self._answers.name
        with open(self._answers.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    if not (data.startswith(BEGINNING) or BEGINNING.startswith(data)):
                        raise refusal("OUT", "a file of answers", path, f"line {number} is none")
                    os.ftruncate(file.fileno(), size)
                    break
                try:
                    self._stands(_standing.decode(data))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise refusal("OUT", "a file of answers", path, f"line {number} is none: {error}") from None
                size += len(data)
        return size

    def _stands(self, found: _Standing) -> None:
        if not self.num_standing and (salted := _salted(found.id)):
            self.salt = salted[1]
        self._count(found.response is None or found.response.status_code != 200)
        if found.error is not None and found.error.line is not None:
            self._index.add(found.error.line, 0)
        elif found.custom_id is not None:
            self._index.add(found.custom_id, 0)


_standing = msgspec.json.Decoder(_Standing)


class _Index:
    """Lines by their custom_id, and by their number those that have none, on disk as far as they are many.

    The value is the line of the file of requests where it was met, 0 for an answer alone.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)  # a file of its own, that is gone afterwards
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("CREATE TABLE met (name BLOB PRIMARY KEY, line INTEGER NOT NULL) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def close(self) -> None:
        """Forget everything."""
        self._table.close()

    def add(self, name: str | int, line: int) -> None:
        """Note where a name was met."""
        self._table.execute("INSERT OR REPLACE INTO met VALUES (?, ?)", (_short(name), line))

    def find(self, name: str | int) -> int | None:
        """Where a name was met; None if it was not."""
        row = self._table.execute("SELECT line FROM met WHERE name = ?", (_short(name),)).fetchone()
        return None if row is None else int(row[0])


def _short(name: str | int) -> bytes:
    if isinstance(name, int):
        return b"%d" % name
    return hashlib.blake2b(name.encode(), digest_size=20).digest()  # longer than any number is


class _Named(msgspec.Struct):
    custom_id: str


def _custom_id(data: bytes) -> str | None:
    """The custom_id of what may otherwise be no request."""
    try:
        return msgspec.json.decode(data, type=_Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines and their numbers from 1; None for one of more bytes than `most`."""
    file.seek(0)
    number = 0
    while data := file.readline(most + 1):
        number += 1
        if len(data) <= most or data.endswith(b"\n"):
            yield number, data
            continue
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        yield number, None
