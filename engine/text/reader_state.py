"""The place where a reader of parts stands: enough to go on from there, without the tokens before."""

from __future__ import annotations

from typing import Literal

import msgspec

from cierzo.engine.text.calls import Calls
from cierzo.engine.text.pieces import PartName

# Kind of the next text. "start": text, or a call without a marker. "closed": the same, or where calls have markers
# text alone, after spaces that belong to neither. "guess": a call without a marker, or what looks like one so far.
Mode = Literal["start", "text", "thinking", "call", "closed", "guess"]


class ReaderState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Place within an answer. undecoded: bytes of a character that is not whole. held: text that may become a stop
    string. at_start: there was no text yet, before which a space is dropped.

    target: the part that a token without a text belongs to, None for a call that has not begun; unclaimed: tokens
    that will be counted for it. unsure: texts of the last tokens, which are a marker, or not.
    """

    undecoded: bytes = b""
    held: str = ""
    at_start: bool = False
    mode: Mode = "text"
    target: PartName | None = ("text", 0)
    unclaimed: int = 0
    unsure: list[str] = []
    num_calls: int = 0
    call_ids: list[str] = []
    broken_calls: list[int] = []
    calls: Calls | None = None
