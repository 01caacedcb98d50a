"""Two checks that all others are made of: how many entries a field has, and which words it may say."""

from __future__ import annotations

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
