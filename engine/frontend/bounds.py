"""Checks that others are made of: how many entries a field has, which words it may say, whether JSON can say it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from cierzo.engine.errors import InvalidRequest

MAX_SHOWN_CHARS = 50
MAX_LEVELS = "a few hundred levels"  # Python's own bound, which depends on who calls


def count(field: str, values: Sequence[object] | dict[int, float], most: int) -> None:
    """Raise InvalidRequest for more than `most` entries."""
    if len(values) > most:
        raise InvalidRequest(
            f"{field} has {len(values)} entries, allowed: {most}", field=field, limit=most, value=len(values)
        )


def one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    """Raise InvalidRequest for a word that is not among those allowed."""
    if value not in allowed:
        raise InvalidRequest(
            f"{field} is {value[:MAX_SHOWN_CHARS]!r}, allowed: {', '.join(allowed)}",
            field=field,
            limit=", ".join(allowed),
            value=value,
        )


def timeout(timeout_s: Any) -> float | None:
    """The seconds that a caller is ready to wait; None for ever. Raises InvalidRequest for what is no number."""
    if timeout_s is None:  # first, as nearly every wait for a delta asks
        return None
    if isinstance(timeout_s, Real) and not isinstance(timeout_s, bool) and not math.isnan(timeout_s):
        return float(timeout_s)
    limit, told = "a number of seconds, or None", shown(timeout_s)
    raise InvalidRequest(f"timeout_s must be {limit}, got {told!r}", field="timeout_s", limit=limit, value=told)


def json_text(field: str, value: object) -> str:
    """The JSON of a value, as chat templates write it. Raises InvalidRequest for one that has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise too_deep(field) from error
    except (TypeError, ValueError) as error:
        what = f"{field} cannot be JSON: {error}"
        raise InvalidRequest(what, field=field, limit="JSON", value=_no_json(value)) from error


def too_deep(field: str) -> InvalidRequest:
    """The error for maps or lists within each other that are too many to be walked through."""
    return InvalidRequest(
        f"{field} is nested too deeply, allowed: {MAX_LEVELS}", field=field, limit=MAX_LEVELS, value="more levels"
    )


def missing(field: str) -> InvalidRequest:
    """The error for a field that must be there."""
    return InvalidRequest(f"{field} is missing", field=field, limit="needed", value="left out")


def must_be(field: str, limit: str, value: Any) -> InvalidRequest:
    """The error for a value that is not what `limit` says in words."""
    return InvalidRequest(f"{field} must be {limit}", field=field, limit=limit, value=shown(value))


def shown(value: Any) -> Any:
    """A value as an error tells it: itself where it is short and plain, else what it is."""
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 256:  # Python prints no very large ones
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return value[:MAX_SHOWN_CHARS] + "..." * (len(value) > MAX_SHOWN_CHARS)
    if not isinstance(value, bytes | bytearray | list | tuple | dict):
        return type(value).__name__
    if len(value) <= MAX_SHOWN_CHARS and len(text := str(value)) <= MAX_SHOWN_CHARS:
        return text
    return f"{len(value)} {'bytes' if isinstance(value, bytes | bytearray) else 'entries'}"


def _no_json(value: Any) -> Any:
    """The first value within `value` that JSON lacks, as an error tells it; None if there is none."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(inner, list | tuple):
        return next((found for each in inner if (found := _no_json(each)) is not None), None)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return shown(value)
    return None
