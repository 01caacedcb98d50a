"""Errors on the wire: the message that carries one, and the error that it stands for."""

from __future__ import annotations

from cierzo.engine.errors import BY_CODE, CierzoError
from cierzo.engine.messages import Failure


def failure(stream_id: int, error: CierzoError) -> Failure:
    """The message that carries `error`; stream -1 is the connection itself."""
    return Failure(
        stream=stream_id,
        code=error.code,
        message=error.message,
        field=error.field,
        limit=error.limit,
        value=error.value,
        retry=error.retry,
        retry_after_s=error.retry_after_s,
    )


def error_of(message: Failure) -> CierzoError:
    """The error that a message carries."""
    return BY_CODE.get(message.code, CierzoError)(
        message.message,
        field=message.field,
        limit=message.limit,
        value=message.value,
        retry_after_s=message.retry_after_s,
    )
