"""An answer where people read it: thoughts dimmed, calls of tools as calls."""

from __future__ import annotations

import sys
from typing import TextIO

from cierzo.engine.frontend.answer import goes_on, pieces
from cierzo.engine.messages import EndReason, Part

DIM, UNDIM = "\x1b[2m", "\x1b[22m"
CUT = {"length": "cut at its limit of tokens", "deadline": "cut at its deadline"}


def remark(reason: EndReason | None, parts: list[Part], broken_calls: list[int], file: TextIO) -> None:
    """Write in a line that an answer was cut, or has calls that are none."""
    broken = ", ".join(part.name or "?" for part in parts if part.kind == "call" and part.call in broken_calls)
    told = [CUT[reason]] if reason in CUT else []
    told += [f"broken or unfinished, and not called: {broken}"] if broken else []
    if told:
        dim, undim = (DIM, UNDIM) if file.isatty() else ("", "")
        print(f"{dim}[{'; '.join(told)}]{undim}", file=file, flush=True)


class Screen:
    """Writes the pieces of one answer to standard output, as they come. Only a terminal is told to dim."""

    def __init__(self) -> None:
        self._dims = sys.stdout.isatty()
        self._last: Part | None = None

    def show(self, parts: list[Part], text: str) -> None:
        """Write pieces; without any, text."""
        for piece in pieces(parts, text, 0):
            self._show(piece)

    def close(self) -> None:
        """Write what ends the part that was written last."""
        if self._last is not None:
            self._write(self._around(self._last)[1])

    def _show(self, piece: Part) -> None:
        if self._last is None or not goes_on(self._last, piece):
            if not piece.text and piece.kind != "call":
                return  # a marker alone, or a character that is not complete
            self.close()
            self._write("" if self._last is None else "\n\n")
            self._last = piece
            self._write(self._around(piece)[0])
        self._write(piece.text)

    def _around(self, part: Part) -> tuple[str, str]:
        """Text that begins a part, and text that ends it."""
        if part.kind == "call":
            return f"{part.name}(", ")"
        return (DIM, UNDIM) if part.kind == "thinking" and self._dims else ("", "")

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
