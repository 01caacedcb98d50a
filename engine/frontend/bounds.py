"""Checks that others are made of: how many entries a field has, which words it may say, whether JSON can say it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cierzo.engine.errors import InvalidRequest

MAX_SHOWN_CHARS = 50


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


def json_text(field: str, value: object) -> str:
    """The JSON of a value, as chat templates write it. Raises InvalidRequest for one that has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} cannot be JSON: {error}", field=field, limit="JSON") from error
