"""Format of a flight record: what a core did of late, as it wrote it down, and as it is kept when it is gone.

A record is a head of 12 bytes (length of the body, the length's complement, CRC-32 of the body: big-endian uint32
each) and a body of MessagePack. A segment is a Header, an Open for each request in flight, then commands and steps
in order; its file begins with the number of bytes that are written, 8 bytes in native order. A kept file is a Kept
and the records of one or two segments. Each record carries the readings of the clock made since the one before.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.errors import refusal
from cierzo.engine.messages import FinishReason, SamplingParams, ThinkingBudget, Vocabulary

FORMAT = 3
SIZE_BYTES = 8
DIGEST_BYTES = 8  # of a piece of a sequence
STEP_TAG = "s"
_HEAD = struct.Struct(">III")
_ALL_ONES = 0xFFFFFFFF


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Base of all records."""

    readings: list[float] = []


class Kept(Record, frozen=True, tag="k"):
    """First record of a file that the front end keeps: why, what the core died of, and when, by the calendar."""

    reason: str
    message: str
    at: str
    format: int = FORMAT


class Header(Record, frozen=True, tag="h"):
    """First record of a segment. `number` counts the segments of a core's life from 0; `config`: its EngineConfig
    in MessagePack."""

    number: int
    config: bytes
    with_prompts: bool
    format: int = FORMAT


class Known(Record, frozen=True, tag="v"):
    """The vocabulary that grammars are about, before the first record of a segment that has one."""

    vocabulary: Vocabulary


class Open(Record, frozen=True, tag="o"):
    """A request in flight when a segment began: its lengths, its progress, and its tokens if they are recorded.

    pieces: where they are not, a digest of each piece of prompt and output, as blocks of the KV cache cut them.
    Their key was of the core process alone: they tell which pieces are equal, and nothing else. Empty: there was no
    room. banned: the sequences that the output may not hold, if tokens are recorded; banned_digest: else. salt: of
    the prefix cache; a digest of it where tokens are not recorded. num_scored: log-probabilities of the prompt that
    were delivered. grammar: if tokens are recorded; is_held: its matcher is not made yet, see Released. images: of
    each its offset in the prompt, rows, columns, and a digest by that key; pixels are never recorded.
    """

    request_id: int
    sample: int
    num_prompt: int
    num_tokens: int
    num_computed: int
    sampling: SamplingParams
    priority: int
    arrival_s: float
    deadline_at_s: float | None
    tokens: list[int] | None
    pieces: bytes
    thinking: ThinkingBudget | None = None
    banned: list[list[int]] = []
    banned_digest: bytes = b""
    tenant: str = ""
    weight: float = 1.0
    salt: bytes = b""
    num_scored: int = 0
    grammar: str = ""
    is_held: bool = False
    images: list[tuple[int, int, int, bytes]] = []


class Released(Record, frozen=True, tag="r"):
    """The matchers of a request's grammar are made: from now on its samples queue."""

    request_id: int


class Submitted(Record, frozen=True, tag="c"):
    """A Submit: lengths, and tokens if they are recorded; pieces and banned_digest: as of an Open, if they are
    not."""

    request_id: int
    num_prompt: int
    num_output: int
    sampling: SamplingParams
    priority: int
    arrival_s: float | None
    deadline_at_s: float | None
    first_sample: int
    tokens: list[int] | None
    pieces: bytes
    thinking: ThinkingBudget | None = None
    banned: list[list[int]] = []
    banned_digest: bytes = b""
    tenant: str = ""
    weight: float = 1.0
    salt: bytes = b""
    num_scored: int = 0
    grammar: str = ""
    is_held: bool = False
    images: list[tuple[int, int, int, bytes]] = []


class Aborted(Record, frozen=True, tag="a"):
    """An Abort."""

    request_id: int
    sample: int | None
    reason: FinishReason


class Step(Record, frozen=True, tag=STEP_TAG):
    """A step's plan, written before it is launched.

    rows: (request id, sample, position of the first token, number of tokens); None where all that is new is a token
    for each of as many sequences as in the step before.
    """

    step: int
    num_seqs: int
    num_tokens: int
    rows: list[tuple[int, int, int, int]] | None


class Tokens(Record, frozen=True, tag="t"):
    """Tokens that steps chose, if tokens are recorded: (request id, sample, token ids)."""

    tokens: list[tuple[int, int, list[int]]]


class Ended(Record, frozen=True, tag="e"):
    """A sequence has ended."""

    request_id: int
    sample: int
    reason: FinishReason
    output_tokens: int
    message: str


class Failed(Record, frozen=True, tag="f"):
    """The core cannot go on, and says why."""

    message: str


AnyRecord = Kept | Header | Known | Open | Submitted | Released | Aborted | Step | Tokens | Ended | Failed
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyRecord).decode


def segment_paths(folder: str, pid: int) -> tuple[str, str]:
    """The two files that a core process writes in turns."""
    first, second = (os.path.join(folder, f"live-{pid}.{number}") for number in range(2))
    return first, second


def segments(folder: str, pid: int) -> list[bytes]:
    """Records that a core process has written, by segment, the older one first. Raises OSError, ValueError."""
    found = []
    for path in segment_paths(folder, pid):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            size = int.from_bytes(file.read(SIZE_BYTES), sys.byteorder)
            data = file.read(min(size, os.fstat(file.fileno()).st_size))
            if not data:  # it had just been made
                continue
            length, _, _ = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))
            header = _decode(data[_HEAD.size : _HEAD.size + length])
            if isinstance(header, Header):
                found.append((header.number, data))
    return [data for _, data in sorted(found)]


def packed(record: Record | tuple[Any, ...]) -> bytes:
    """A record, or its tag and fields, as it stands in the file."""
    body = _encode(record)
    return _HEAD.pack(len(body), len(body) ^ _ALL_ONES, zlib.crc32(body)) + body


def read(path: str | Path) -> list[AnyRecord]:
    """All records of a kept file. Raises ConfigError for what is none or is damaged, OSError if unreadable."""
    data, at = memoryview(Path(path).read_bytes()), 0
    records: list[AnyRecord] = []
    while at < len(data):
        length, complement, checksum = _HEAD.unpack(bytes(data[at : at + _HEAD.size]).ljust(_HEAD.size, b"\0"))
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if length != complement ^ _ALL_ONES or zlib.crc32(body) != checksum:
            raise _damaged(path, at, records)
        try:
            records.append(_decode(body))
        except msgspec.MsgspecError:
            raise _damaged(path, at, records) from None
        if not isinstance(kept := records[0], Kept):
            raise _damaged(path, 0, [])
        if kept.format != FORMAT:
            raise refusal("file", f"a flight record of format {FORMAT}", str(path), f"it has format {kept.format}")
        at += _HEAD.size + length
    if not records:
        raise _damaged(path, 0, [])
    return records


def _damaged(path: str | Path, at: int, records: list[AnyRecord]) -> Exception:
    why = f"record {len(records)}, at byte {at:,}, is damaged" if records else "its beginning is none of one"
    return refusal("file", f"a flight record of format {FORMAT}", str(path), why)
