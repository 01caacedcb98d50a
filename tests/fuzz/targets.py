"""What is fuzzed: each target takes bytes, and raises for what must not be."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from simulation.house import House
from simulation.images import vision
from simulation.link import SimulatedLink
from simulation.world import bytes_kept
from support.part_answers import IDS, SYNTAXES, Pieces, joined, read
from support.parts_reference import parse

from cierzo.bench.virtual import VirtualClock, VirtualLoop
from cierzo.cache.config import CacheConfig
from cierzo.engine.errors import FrameTooLarge, InvalidRequest
from cierzo.engine.frontend import frame_reader, rpc, validate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frames import UNDECODABLE, FrameSplitter
from cierzo.engine.frontend.limits import ByteBudget
from cierzo.engine.messages import FEATURES, ClientMessage, Generate, Hello, ServerMessage
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.parts import PartsReader, numbered
from cierzo.engine.worker.fake import fake_config
from cierzo.scheduler.config import SchedulerConfig

_decode = msgspec.msgpack.Decoder(ClientMessage).decode
CORPUS = Path(__file__).parent / "corpus"
MAX_FRAME_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 200  # the slow parser takes time in proportion to the square of it
LIMITS = FrontendConfig(
    max_frame_bytes=MAX_FRAME_BYTES,
    max_attached_bytes=32 * 1024,
    max_unencoded_bytes=64 * 1024,
    orphan_s=1.0,
    default_deadline_s=5.0,
)
MODEL = fake_model(
    vocab_size=128,
    max_model_len=64,
    block_tokens=8,
    eos_token_ids=[7],
    has_chat_template=False,
    vision=vision(128),
)


def entries(target: str) -> list[bytes]:
    """The corpus of a target, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def frame(body: bytes) -> None:
    """A frame's body is a message, or is refused; a generate is valid, or is refused with words and a field."""
    try:
        message = _decode(body)
    except UNDECODABLE:
        message = None
    _envelope(bytearray(body), message)
    if isinstance(message, Generate):
        try:
            validate.fields(message, LIMITS, MODEL)
            if message.token_ids is not None:
                submit = validate.request(message, message.token_ids, 1, 1, MODEL)
                assert 0 < len(submit.prompt_token_ids) < MODEL.max_model_len
        except InvalidRequest as error:
            if not error.message or not error.field:
                raise AssertionError(f"a refusal without words or field: {error}") from error


def _envelope(body: bytearray, message: Any) -> None:
    """What is read of a large frame's type and stream is what the whole says."""
    found = frame_reader.peek(body)
    if message is not None and found.type:
        assert found.type == type(message).__struct_config__.tag, found
    if message is not None and found.stream >= 0:
        assert found.stream == message.stream, found
    with contextlib.suppress(*UNDECODABLE):
        frame_reader.envelope(body)


def splitter(data: bytes) -> None:
    """However bytes are cut, the same bodies come out, and little is kept."""
    whole, cut = FrameSplitter(MAX_FRAME_BYTES), FrameSplitter(MAX_FRAME_BYTES)
    assert _split(whole, [data]) == _split(cut, pieces(data))
    assert len(cut._rest) <= MAX_FRAME_BYTES + 4
    assert _taken([data]) == _taken(pieces(data))


def _taken(parts: list[bytes]) -> list[str]:
    """The frames that a reader cuts; all bytes are given back in the end."""
    budget = ByteBudget(LIMITS)
    box, found = frame_reader.FrameReader(MAX_FRAME_BYTES, budget), []
    try:
        for part in parts:
            box.feed(part)
            while (taken := box.next()) is not None:
                found.append(bytes(taken).hex() if isinstance(taken, memoryview) else repr(taken))
    except FrameTooLarge as error:
        found.append(error.message)
    box.close()
    assert not budget.num_bytes
    return found


def parts(data: bytes) -> None:
    """However an answer's tokens come, its parts are those of the whole. The first byte chooses the syntax; what is
    no byte of UTF-8 stands for a token that is a marker."""
    name, vocabulary = [*SYNTAXES][data[0] % len(SYNTAXES) if data else 0], Pieces()
    markers = [*SYNTAXES[name].tokens, IDS["[IMG]"]]
    token_ids: list[int] = []
    for piece in pieces(data[1:MAX_ANSWER_BYTES]):
        for text in re.findall(rb"[\xf8-\xff]|[^\xf8-\xff]+", piece):
            place = text[0] - 0xF8
            token_ids.append(markers[place % len(markers)] if place >= 0 else vocabulary.add(text))
    whole = parse(token_ids, vocabulary.token_bytes, SYNTAXES[name], numbered)
    for lengths in ([], [1] * len(token_ids)):
        reader = PartsReader(vocabulary, SYNTAXES[name])
        text, found = read(reader, token_ids, lengths)
        assert (joined(found), text, reader.broken_calls) == (whole.parts, whole.text, whole.broken)


