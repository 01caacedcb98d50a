"""The bytes that come from a client, cut into frames without ever keeping more than one, or work beyond a turn.

A small frame is decoded where it arrives. A large one is kept, and charged as it comes; its type and its stream are
all that the event loop reads of it. One that is over the limit, or finds no room, is passed over as it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.frames import LENGTH, LENGTH_BYTES, UNDECODABLE, too_large
from cierzo.engine.frontend.limits import ByteBudget
from cierzo.engine.frontend.tenants import DEFAULT

SMALL_FRAME_BYTES = 64 * 1024  # decoding the worst one takes the loop 2 ms
READABLE_BYTES = 2 * 1024 * 1024  # msgspec passes over the worst one, lists of lists, in 9 ms
PREFIX_BYTES = 256
ABSURD_BYTES = 1 << 30  # such a length is no frame, but the letters of another protocol
MAX_STEPS = 1024  # values that `peek` looks at: less than 1 ms


@dataclass(slots=True)
class Large:
    """A whole frame that is too long to be decoded on the event loop."""

    body: bytearray


@dataclass(slots=True)
class Skipped:
    """A frame that is not kept. `prefix`: its first bytes; `error`: why."""

    prefix: bytes
    error: CierzoError


class Envelope(msgspec.Struct):
    """The fields of a message that can be read even if the rest cannot be decoded."""

    type: str = ""
    stream: int = -1
    deadline_s: msgspec.Raw = msgspec.Raw()


_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
NUMBER_BYTES = 9  # of the longest number in MessagePack
_decode_number = msgspec.msgpack.Decoder(float).decode
_decode_int = msgspec.msgpack.Decoder(int).decode


class FrameReader:
    """Cuts what `feed` brings; `next` gives the next frame: a small one's body, Large or Skipped, or None."""

    __slots__ = ("_at", "_budget", "_data", "_frame", "_left", "_size", "_why", "max_frame_bytes", "tenant")

    def __init__(self, max_frame_bytes: int, budget: ByteBudget) -> None:
        self.max_frame_bytes = max_frame_bytes
        self.tenant = DEFAULT  # that long frames are charged to
        self._budget = budget
        self._data = b""  # what came last; read up to _at
        self._at = 0
        self._size = -1  # of the frame that is being read; -1: its length is
        self._frame = bytearray()  # what is here of the length, of the body, or of a skipped one's prefix
        self._left = 0  # bytes of the frame that are to be passed over
        self._why: CierzoError | None = None

    def feed(self, data: bytes) -> None:
        """Take bytes, to be cut by `next`."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def close(self) -> None:
        """Let go of what is kept."""
        if self._size > SMALL_FRAME_BYTES:
            self._budget.give(len(self._frame), self.tenant)
        self._data, self._at, self._size = b"", 0, -1
        self._frame.clear()

    def next(self) -> memoryview | Large | Skipped | None:
        """The next frame, None until more has come. Raises FrameTooLarge for a length that is none."""
        if not self._left and self._size < 0 and not self._frame and (whole := self._whole()) is not None:
            return whole
        while True:
            if self._left:
                if (skipped := self._skip()) is not None:
                    return skipped
            elif self._size >= 0 or self._read_length():
                frame = self._read_body()
                if frame is not None:
                    return frame
            if self._at == len(self._data):
                return None

    def _whole(self) -> memoryview | None:
        """The next frame if it is small and all of it is here, which is the rule."""
        data, start = self._data, self._at + LENGTH_BYTES
        if start > len(data):
            return None
        (size,) = LENGTH.unpack_from(data, self._at)
        end = start + size
        if end > len(data) or size > SMALL_FRAME_BYTES or size > self.max_frame_bytes:
            return None
        self._at = end
        return memoryview(data)[start:end]

    def _take(self, most: int) -> memoryview:
        piece = memoryview(self._data)[self._at : self._at + most]
        self._at += len(piece)
        return piece

    def _read_length(self) -> bool:
        self._frame += self._take(LENGTH_BYTES - len(self._frame))
        if len(self._frame) < LENGTH_BYTES:
            return False
        size = int.from_bytes(self._frame, "big")
        self._frame.clear()
        if size <= self.max_frame_bytes:
            self._size = size
            return True
        error = too_large(size, self.max_frame_bytes)
        if size > ABSURD_BYTES:
            raise error
        self._left, self._why = size, error
        return False

    def _read_body(self) -> memoryview | Large | Skipped | None:
        size = self._size
        piece = self._take(size - len(self._frame))
        if size > SMALL_FRAME_BYTES:
            try:
                self._budget.take(len(piece), self.tenant)
            except CierzoError as error:
                return self._give_up(piece, error)
        self._frame += piece
        if len(self._frame) < size:
            return None
        body, self._frame, self._size = self._frame, bytearray(), -1
        if size <= SMALL_FRAME_BYTES:
            return memoryview(body)
        self._budget.give(size, self.tenant)  # to who gets the frame, which takes it again
        return Large(body)

    def _give_up(self, piece: memoryview, error: CierzoError) -> Skipped | None:
        """There is no room for the rest of a frame."""
        self._budget.give(len(self._frame), self.tenant)
        self._left = self._size - len(self._frame) - len(piece)
        self._frame += piece[:PREFIX_BYTES]
        del self._frame[PREFIX_BYTES:]
        self._size, self._why = -1, error
        if len(self._frame) == PREFIX_BYTES or not self._left:
            return self._skipped()
        return None

    def _skip(self) -> Skipped | None:
        """Pass over what came of a frame; it is told once, as soon as its beginning is here."""
        piece = self._take(self._left)
        self._left -= len(piece)
        if self._why is None:
            return None
        self._frame += piece[: PREFIX_BYTES - len(self._frame)]
        return self._skipped() if len(self._frame) == PREFIX_BYTES or not self._left else None

    def _skipped(self) -> Skipped:
        assert self._why is not None
        skipped = Skipped(bytes(self._frame), self._why)
        self._why = None
        self._frame.clear()
        return skipped


def envelope(body: bytearray) -> Envelope:
    """Type, stream and deadline of a large message. Raises msgspec's errors for what is none."""
    found, is_all = _peek(body)
    is_named = found.stream >= 0 and found.type != ""
    is_wanted = not is_named or (found.type == "generate" and not found.deadline_s)
    if is_all or not is_wanted or len(body) > READABLE_BYTES:
        return found
    try:
        return _decode_envelope(body)
    except UNDECODABLE:
        if is_named:
            return found  # it can be told to whom it matters
        raise


