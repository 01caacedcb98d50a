"""Arguments of past tool calls, as a chat template wants them: a mapping, or the text that was generated.

Some templates write the mapping (`call.function | tojson`, `arguments | items`), others the text (`+ arguments`,
`{{ arguments }}`), others either. `ChatTemplate.render` finds out which by rendering both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from cierzo.engine.text.spellings import each_text

SOMETHING = {"a": 1}  # stands in for empty arguments, which a template may pass over


class Arguments(msgspec.Struct, frozen=True):
    """Arguments of a tool call. `value` is None unless the text is a JSON object; no text is an empty object."""

    text: str
    value: dict[str, Any] | None

    @classmethod
    def parse(cls, text: str, change: Callable[[str], str] = str) -> Arguments:
        """Read a text. It stays text alone if it is no JSON object, or holds what no JSON text in UTF-8 can say.

        change: what is made of it, and of the strings in it.
        """
        try:
            value = json.loads(text) if text.strip() else {}
            canonical_json(value).encode()
            value = each_text(value, change)
        except (ValueError, RecursionError):
            return cls(change(text), None)
        return cls(change(text), value if isinstance(value, dict) else None)

    @property
    def probe(self) -> Arguments:
        """Give the arguments in the form that `tojson` writes, and never empty: its text and its value print alike
        in a template that prints either of them as JSON."""
        if self.value is None:
            return self
        value = self.value or SOMETHING
        return Arguments(canonical_json(value), value)

    def as_mapping(self) -> Any:
        """A mapping that prints as its text; the text where there is no mapping."""
        return self.text if self.value is None else _Printable(self.value, self.text)


class _Printable(dict[str, Any]):
    """A mapping whose `str` is JSON, not Python's own notation."""

    __slots__ = ("_text",)

    def __init__(self, value: dict[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text


def canonical_json(value: Any) -> str:
    """JSON as the `tojson` of a chat template writes it. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
