"""Frames of a connection, made into messages for `Methods`, or into the end of what they are about.

A message that cannot be decoded but whose stream id can be read ends that stream; anything worse raises the
CierzoError that ends the connection.
"""

from __future__ import annotations

import logging
from typing import cast, get_args

import msgspec

from cierzo.engine.errors import (
    CierzoError,
    FrameTooLarge,
    InvalidRequest,
    ProtocolError,
    UnknownMethod,
    VersionMismatch,
)
from cierzo.engine.frontend.absent import absent
from cierzo.engine.frontend.frame_reader import (
    PREFIX_BYTES,
    SMALL_FRAME_BYTES,
    Envelope,
    Large,
    Skipped,
    envelope,
    peek,
    seconds_of,
)
from cierzo.engine.frontend.frames import UNDECODABLE
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.methods import Methods
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.frontend.wire_checks import undecodable
from cierzo.engine.frontend.wording import DECODERS
from cierzo.engine.messages import MAGIC, OLDEST_VERSION, PROTOCOL_VERSION, Attach, ClientMessage, Message

log = logging.getLogger(__name__)


class AnyHello(msgspec.Struct, tag="hello"):
    """Hello of whatever version: fields that this version does not know are passed over."""

    magic: str = ""
    version: int = -1
    features: list[str] = []
    key: str = ""


class LargeAttach(Message, frozen=True, tag="attach"):
    """An `attach` whose bytes stay in the frame that brought them."""

    stream: int
    data: memoryview
    image: int | None = None


_decode = msgspec.msgpack.Decoder(ClientMessage).decode
_decode_attach = msgspec.msgpack.Decoder(LargeAttach).decode
_decode_hello = msgspec.msgpack.Decoder(AnyHello).decode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_METHODS = {cast(str, cls.__struct_config__.tag) for cls in get_args(ClientMessage)}
SHOWN_CHARS = 40  # of a type that does not exist
_HTTP = (b"GET ", b"HEAD", b"POST", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI ")
_NOT_HTTP = b"This port speaks the RPC of cierzo (docs/rpc.md), not HTTP.\n"
_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    % len(_NOT_HTTP)
) + _NOT_HTTP
_TLS_ALERT = bytes((0x15, 3, 3, 0, 2, 2, 10))  # fatal: an unexpected message


def foreign(data: bytes) -> tuple[str, bytes] | None:
    """The protocol that a connection begins in, if it is another one, and what to answer in it."""
    if data.startswith(_HTTP):
        return "HTTP", _HTTP_ANSWER
    if data.startswith(b"\x16\x03"):
        return "TLS", _TLS_ALERT
    return None


def greeting(body: memoryview) -> AnyHello:
    """The hello that a connection begins with. Raises ProtocolError if it is none that is understood."""
    try:
        hello = _decode_hello(body)
    except UNDECODABLE as error:
        raise ProtocolError(f"the first frame is no hello: {error}", field="type", limit="hello") from error
    if hello.magic != MAGIC:
        raise ProtocolError("hello has the wrong magic", field="magic", limit=MAGIC, value=hello.magic)
    if not OLDEST_VERSION <= hello.version <= PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the server speaks versions {OLDEST_VERSION} to {PROTOCOL_VERSION}, the client {hello.version}",
            field="version",
            limit=PROTOCOL_VERSION,
            value=hello.version,
        )
    return hello


def receive_small(sink: Sink, methods: Methods, frontend: Frontend, body: memoryview) -> None:
    """Decode a message, and run its method."""
    try:
        message = _decode(body)
    except UNDECODABLE as error:
        _undecodable(sink, frontend, body, error)
        return
    _dispatch(sink, methods, frontend, message)


def receive_large(sink: Sink, methods: Methods, frontend: Frontend, frame: Large) -> None:
    """Run the method of a message whose type and stream are all that may be read of it here."""
    try:
        found = envelope(frame.body)
    except UNDECODABLE as error:
        raise ProtocolError(f"a frame holds no message: {error}", field="frame") from error
    if found.stream < 0:
        raise ProtocolError(
            f"a frame of {len(frame.body)} bytes does not say its stream where it can be found",
            field="stream",
            limit="at least 0, before any long list",
            value=found.stream,
        )
    if found.type == "generate":
        methods.generate_large(sink, found.stream, frame.body, seconds_of(found.deadline_s))
    elif found.type == "attach":
        try:
            attach = _decode_attach(frame.body)
        except UNDECODABLE as error:
            frontend.fail(sink, found.stream, undecodable(error, frame.body), attaching=True)
            return
        data = attach.data
        if len(frame.body) - len(data) > PREFIX_BYTES:  # what is kept would be more than what is charged
            twice = InvalidRequest("data is named twice", field="data", limit="once")
            frontend.fail(sink, found.stream, twice, attaching=True)
            return
        message = Attach(stream=found.stream, data=cast("bytes", data), image=attach.image)
        _dispatch(sink, methods, frontend, message)
    elif found.type in DECODERS:
        methods.words_large(sink, found.stream, found.type, frame.body)
    else:
        size = len(frame.body)
        too_large = FrameTooLarge(
            f"a {found.type} of {size} bytes", field="frame", limit=SMALL_FRAME_BYTES, value=size
        )
        frontend.fail(sink, found.stream, too_large if found.type in _METHODS else _unknown(found))


def receive_skipped(sink: Sink, frontend: Frontend, frame: Skipped) -> None:
    """End the stream of a frame that was not kept; raise its error if no stream is named at its beginning."""
    found = peek(frame.prefix)
    if found.stream < 0:
        raise frame.error
    if found.type == "generate":
        frontend.refused(frame.error, sink)
    frontend.fail(sink, found.stream, frame.error, attaching=found.type == "attach")


def _dispatch(sink: Sink, methods: Methods, frontend: Frontend, message: ClientMessage) -> None:
    try:
        methods.dispatch(sink, message)
    except CierzoError:
        raise
    except Exception as error:
        log.exception("a %s message failed", type(message).__name__)
        reason = CierzoError(f"internal error: {type(error).__name__}")
        frontend.fail(sink, getattr(message, "stream", -1), reason)


def _undecodable(sink: Sink, frontend: Frontend, body: memoryview, error: Exception) -> None:
    """End the stream that the message is about, or raise ProtocolError if that cannot be read."""
    try:
        found = _decode_envelope(body)
    except UNDECODABLE:
        raise ProtocolError(f"a frame holds no message: {error}", field="frame") from error
    reason = undecodable(error, body) if found.type in _METHODS else _unknown(found)
    if found.stream < 0:
        raise ProtocolError(reason.message, field=reason.field, limit=reason.limit, value=reason.value) from error
    if found.type == "generate":
        frontend.refused(reason, sink)
    frontend.fail(sink, found.stream, reason, attaching=found.type == "attach")


def _unknown(found: Envelope) -> InvalidRequest:
    known = ", ".join(sorted(_METHODS - {"hello"}))
    name = found.type[:SHOWN_CHARS] + "..." * (len(found.type) > SHOWN_CHARS)
    what = f"there is no method {name!r}" if found.type else "the message has no type"
    what = absent(found.type) or what
    return UnknownMethod(what, field="type", limit=known, value=name)
