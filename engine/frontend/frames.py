"""Frames: a 4-byte big-endian length, then that many bytes of MessagePack. Every socket of the engine uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from struct import Struct as Layout
from typing import cast

import msgspec

from cierzo.engine.errors import FrameTooLarge
from cierzo.engine.messages import Delta, Deltas

Buffer = bytes | bytearray | memoryview
BATCH_DELTAS = 256  # in one frame, at most
LENGTH = Layout(">I")
LENGTH_BYTES = LENGTH.size
_NO_LENGTH = bytes(LENGTH_BYTES)
# Errors of bytes that are no message. The second: text is not UTF-8; the third: maps within maps within maps.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encode_into = msgspec.msgpack.Encoder().encode_into


def pack(messages: Iterable[msgspec.Struct]) -> bytearray:
    """The frames of `messages`, one after the other, ready for one write."""
    frames = bytearray()
    for message in messages:
        start = len(frames)
        frames += _NO_LENGTH
        _encode_into(message, frames, start + LENGTH_BYTES)
        LENGTH.pack_into(frames, start, len(frames) - start - LENGTH_BYTES)
    return frames


def in_batches(messages: Iterable[msgspec.Struct]) -> Iterator[msgspec.Struct]:
    """The messages, but deltas that follow each other together: one frame costs both sides less than many."""
    for kind, run in groupby(messages, type):
        if kind is Delta:
            deltas = cast(Iterator[Delta], run)
            while batch := [*islice(deltas, BATCH_DELTAS)]:
                yield Deltas(deltas=batch) if len(batch) > 1 else batch[0]
        else:
            yield from run


def too_large(size: int, limit: int) -> FrameTooLarge:
    """The error for a frame of `size` bytes."""
    return FrameTooLarge(
        f"a frame of {size} bytes exceeds the limit of {limit}", field="frame", limit=limit, value=size
    )


class FrameSplitter:
    """Cuts the byte stream of one connection into frame bodies; keeps at most one unfinished frame."""

    __slots__ = ("_needed", "_rest", "max_frame_bytes")

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Yield the bodies completed by `data`; raises FrameTooLarge at a length above the limit."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        view, start, end = memoryview(data), 0, len(data)
        self._needed = LENGTH_BYTES
        while end - start >= LENGTH_BYTES:
            (size,) = LENGTH.unpack_from(data, start)
            if size > self.max_frame_bytes:
                raise too_large(size, self.max_frame_bytes)
            body = start + LENGTH_BYTES
            if body + size > end:
                self._needed = LENGTH_BYTES + size
                break
            yield view[body : body + size]
            start = body + size
        self._rest += view[start:]
