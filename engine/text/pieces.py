"""Pieces of the parts of an answer."""

from __future__ import annotations

from cierzo.engine.messages import Part, PartKind

PartName = tuple[PartKind, int]  # with the number of a call
TEXT: PartName = ("text", 0)
THINKING: PartName = ("thinking", 0)


class Piece:
    """Piece of a part, while it grows."""

    __slots__ = ("call_id", "name", "num_tokens", "part", "texts")

    def __init__(self, part: PartName) -> None:
        self.part = part
        self.texts: list[str] = []
        self.name = self.call_id = ""
        self.num_tokens = 0

    def whole(self) -> Part:
        """The piece, as it is sent."""
        kind, call = self.part
        text = "".join(self.texts)
        return Part(kind=kind, text=text, call=call, name=self.name, id=self.call_id, num_tokens=self.num_tokens)