def _split(split: FrameSplitter, parts: list[bytes]) -> list[bytes | str]:
    found: list[bytes | str] = []
    try:
        for part in parts:
            for body in split.feed(part):
                found.append(bytes(body))
    except FrameTooLarge as error:
        found.append(error.message)
    return found


def pieces(data: bytes) -> list[bytes]:
    """Bytes as a network might deliver them; the same bytes always in the same pieces."""
    rng = random.Random(zlib.crc32(data))
    cuts = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 5, 20))))})
    return [data[begin:end] for begin, end in pairwise(cuts)]


class _Transport(asyncio.Transport):
    """Takes what the server writes."""

    def __init__(self, protocol: rpc.Connection) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = bytearray()
        self.is_closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


class Connections(logging.Handler):
    """A server, to which each call of `sequence` is a connection. What it logs with a trace is a finding."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._clock = VirtualClock(100.0)
        self._loop = VirtualLoop(self._clock)
        self._loop.set_exception_handler(lambda _, context: self._faults.append(str(context)))
        self._faults: list[str] = []
        logger = logging.getLogger("cierzo")
        logger.addHandler(self)
        logger.propagate = False
        self._loop.run_until_complete(self._start())

    def emit(self, record: logging.LogRecord) -> None:
        """Note a bug that the server survived."""
        if record.exc_info and record.exc_info[1] is not None:
            self._faults.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def sequence(self, data: bytes) -> None:
        """All bytes of a client's connection; then another client is served, and nothing of the first is left."""
        self._loop.run_until_complete(self._sequence(data))

    def close(self) -> None:
        """End the server."""
        super().close()
        logger = logging.getLogger("cierzo")
        logger.removeHandler(self)
        logger.propagate = True
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._stop())
            self._loop.close()

    async def _start(self) -> None:
        scheduler = SchedulerConfig(budget_tokens=64, max_chunk_tokens=32, max_running=8, max_model_len=64)
        config = fake_config(scheduler, CacheConfig(block_tokens=8, num_blocks=64), vocab_size=128)
        self._link = SimulatedLink(random.Random(0), config, LIMITS, self._clock)
        self._house = House(random.Random(0), LIMITS, MODEL, self._link, self._clock)
        self._frontend, self._server = self._house.frontend, self._house.server
        self._other = self._connect()
        hello = msgspec.msgpack.encode(Hello(features=list(FEATURES)))
        self._other.protocol.data_received(len(hello).to_bytes(4, "big") + hello)
        await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        await self._house.close()

    def _connect(self) -> _Transport:
        connection = self._server._connection()
        transport = _Transport(connection)
        connection.connection_made(transport)
        return transport

    async def _sequence(self, data: bytes) -> None:
        transport = self._connect()
        for piece in pieces(data):
            if not transport.is_closed:
                transport.protocol.data_received(piece)
                await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert bytes_kept(transport.protocol) <= MAX_FRAME_BYTES + 4
        _read_all(transport.written)
        if not transport.is_closed and not transport.protocol.eof_received():
            transport.abort()
        self._other.written.clear()
        ping = msgspec.msgpack.encode({"type": "ping", "stream": 5})
        self._other.protocol.data_received(len(ping).to_bytes(4, "big") + ping)
        await asyncio.sleep(0.01)
        answers = _read_all(self._other.written)
        assert any(answer.get("type") == "pong" for answer in answers), answers
        if len(self._frontend.streams):  # orphans of a client that could resume
            await asyncio.sleep(LIMITS.orphan_s + LIMITS.default_deadline_s + 1.0)
        streams = self._frontend.streams
        assert (len(streams), streams.num_samples, streams.num_tokens) == (0, 0, 0)
        assert (self._frontend.heap.num_bytes, self._frontend.budget.num_bytes) == (0, 0)
        assert self._link.life is not None
        assert not self._link.life.core._pixels._living
        assert len(self._server._connections) == 1, self._server._connections
        assert not self._faults, self._faults


def _read_all(written: bytearray) -> list[dict[str, Any]]:
    """The server's messages: whole frames, each of them one that is in the protocol."""
    messages, at = [], 0
    if written.startswith((b"HTTP/1.1 400 ", b"\x15\x03\x03")):  # to one who speaks HTTP, or TLS
        return []
    while at < len(written):
        end = at + 4 + int.from_bytes(written[at : at + 4], "big")
        assert end <= len(written), "half a frame was written"
        msgspec.msgpack.decode(written[at + 4 : end], type=ServerMessage)
        messages.append(msgspec.msgpack.decode(written[at + 4 : end]))
        at = end
    return messages
