"""Control tokens as a text spells them: found where a chat template wrote them, broken where a client did.

What a client sends goes into a template with a mark in each spelling of a control token, so that all of those which
the rendered text still spells are the template's own. The mark is a character that occurs nowhere in the request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Any

from cierzo.engine.errors import InvalidRequest

# Characters without a meaning in Unicode, then those of private use; JSON escapes each of them by four digits.
MARKS = (*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900)))
_ESCAPED = re.compile("u([0-9a-fA-F]{4})")
FIRST_PRIVATE = 0xF0000  # from here on the characters have no meaning, and there is one for each of Unicode's first
BRACKETS = {"<", "["}  # with which markers begin also where they are no tokens
NOTHING = "(?!)"  # a pattern that is found nowhere


def pattern_of(words: Collection[str]) -> str:
    """A pattern that finds the longest of `words` that begins at a place, in a time that their length bounds."""
    return _tails(sorted(words)) if words else NOTHING


def _tails(words: list[str]) -> str:
    """The pattern of `words`, of which one may be empty, as a tree: no character is looked at twice."""
    by_head: dict[str, list[str]] = {}
    for word in filter(None, words):
        by_head.setdefault(word[0], []).append(word[1:])
    branches = []
    for head, tails in by_head.items():
        size = next(
            (n for n, chars in enumerate(zip(*tails, strict=False)) if len(set(chars)) > 1),
            len(min(tails, key=len)),
        )
        branches.append(re.escape(head + tails[0][:size]) + _tails([tail[size:] for tail in tails]))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}"


class Breaker:
    """A way to break, in strings of clients, spellings of control tokens: whole ones, and those that would come
    about where a template puts the string beside other text."""

    def __init__(self, spellings: Collection[str], literals: Iterable[str] = ()) -> None:
        """literals: the strings that a template writes itself."""
        self._within = re.compile(f"(?={pattern_of(spellings)}).", re.DOTALL)
        self._heads = {text[:end] for text in spellings for end in range(1, len(text))}
        self._longest = max(map(len, spellings), default=0)
        firsts = sorted({text[0] for text in spellings if not text[0].isalnum()} | BRACKETS)
        self._begins = re.compile("|".join(map(re.escape, firsts)))
        self._disguise = {ord(first): FIRST_PRIVATE + ord(first) for first in firsts}
        # What a client could add to the beginning of a control token that ends one of the template's own strings.
        rests = {
            text[len(head) :]
            for head in {head for literal in literals for head in self._open_ends(literal)}
            for text in spellings
            if text.startswith(head)
        }
        self._rests = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)}
        self._whole_rests = rests

    def broken(self, text: str, mark: str) -> str:
        """`text` with `mark` in it wherever it would be, begin or end a control token."""
        core = text.strip()
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if self._open_ends(core):
            text = f"{text[:end]}{mark}{text[end:]}"
        if self._open_ends(text):
            text += mark
        if self._goes_on(core):
            text = f"{text[:start]}{mark}{text[start:]}"
        return self._within.sub(rf"\g<0>{mark}", text)

    def may_spell(self, text: str) -> bool:
        """Whether there is a character in `text` with which a control token begins, letters and digits left out."""
        return self._begins.search(text) is not None

    def disguised(self, text: str) -> str:
        """`text` with characters that mean nothing in the place of those: as long, and the same in its words."""
        return text.translate(self._disguise)

    def _open_ends(self, text: str) -> list[str]:
        """The beginnings of control tokens that `text` ends with."""
        return [text[-size:] for size in range(1, min(self._longest, len(text) + 1)) if text[-size:] in self._heads]

    def _goes_on(self, text: str) -> bool:
        if not self._rests:
            return False
        ends = range(1, min(self._longest, len(text) + 1))
        return text in self._rests or any(text[:end] in self._whole_rests for end in ends)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` made to each of its strings, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {each_text(key, change): each_text(item, change) for key, item in value.items()}
    return [each_text(item, change) for item in value] if isinstance(value, list) else value


def free_marks(taken: bytes, count: int) -> list[str]:
    """Characters that occur nowhere in `taken`, a text in UTF-8, nor as escapes in JSON. Raises InvalidRequest if
    there are none."""
    text = taken.decode()
    held = set(text) | {chr(int(digits, 16)) for digits in _ESCAPED.findall(text)}  # in one pass, whatever it holds
    found = list(islice((mark for mark in MARKS if mark not in held), count))
    if len(found) < count:
        raise InvalidRequest("the messages hold every character of private use", field="messages")
    return found


def without(mark: str, text: str) -> str:
    """`text` without a mark, also where a template wrote it as JSON or Python write a string."""
    return text.replace(mark, "").replace(_escape(mark), "")


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"
