"""Log-probabilities of consecutive tokens, kept as they are sent."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

import msgspec

from cierzo.engine.messages import TokenLogprobs

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[TokenLogprobs]).decode


class LogprobLog:
    """Log-probabilities of consecutive tokens, as the MessagePack in which they are sent: a fifth of the heap that
    they take as objects. `first`: the index of the token that the first entry belongs to."""

    __slots__ = ("_data", "_dropped", "_ends", "first")

    def __init__(self, first: int) -> None:
        self.first = first
        self._data = bytearray()
        self._ends = array("I")
        self._dropped = 0  # bytes that were forgotten: `_ends` counts them too

    @property
    def num_bytes(self) -> int:
        """Heap of what is kept."""
        return len(self._data) + 4 * len(self._ends)

    def add(self, entries: list[TokenLogprobs]) -> bytes:
        """Append the entries of the next tokens; a MessagePack list of them, which are fewer than 65,536."""
        data, ends = self._data, self._ends
        if len(entries) == 1:
            packed = _encode(entries)
            data += packed[1:]
            ends.append(self._dropped + len(data))
            return packed
        start = len(data)
        self.add_packed(map(_encode, entries))
        return b"\xdc" + len(entries).to_bytes(2, "big") + data[start:]

    def add_packed(self, entries: Iterable[bytes | msgspec.Raw]) -> None:
        """Append the entries of the next tokens, each packed already."""
        data, ends = self._data, self._ends
        for entry in entries:
            data += entry
            ends.append(self._dropped + len(data))

    @property
    def end(self) -> int:
        """The index of the token behind the last entry."""
        return self.first + len(self._ends)

    def whole(self) -> tuple[bytes, bytearray]:
        """All of it, as the header and the entries of a MessagePack list."""
        return b"\xdd" + len(self._ends).to_bytes(4, "big"), self._data

    def packed(self, start: int, end: int) -> msgspec.Raw:
        """A MessagePack list of the entries of tokens `start` to `end`."""
        low, high = self._place(start), self._place(end)
        return msgspec.Raw(b"\xdd" + (end - start).to_bytes(4, "big") + self._data[low:high])

    def read(self, start: int, end: int) -> list[TokenLogprobs]:
        """The entries of tokens `start` to `end`."""
        return _decode(self.packed(start, end))

    def before(self, token: int, num_bytes: int) -> int:
        """The first token whose entry, with all from there to `token`, takes at most so many bytes."""
        beyond = self._place(token) - num_bytes
        return self.first if beyond <= 0 else self.first + 1 + bisect_left(self._ends, self._dropped + beyond)

    def forget(self, until: int) -> None:
        """Drop the entries of tokens before `until`."""
        count = min(until - self.first, len(self._ends))
        if count > 0:
            place = self._place(self.first + count)
            del self._data[:place], self._ends[:count]
            self._dropped += place
            self.first += count

    def _place(self, token: int) -> int:
        """Where the entry of a token begins."""
        index = token - self.first
        return self._ends[index - 1] - self._dropped if index > 0 else 0
