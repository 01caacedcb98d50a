"""Errors as they cross the wire."""

from __future__ import annotations

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.failures import error_of
from cierzo.engine.frontend.frames import LENGTH_BYTES, pack
from cierzo.engine.frontend.frontend import failure
from cierzo.engine.messages import Failure


def test_an_error_about_what_is_no_text_can_be_sent() -> None:
    """Names of files may hold lone surrogates, and so may a template's refusal."""
    error = InvalidRequest("no caf\udce9 \N{HOT BEVERAGE}", field="\ud800", limit="\udfff", value="\udce9" * 300)
    sent = msgspec.msgpack.decode(pack([failure(7, error)])[LENGTH_BYTES:], type=Failure)
    assert (sent.message, sent.field, sent.limit) == ("no caf\\udce9 \N{HOT BEVERAGE}", "\\ud800", "\\udfff")
    assert sent.value == "\\udce9" * 200
    assert str(error_of(sent)) == str(error) == sent.message