def peek(body: bytes | bytearray) -> Envelope:
    """The fields of a message, as far as they are found among its first values, or in its first bytes."""
    return _peek(body)[0]


def seconds_of(value: msgspec.Raw) -> float | None:
    """A number of seconds in its wire form; None for nothing, or anything else."""
    try:
        return _decode_number(value) if value else None
    except UNDECODABLE:
        return None


def _peek(body: bytes | bytearray) -> tuple[Envelope, bool]:
    """The fields that are found; whether the whole message has been looked at."""
    found = Envelope()
    with memoryview(body) as view:
        try:
            return found, _walk(view, found)
        except (IndexError, *UNDECODABLE):
            return found, False  # the bytes end there, or are no such thing


def _walk(body: memoryview, found: Envelope) -> bool:
    """Find the fields; whether the end was reached."""
    at, inside = _span(body, 0)
    if not 0x80 <= body[0] <= 0x8F and body[0] not in (0xDE, 0xDF):
        return False
    outer, steps = inside, 0  # keys and values of the map that are still to come
    while outer:
        key_end, more = _span(body, at)
        if more or steps >= MAX_STEPS:
            return False
        key, at = _content(body[at:key_end]), key_end
        end, pending = _span(body, at)
        if key == b"type" and end <= len(body):
            found.type = _content(body[at:end]).decode()
        elif key == b"stream":
            found.stream = _decode_int(body[at:end])
        elif key == b"deadline_s":
            found.deadline_s = msgspec.Raw(bytes(body[at : min(end, at + NUMBER_BYTES)]))
        while pending:
            if (steps := steps + 1) > MAX_STEPS:
                return False
            end, more = _span(body, end)
            pending += more - 1
        at, outer, steps = end, outer - 2, steps + 1
    return True


# First byte of a MessagePack value -> bytes of the head behind it that hold a length, bytes per unit of it that the
# value has, values per unit of it that follow.
_HEADS = {
    **{0xC4 + i: (1 << i, 1, 0) for i in range(3)},  # bin
    **{0xC7 + i: (1 << i, 1, 0) for i in range(3)},  # ext, with one byte more for its type
    **{0xD9 + i: (1 << i, 1, 0) for i in range(3)},  # str
    **{0xDC + i: (2 << i, 0, 1) for i in range(2)},  # array
    **{0xDE + i: (2 << i, 0, 2) for i in range(2)},  # map
}
_FIXED = {0xCA: 4, 0xCB: 8, **{0xCC + i: 1 << i for i in range(4)}, **{0xD0 + i: 1 << i for i in range(4)}} | {
    0xD4 + i: 1 + (1 << i) for i in range(5)
}


def _content(value: memoryview) -> bytes:
    """The bytes of a string, or of bytes, in whatever form; nothing of another value."""
    first = value[0]
    if 0xA0 <= first <= 0xBF:
        return bytes(value[1:])
    return bytes(value[1 + _HEADS[first][0] :]) if first in _HEADS and _HEADS[first][1] else b""


def _span(body: memoryview, at: int) -> tuple[int, int]:
    """Where the value at `at` ends, and how many values follow inside it. Raises IndexError behind the end."""
    first = body[at]
    if first in _HEADS:
        width, num_bytes, values = _HEADS[first]
        length = int.from_bytes(body[at + 1 : at + 1 + width], "big")
        return at + 1 + width + num_bytes * length + (0xC7 <= first <= 0xC9), values * length
    if 0x80 <= first <= 0x9F:
        return at + 1, (first & 0x0F) * (2 if first < 0x90 else 1)
    if 0xA0 <= first <= 0xBF:
        return at + 1 + (first & 0x1F), 0
    return at + 1 + _FIXED.get(first, 0), 0
