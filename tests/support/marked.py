"""An answer with thoughts and calls, in the words of the fake server's model."""

from __future__ import annotations

from cierzo.engine.messages import Part
from cierzo.engine.testing.words import EOS, ID_OF, MARKERS


def ids(text: str) -> list[int]:
    """Token ids of a text with markers in it."""
    found: list[int] = []
    while text:
        marker = next((each for each in MARKERS if text.startswith(each)), None)
        found += [ID_OF[marker]] if marker else text[0].encode()
        text = text[len(marker) if marker else 1 :]
    return found


def bare(parts: list[Part]) -> list[tuple[str, str, str]]:
    """Kind, name and text of each part that has one."""
    return [(part.kind, part.name, part.text) for part in parts if part.text or part.name]


SAID = (
    "[THINK]let me see €[/THINK]It blows. "
    '[TOOL_CALLS]wind[ARGS]{"at": "Zaragoza"}[TOOL_CALLS]rain[ARGS]{"in":  [1, 2]}'
)
TOKENS = [*ids(SAID), EOS]
RIGHT = [
    ("thinking", "", "let me see €"),
    ("text", "", "It blows. "),
    ("call", "wind", '{"at": "Zaragoza"}'),
    ("call", "rain", '{"in":  [1, 2]}'),
]
