"""The final record of whole answers, which may have any length: its frame is built and sent in pieces.

It is the frame that `pack((stream.last(...),))` would be, but for the order of keys: the long fields of a sample
come last. No step takes longer than CHUNK_TOKENS tokens do, and what is long already as bytes is not copied.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import msgspec

from cierzo.engine.frontend.answer import goes_on, pieces
from cierzo.engine.frontend.frames import LENGTH_BYTES, Buffer
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.stream import NewReader, Stream
from cierzo.engine.messages import Part, SampleEnd
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import Reader

CHUNK_TOKENS, CHUNK_PARTS = 4096, 1024  # built in a step; of an answer in parts, whose tokens are more work
PIECE_BYTES = 128 * 1024  # written in a step
ONE_PIECE_TOKENS = 4096  # answers up to so many tokens in all need no steps; with log-probabilities, fewer
ONE_PIECE_BYTES = 64 * 1024
_NO_SAMPLES = b"\xa7samples\x90"
_LIST, _TEXT = b"\xdd", b"\xdb"  # MessagePack's headers, before 4 bytes of length
_encode = msgspec.msgpack.Encoder().encode
Pieces = Generator[int, None, list[Buffer]]


def is_long(stream: Stream) -> bool:
    """Whether the last message of a stream that has ended is to be built in steps."""
    if stream.deltas or stream.error is not None:
        return False
    num_tokens = sum(len(sample.token_ids) for sample in stream.samples)
    most = ONE_PIECE_TOKENS * CHUNK_PARTS // CHUNK_TOKENS if stream.apart else ONE_PIECE_TOKENS
    return num_tokens > most or stream.num_bytes > ONE_PIECE_BYTES


def build(stream: Stream, new_reader: NewReader) -> Pieces:
    """The parts of the frame with the final record. Yields, after each step, how many tokens it was."""
    final = stream.final([])
    head, tail = _encode(final).split(_NO_SAMPLES, 1)
    ends = stream.ends()
    parts: list[Buffer] = []
    if stream.prompt is not None:
        head = bytes([head[0] + 1]) + head[1:]
        parts = [_encode("prompt_logprobs"), *stream.prompt.whole()]
    parts = [head, *parts, _NO_SAMPLES[:-1] + _LIST + _four(len(ends))]
    for sample, end in ends:
        parts += yield from _sample(sample, end, new_reader(stream, sample.index))
    parts.append(tail)
    return [_four(sum(map(len, parts))), *parts]


def cut(parts: list[Buffer]) -> Iterator[memoryview]:
    """The bytes of the parts, a piece at a time."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def _sample(sample: Sample, end: SampleEnd, reader: Reader | None) -> Pieces:
    """Build the record of a sample: `end`, and the long fields behind its own."""
    token_ids, logprobs = sample.token_ids, sample.packed_logprobs()
    tokens, text, watched = bytearray(), bytearray(), sample.watched_text
    packed = _PackedParts() if isinstance(reader, PartsReader) else None
    reader = reader if watched is None else None
    if reader is not None:
        sample.place(reader, sample.num_brought)
    step = CHUNK_TOKENS if packed is None else CHUNK_PARTS
    for start in range(0, len(token_ids), step):
        chunk = token_ids[start : start + step]
        for_text = chunk[max(0, sample.num_brought - start) :]
        tokens += _without_header(_encode(chunk.tolist()), len(chunk))
        if reader is not None:
            piece = reader.push(for_text)
            text += piece.encode()
            if packed is not None:
                packed.add(reader.parts, piece, len(for_text))
        yield len(chunk)
    if reader is not None:
        held = reader.flush()
        text += held.encode()
        if packed is not None:
            packed.add(reader.parts, held, 0)
    text = text if watched is None else watched
    long: list[tuple[str, list[Buffer]]] = [
        ("token_ids", [_LIST + _four(len(token_ids)), tokens]),
        ("text", [_TEXT + _four(len(text)), text]),
    ]
    if logprobs is not None:
        long.append(("logprobs", [*logprobs]))
    if packed is not None and (parts := packed.whole()) is not None:
        long.append(("parts", [*parts]))
    short = _encode(end)
    head: list[Buffer] = [bytes([short[0] + len(long)]) + short[1:]]
    return head + [piece for name, value in long for piece in (_encode(name), *value)]


class _PackedParts:
    """The parts of an answer as MessagePack, joined from pieces in the order in which they come."""

    def __init__(self) -> None:
        self._data = bytearray()  # of the parts before `_first`
        self._count = 0
        self._has_text_alone = True
        self._first: Part | None = None
        self._text = bytearray()
        self._num_tokens = 0

    def add(self, parts: list[Part], text: str, num_tokens: int) -> None:
        """Append pieces; without any, so many tokens of text."""
        for piece in pieces(parts, text, num_tokens):
            if self._first is None or not goes_on(self._first, piece):
                self._close()
                self._first = piece
            self._text += piece.text.encode()
            self._num_tokens += piece.num_tokens

    def whole(self) -> tuple[bytes, bytearray] | None:
        """The header and the entries of the list; None if all is text."""
        self._close()
        return None if self._has_text_alone else (_LIST + _four(self._count), self._data)

    def _close(self) -> None:
        """Pack the last part: it is complete."""
        if self._first is None:
            return
        short = _encode(msgspec.structs.replace(self._first, text="", num_tokens=self._num_tokens))
        self._data += bytes([short[0] + 1]) + short[1:] + _encode("text") + _TEXT + _four(len(self._text))
        self._data += self._text
        self._count += 1
        self._has_text_alone = self._has_text_alone and self._first.kind == "text"
        self._first, self._text, self._num_tokens = None, bytearray(), 0


def _without_header(packed: bytes, count: int) -> memoryview:
    """The entries of a packed list of at most 65,535."""
    return memoryview(packed)[1 if count < 16 else 3 :]


def _four(number: int) -> bytes:
    return number.to_bytes(LENGTH_BYTES, "big")
