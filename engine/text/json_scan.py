"""A reader of JSON that is still being written: where a value ends, and whether it is JSON.

It keeps where it is, not what it has read, so that a value of any length costs a constant per character and its
state can be sent. Where the text is no JSON, it goes on by quotes and brackets alone, and still finds the end. What
JSON can write, and no conversation could repeat, is none: numbers beyond a double or MAX_NUMBER_CHARS, and halves
of surrogate pairs.
"""

from __future__ import annotations

import math
import re
from string import hexdigits

import msgspec

SPACE = " \t\n\r"
MAX_NUMBER_CHARS = 4300  # Python's limit on the digits of an integer
MAX_DEPTH = 256  # a value that is nested deeper is taken for no JSON, and for one that never ends
_plain = re.compile(r'[^"\\\x00-\x1f]*').match
_CLOSED_BY = {"{": "}", "[": "]"}
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
# Of a number: what it may go on with, by what it has last; ".", "e", "s" and "-" (a sign) cannot be its end.
_NUMBER = {
    "-": {"0": "0", "1": "i"},
    "0": {".": ".", "e": "e"},
    "i": {"0": "i", "1": "i", ".": ".", "e": "e"},
    ".": {"0": "f", "1": "f"},
    "f": {"0": "f", "1": "f", "e": "e"},
    "e": {"0": "x", "1": "x", "+": "s", "-": "s"},
    "s": {"0": "x", "1": "x"},
    "x": {"0": "x", "1": "x"},
}
_DIGITS = {**dict.fromkeys("123456789", "1"), "E": "e"}


class JsonScan(msgspec.Struct):
    """Place within a JSON value.

    first: the character that it begins with. stack: brackets that are open. expect: what comes next, a value ("v"),
    a value or "]" ("a"), a key ("q"), a key or "}" ("k"), ":" or "," (or a closing bracket).
    scalar: what it is within: a string ('"', '\\' after a backslash, "1" to "4" before so many hexadecimal digits),
    a number ("n" and the key of _NUMBER), a literal ("l" and the rest of it), too many brackets ("!"), or nothing.
    number: the number so far, or the hexadecimal digits. is_half: the string ends in the first half of a surrogate
    pair.
    """

    first: str = ""
    stack: str = ""
    expect: str = "v"
    scalar: str = ""
    number: str = ""
    is_half: bool = False
    is_key: bool = False
    is_valid: bool = True
    is_done: bool = False

    @property
    def is_object(self) -> bool:
        """Whether it is a whole object."""
        return self.is_valid and self.is_done and self.first == "{"

    def feed(self, text: str, at: int = 0) -> int:
        """Read on in `text` from index `at`; the index behind the value, or behind the text."""
        end = len(text)
        while at < end and not self.is_done:
            if self.scalar == "!":
                return end
            if self.scalar == '"':
                if self.is_half and text[at] != "\\":
                    self.is_valid = self.is_half = False
                if (at := _skipped(text, at)) == end:
                    break
            at += self._within(text[at]) if self.scalar else self._between(text[at])
        return at

    def end(self) -> None:
        """Note that no text follows: a number at the top has no other end."""
        if self.scalar[:1] == "n":
            self._end_number()

    def _within(self, char: str) -> int:
        """Read a character of a scalar; 0 if it does not belong to it."""
        kind = self.scalar[0]
        if kind == '"':
            return self._in_string(char)
        if kind == "\\":
            self.is_valid &= char in '"\\/bfnrtu' and (char == "u" or not self.is_half)
            self.scalar, self.number = "4" if char == "u" else '"', ""
            return 1
        if kind == "n":
            after = _NUMBER[self.scalar[1]].get(_DIGITS.get(char, char))
            if after is None:
                self._end_number()
                return 0
            self.scalar = "n" + after
            self._add_digit(char)
            return 1
        if kind == "l":
            if char != self.scalar[1]:
                self.is_valid, self.scalar = False, ""
                return 0
            self.scalar = self.scalar[0] + self.scalar[2:]
            if self.scalar == "l":
                self._end_value()
            return 1
        if char not in hexdigits:
            self.is_valid, self.scalar = False, '"'
            return 0
        self.number += char
        self.scalar = '"' if kind == "1" else str(int(kind) - 1)
        if kind == "1":
            self._end_escape(int(self.number, 16))
        return 1

    def _end_escape(self, code: int) -> None:
        """Note half a surrogate pair: a first one is nothing without a second, and the other way round."""
        is_second = 0xDC00 <= code < 0xE000
        self.is_valid &= is_second == self.is_half
        self.is_half = 0xD800 <= code < 0xDC00

    def _in_string(self, char: str) -> int:
        if char == "\\":
            self.scalar = "\\"
        elif char != '"':
            self.is_valid = False  # a control character must be escaped
        elif self.is_key:
            self.scalar, self.expect = "", ":"
        else:
            self._end_value()
        return 1

    def _between(self, char: str) -> int:
        """Read a character outside of scalars; 0 if it is behind the value."""
        if char in SPACE:
            return 1
        self.first = self.first or char
        if char in "}],":
            return self._close(char)
        if char == ":":
            self.is_valid &= self.expect == ":"
            self.expect = "v"
            return 1
        self.is_key = char == '"' and self.expect in "kq"
        self.is_valid &= self.is_key or self.expect in "va"
        if char == '"':
            self.scalar = '"'
        elif char in "{[":
            self._open(char)
        elif char in _LITERALS:
            self.scalar = "l" + _LITERALS[char] if self.is_valid else ""
        elif char in "-0123456789":
            self.scalar, self.number = "n" + (char if char in "-0" else "i") if self.is_valid else "", char
        else:
            self.is_valid = False
        return 1

    def _open(self, bracket: str) -> None:
        if len(self.stack) < MAX_DEPTH:
            self.stack += bracket
            self.expect = "k" if bracket == "{" else "a"
        else:
            self.is_valid, self.scalar = False, "!"

    def _close(self, char: str) -> int:
        """Read a comma or a closing bracket."""
        if not self.stack:  # it closes what is around the value, which is missing, or no JSON
            self.is_valid, self.is_done = False, True
            return 0
        if char == ",":
            self.is_valid &= self.expect == ","
            self.expect = "q" if self.stack[-1] == "{" else "v"
            return 1
        may_close = self.expect == "," or self.expect == ("k" if char == "}" else "a")
        self.is_valid &= may_close and _CLOSED_BY[self.stack[-1]] == char
        self.stack = self.stack[:-1]
        self._end_value()
        return 1

    def _add_digit(self, char: str) -> None:
        if len(self.number) < MAX_NUMBER_CHARS:
            self.number += char
        else:
            self.is_valid = False

    def _end_number(self) -> None:
        self.is_valid &= self.scalar[1] in "0ifx"
        if self.is_valid and self.scalar[1] in "fx":
            self.is_valid = math.isfinite(float(self.number))
        self._end_value()

    def _end_value(self) -> None:
        self.scalar, self.expect = "", ","
        self.is_done = not self.stack


def _skipped(text: str, at: int) -> int:
    """The index of the next character that means something in a string."""
    found = _plain(text, at)
    return at if found is None else found.end()
