"""Errors say what was wrong with what, in numbers that are true, and can cross the wire."""

from __future__ import annotations

import random

import msgspec
import pytest

from cierzo.engine.errors import ConfigError, InvalidRequest, amount, refusal
from cierzo.engine.frontend.client_link import error_of
from cierzo.engine.frontend.frames import LENGTH_BYTES, pack
from cierzo.engine.frontend.frontend import failure
from cierzo.engine.messages import Failure

GIB, GB = 1 << 30, 10**9


@pytest.mark.parametrize(
    ("num_bytes", "unit", "down", "up"),
    [
        (0, GIB, "0.00", "0.00"),
        (1, GIB, "0.000000000931", "0.000000000932"),
        (98_304, GIB, "0.0000915", "0.0000916"),
        (40_000_000, GIB, "0.0372", "0.0373"),
        (GIB, GIB, "1.00", "1.00"),
        (GIB + 1, GIB, "1.00", "1.01"),
        (12_345_678_901, GB, "12.3", "12.4"),
        (237_930_000_000, GB, "237.9", "238.0"),
        (10**24, GB, "1000000000000000.0", "1000000000000000.0"),
    ],
)
def test_an_amount_has_digits_enough(num_bytes: int, unit: int, down: str, up: str) -> None:
    assert (amount(num_bytes, unit), amount(num_bytes, unit, up=True)) == (down, up)


def test_what_is_needed_never_reads_as_what_there_is() -> None:
    draw = random.Random(7)
    for _ in range(2000):
        room = int(10 ** draw.uniform(0, 15))
        need = room + int(10 ** draw.uniform(0, 6))
        there, needed = amount(room, GIB), amount(need, GIB, up=True)
        assert float(there) <= room / GIB
        assert float(needed) >= need / GIB
        assert float(there) < float(needed)


def test_a_refusal_names_field_limit_value_and_reason() -> None:
    error = refusal("threads", "an integer from 1 to 8", "4 ", "CPUs here")
    assert isinstance(error, ConfigError)
    assert str(error) == "threads must be an integer from 1 to 8 (CPUs here), got '4 '"
    assert (error.field, error.limit, error.value) == ("threads", "an integer from 1 to 8", "4 ")
    assert str(refusal("threads", 1, 2)) == "threads must be 1, got 2"
    assert len(str(refusal("name", "short", "x" * 10_000))) < 300


def test_an_error_about_what_is_no_text_can_be_sent() -> None:
    """Names of files may hold lone surrogates, and so may a template's refusal."""
    error = InvalidRequest("no caf\udce9 \N{HOT BEVERAGE}", field="\ud800", limit="\udfff", value="\udce9" * 300)
    sent = msgspec.msgpack.decode(pack([failure(7, error)])[LENGTH_BYTES:], type=Failure)
    assert (sent.message, sent.field, sent.limit) == ("no caf\\udce9 \N{HOT BEVERAGE}", "\\ud800", "\\udfff")
    assert sent.value == "\\udce9" * 200
    assert str(error_of(sent)) == str(error) == sent.message
