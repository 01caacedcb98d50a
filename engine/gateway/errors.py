"""Errors in the shape of OpenAI's interface, and those that HTTP alone has."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, Interrupted, InvalidRequest
from cierzo.engine.frontend.retries import is_worth_repeating
from cierzo.engine.messages import Final

Headers = list[tuple[bytes, bytes]]
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_RETRY_AFTER_S = 3600
# What the engine says of a seed, and of tokens to go on from, is for callers of the RPC.
STOPPED = "the server stopped before the answer was complete"


class NoSuchPath(InvalidRequest):
    """Nothing is served under this path."""

    code = "not_found"
    http_status = 404


class WrongMethod(InvalidRequest):
    """The path is served to other methods."""

    code = "method_not_allowed"
    http_status = 405


class BodyTooLarge(InvalidRequest):
    """A body has more bytes than the limit."""

    code = "body_too_large"
    http_status = 413


class WrongMediaType(InvalidRequest):
    """A body is no JSON by its media type, or it is compressed."""

    code = "unsupported_media_type"
    http_status = 415


class WrongHost(InvalidRequest):
    """The request is addressed to a name that is not this server's: a web page may have led a browser here."""

    code = "misdirected_request"
    http_status = 421


class Unfinished(CierzoError):
    """The answer was ended before its end; by a deadline, say."""

    code = "unfinished"
    http_status = 503


class Late(Unfinished):
    """The deadline passed before the answer was complete."""

    code = "deadline"
    http_status = 504


class Failed(Unfinished):
    """A step of the model failed for this answer."""

    code = "failed"
    http_status = 500


UNPLANNED: dict[str, tuple[type[CierzoError], str]] = {
    "deadline": (Late, "its deadline passed before the answer was complete"),
    "cancelled": (Unfinished, "it was cancelled before the answer was complete"),
    "failed": (Failed, "a step of the model failed"),
}


def require_planned(final: Final) -> None:
    """Raise the CierzoError that the end of an answer is, if it is one."""
    for end in final.samples:
        if (found := UNPLANNED.get(end.finish_reason)) is not None:
            kind, text = found
            what = f"{text}: {end.message}" if end.message else text
            raise kind(what, field="deadline_s" if kind is Late else None)


def stopped() -> CierzoError:
    """The error of an answer that is cut short by the end of this server."""
    error = Interrupted(STOPPED)
    error.may_have_run = True
    return error


def body_of(error: CierzoError) -> dict[str, Any]:
    """The JSON that tells of an error."""
    error = stopped() if isinstance(error, Interrupted) else error
    status = error.http_status
    kind = TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    told = {"message": error.message, "type": kind, "param": error.field, "code": error.code}
    more = {"limit": error.limit, "value": error.value}
    return {"error": told | {name: value for name, value in more.items() if value is not None}}


def encoded(error: CierzoError) -> bytes:
    """The same, encoded."""
    return msgspec.json.encode(body_of(error))


def headers_of(error: CierzoError) -> Headers:
    """Headers by which clients know whether, and when, to try again."""
    repeats = error.retry and is_worth_repeating(error) and error.may_have_run is not True
    headers = [(b"x-should-retry", b"true" if repeats else b"false")]
    if repeats and error.http_status in (429, 503):
        wait_s = min(error.retry_after_s or 1.0, MAX_RETRY_AFTER_S)
        headers.append((b"retry-after", b"%d" % math.ceil(wait_s)))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(1000 * wait_s)))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
