"""A tree of errors: every refusal and failure a client can see, with its wire code, HTTP status and retry flag.

CierzoError
├── InvalidRequest        the request cannot be served as it is: field, limit, value
│   └── ProtocolError     the bytes on the wire are not the protocol
│       └── VersionMismatch, FrameTooLarge, UnknownMethod
├── NotFound              no request has this id
├── Unauthorized          no key, or one that the server does not know
├── Forbidden             the key lacks a right
├── KeyReused             an idempotency key came again with another request
├── Overloaded            a bounded queue is full: try again after `retry_after_s`
│   └── DeadlineUnreachable   the queue before it is too long for its deadline
├── Draining              the server finishes its work and takes no more
├── Interrupted           the server stops before the answer is complete: resume it elsewhere
├── SlowReader            output was left unread for too long
├── TakenOver             another stream resumed this request
├── CoreFailed            the core process died or a step failed
│   └── CoreStalled       the core process shows no sign of life
├── ConnectionLost        (client side) the server went away in the middle
├── ConfigError           a setting is unknown, malformed or does not fit: field, limit, value
└── CheckpointError       a checkpoint is not what its config says: tensor or file named
"""

from __future__ import annotations

import math
from typing import ClassVar


def amount(num_bytes: int, unit: int, *, up: bool = False) -> str:
    """A number of bytes in `unit` for a message: three digits or more, rounded down, or `up`.

    A need that is rounded up and a smaller room that is rounded down never read the same.
    """
    digits = max(1, 2 - math.floor(math.log10((num_bytes or unit) / unit)))
    scale = 10**digits
    scaled = -(-num_bytes * scale // unit) if up else num_bytes * scale // unit
    return f"{scaled // scale}.{scaled % scale:0{digits}}"


def size(num_bytes: int, *, up: bool = False) -> str:
    """A number of bytes for a reader, in GB, MB or bytes; rounded as `amount` rounds."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if num_bytes >= unit:
            return f"{amount(num_bytes, unit, up=up)} {name}"
    return f"{num_bytes:,} bytes"


class CierzoError(Exception):
    """Base. `field`, `limit` and `value` say what was wrong with what, as text, where that applies.

    may_have_run: of an error that a client raises about a request: whether the server may have worked on it, so
    that sending it again could have it done twice; False: it certainly did not. None: it is about no request.
    is_quota: the limit is the tenant's own, and not one of the server.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retry: ClassVar[bool] = False
    may_have_run: bool | None = None
    is_quota: bool = False

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        limit: object = None,
        value: object = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.message = _sendable(message)
        super().__init__(self.message)
        self.field = None if field is None else _sendable(field)
        self.limit = None if limit is None else _sendable(str(limit))
        self.value = None if value is None else _sendable(str(value)[:200])
        self.retry_after_s = retry_after_s


class InvalidRequest(CierzoError):
    """The request cannot be served as it stands, now or later."""

    code = "invalid_request"
    http_status = 400


class ProtocolError(InvalidRequest):
    """The peer sent something that is not a frame of this protocol."""

    code = "protocol_error"


class VersionMismatch(ProtocolError):
    """Client and server speak different versions of the protocol."""

    code = "version_mismatch"


class FrameTooLarge(ProtocolError):
    """A frame announces more bytes than the limit."""

    code = "frame_too_large"
    http_status = 413


class UnknownMethod(ProtocolError):
    """The frame's tag names no method."""

    code = "unknown_method"
    http_status = 404


class Overloaded(CierzoError):
    """A bounded queue is full; `retry_after_s` is a hint."""

    code = "overloaded"
    http_status = 429
    retry = True


class DeadlineUnreachable(Overloaded):
    """The estimate of queue and prefill exceeds the deadline; `retry_after_s`: when it would no longer, if ever."""

    code = "deadline_unreachable"


class NotFound(CierzoError):
    """No request has this id: it has never been, it is another's, or it was forgotten."""

    code = "not_found"
    http_status = 404


class Unauthorized(CierzoError):
    """The connection has no key, or one that the server does not know or knows no more: it is not told which."""

    code = "unauthorized"
    http_status = 401


class Forbidden(CierzoError):
    """The connection's key lacks the right that the message needs; the right is named."""

    code = "forbidden"
    http_status = 403


class KeyReused(CierzoError):
    """An idempotency key came again, with another request under it."""

    code = "key_reused"
    http_status = 422


class Draining(CierzoError):
    """The server finishes what it has and accepts nothing new."""

    code = "draining"
    http_status = 503
    retry = True


class Interrupted(CierzoError):
    """The server stops before the answer is complete. It can be resumed elsewhere, from the tokens that came."""

    code = "interrupted"
    http_status = 503
    retry = True


class SlowReader(CierzoError):
    """The client left output of a stream unread for too long; the bound is named."""

    code = "slow_reader"
    http_status = 408


class TakenOver(CierzoError):
    """Another stream resumed this request: the answer goes on there."""

    code = "taken_over"
    http_status = 409


class CoreFailed(CierzoError):
    """The core process died, or a step failed for this request."""

    code = "core_failed"
    http_status = 500
    retry = True


class CoreStalled(CoreFailed):
    """The core process shows no sign of life; it is replaced if that lasts."""

    code = "core_stalled"
    http_status = 503


class ConnectionLost(CierzoError):
    """The connection to the server ended before the answer did."""

    code = "connection_lost"
    http_status = 503
    retry = True


class ConfigError(CierzoError):
    """A setting is unknown, malformed, or does not fit the machine or the model."""

    code = "config_error"


def refusal(name: str, limit: object, value: object, why: str = "") -> ConfigError:
    """The error for a setting with a value beyond its limit; `why` says where the limit comes from."""
    shown = repr(value) if isinstance(value, str) else str(value)
    reason = f" ({why})" if why else ""
    return ConfigError(f"{name} must be {limit}{reason}, got {shown[:200]}", field=name, limit=limit, value=value)


class CheckpointError(CierzoError):
    """A checkpoint misses a file or a tensor, has one too many, or one of the wrong shape or dtype."""

    code = "checkpoint_error"


def _sendable(text: str) -> str:
    """`text` with lone surrogates (of a file's name, or a template's error) spelled out: no frame can hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _tree(root: type[CierzoError]) -> dict[str, type[CierzoError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[CierzoError]] = _tree(CierzoError)
