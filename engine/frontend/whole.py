"""The final record of whole answers, which may have any length: its frame is built and sent in pieces.

It is the frame that `pack((stream.last(...),))` would be, but for the order of keys: the long fields of a sample
come last. No step takes longer than CHUNK_TOKENS tokens do, and what is long already as bytes is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import msgspec

from cierzo.engine.frontend.frames import LENGTH_BYTES, Buffer
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.messages import SampleEnd, SamplingParams
from cierzo.engine.text.detok import Detokenizer

CHUNK_TOKENS = 4096  # built in a step
PIECE_BYTES = 128 * 1024  # written in a step
ONE_PIECE_TOKENS = 4096  # answers up to so many tokens in all need no steps; with log-probabilities, fewer
ONE_PIECE_BYTES = 64 * 1024
_NO_SAMPLES = b"\xa7samples\x90"
_FIXED_MAP, _LIST, _TEXT = 0x80, b"\xdd", b"\xdb"  # MessagePack's headers; the last two before 4 bytes of length
_encode = msgspec.msgpack.Encoder().encode
Pieces = Generator[int, None, list[Buffer]]


def is_long(stream: Stream) -> bool:
    """Whether the last message of a stream that has ended is to be built in steps."""
    if stream.deltas or stream.error is not None:
        return False
    num_tokens = sum(len(sample.token_ids) for sample in stream.samples)
    return num_tokens > ONE_PIECE_TOKENS or stream.num_bytes > ONE_PIECE_BYTES


def build(stream: Stream, detokenizer: Callable[[SamplingParams], Detokenizer | None]) -> Pieces:
    """The parts of the frame with the final record. Yields, after each step, how many tokens it was."""
    final = stream.final([])
    head, tail = _encode(final).split(_NO_SAMPLES, 1)
    ends = stream.ends()
    parts: list[Buffer] = [head, _NO_SAMPLES[:-1] + _LIST + _four(len(ends))]
    for sample, end in ends:
        parts += yield from _sample(sample, end, detokenizer(stream.sampling))
    parts.append(tail)
    return [_four(sum(map(len, parts))), *parts]


def cut(parts: list[Buffer]) -> Iterator[memoryview]:
    """The bytes of the parts, a piece at a time."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def _sample(sample: Sample, end: SampleEnd, detokenizer: Detokenizer | None) -> Pieces:
    """Build the record of a sample: `end`, and the long fields behind its own."""
    token_ids, logprobs = sample.token_ids, sample.packed_logprobs()
    tokens, text = bytearray(), bytearray()
    watched = sample.watched_text
    if detokenizer is not None and watched is None:
        detokenizer.catch_up(token_ids, sample.num_brought)
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[start : start + CHUNK_TOKENS]
        for_text = chunk[max(0, sample.num_brought - start) :]
        tokens += _without_header(_encode(chunk.tolist()), len(chunk))
        if detokenizer is not None and watched is None:
            text += detokenizer.push(for_text).encode()
        yield len(chunk)
    if detokenizer is not None and watched is None:
        text += detokenizer.flush().encode()
    text = text if watched is None else watched
    short = _encode(end)
    fields = short[0] - _FIXED_MAP + (2 if logprobs is None else 3)
    parts: list[Buffer] = [
        bytes([_FIXED_MAP + fields]) + short[1:] + _encode("token_ids") + _LIST + _four(len(token_ids)),
        tokens,
        _encode("text") + _TEXT + _four(len(text)),
        text,
    ]
    return parts if logprobs is None else [*parts, _encode("logprobs"), *logprobs]


def _without_header(packed: bytes, count: int) -> memoryview:
    """The entries of a packed list of at most 65,535."""
    return memoryview(packed)[1 if count < 16 else 3 :]


def _four(number: int) -> bytes:
    return number.to_bytes(LENGTH_BYTES, "big")
