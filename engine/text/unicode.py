"""A check for text that UTF-8 cannot carry."""

from __future__ import annotations

from cierzo.engine.errors import InvalidRequest


def refuse_surrogates(field: str, text: str) -> None:
    """Raise InvalidRequest if `text` holds half of a surrogate pair: Python strings can, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise InvalidRequest(
            f"{field} holds a lone surrogate, U+{ord(lone):04X}, as character {error.start}: it cannot be encoded",
            field=field,
            limit="Unicode text",
            value=ascii(lone),
        ) from error
