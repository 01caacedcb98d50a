"""From token ids to text, one token at a time, and stop strings in that text.

A token is bytes, not characters: a character may be spread over several tokens, so text lags behind the
tokens until its bytes are whole. It also lags while its end could still become a stop string. Both cost a
constant per token, whatever the length of the output.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Protocol, Self

from cierzo.engine.messages import Part

MAX_CHAR_BYTES = 4
_NO_PARTS: list[Part] = []  # one for all: a server has thousands of readers
_utf8 = codecs.getincrementaldecoder("utf-8")


class TokenBytes(Protocol):
    """The part of a tokenizer that the detokenizer uses."""

    strip_leading_space: bool

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes in the text; empty for special and unknown ids."""
        ...


class StopMatcher:
    """Aho-Corasick over the stop strings: one state, one table look-up per character, whatever their number.

    A state stands for the longest end of the text that is a beginning of some stop string. `depth[state]` is
    its length: the characters that must be held back. `match[state]` is the longest stop string that the text
    ends with, or None.
    """

    __slots__ = ("_fail", "_next", "depth", "match")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = self._next[state][char]
        self.match[state] = string

    def _link(self) -> None:
        """Fill `_fail`, level by level: where to go on when the next character does not fit."""
        level = list(self._next[0].values())
        while level:
            deeper: list[int] = []
            for state in level:
                if self.match[state] is None:
                    self.match[state] = self.match[self._fail[state]]
                for char, child in self._next[state].items():
                    self._fail[child] = self.step(self._fail[state], char)
                    deeper.append(child)
            level = deeper

    def step(self, state: int, char: str) -> int:
        """The state after `char`."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)


@lru_cache(maxsize=256)
def stop_matcher(strings: tuple[str, ...]) -> StopMatcher:
    """The matcher of these strings; kept, as requests repeat theirs."""
    return StopMatcher(strings)


class TextReader:
    """Text of one sample, and the base of what reads more in its tokens. After a `push` look at `stop`: once set,
    the text is cut and further pushes are errors.

    The stop string whose last character comes first wins; of several that end there, the longest. It is not
    part of the text. One completed before token number `min_tokens` does not count.

    stop_tokens: stop strings that are special tokens, by their ids. As those have no text, the token itself stops.
    parts: pieces of what the last `push` or `flush` read; empty where all of it is text, as it always is here.
    """

    __slots__ = (
        "_at_start",
        "_decoder",
        "_held",
        "_matcher",
        "_min_tokens",
        "_state",
        "_stop_tokens",
        "_token_bytes",
        "num_tokens",
        "parts",
        "stop",
    )

    def __init__(
        self,
        tokens: TokenBytes,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        stop_tokens: Mapping[int, str] = {},
    ) -> None:
        self._token_bytes = tokens.token_bytes
        self._stop_tokens = stop_tokens
        self._decoder = _utf8(errors="replace")
        self._matcher = stop_matcher(stop) if stop else None
        self._min_tokens = min_tokens
        self._state = 0
        self._held = ""
        self._at_start = tokens.strip_leading_space
        self.num_tokens = 0
        self.parts = _NO_PARTS
        self.stop: str | None = None

    @property
    def watches(self) -> bool:
        """Whether there are stop strings to look for."""
        return self._matcher is not None

    def fork(self) -> Self:
        """Another one that stands at the same place."""
        fork = copy(self)
        fork._decoder = _utf8(errors="replace")
        fork._decoder.setstate(self._decoder.getstate())
        return fork

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens, return the text that is now certain.

        With a stop string found, `num_tokens` counts up to and including the token that completed it; tokens
        after that one are not taken.
        """
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            pieces = b"".join(map(self._token_bytes, token_ids))
            return self._stripped(self._decoder.decode(pieces))
        certain = []
        for token_id in token_ids:
            self.num_tokens += 1
            if token_id in self._stop_tokens and self.num_tokens >= self._min_tokens:
                certain.append(self.flush())
                self.stop = self.stop or self._stop_tokens[token_id]
                break
            piece = self._decoder.decode(self._token_bytes(token_id))
            certain.append(self._match(self._stripped(piece), self._matcher))
            if self.stop is not None:
                break
        return "".join(certain)

    def flush(self) -> str:
        """Text that was held back, at the end of a generation that no stop string in the text ended."""
        if self.stop is not None:
            return ""
        text = self._stripped(self._decoder.decode(b"", final=True))
        if self._matcher is not None:
            text = self._match(text, self._matcher)
        rest, self._held = self._held, ""
        return text if self.stop is not None else text + rest

    def _match(self, new: str, matcher: StopMatcher) -> str:
        text, state = self._held + new, self._state
        counts = self.num_tokens >= self._min_tokens
        for end, char in enumerate(new, start=len(self._held) + 1):
            state = matcher.step(state, char)
            if counts and (found := matcher.match[state]) is not None:
                self.stop, self._held = found, ""
                return text[: end - len(found)]
        self._state = state
        certain = len(text) - matcher.depth[state]
        self._held = text[certain:]
        return text[:certain]

    def _hold(self, text: str) -> None:
        """Hold back a text that may become a stop string."""
        self._held, self._state = text, 0
        if self._matcher is not None:
            for char in text:
                self._state = self._matcher.step(self._state, char)

    def _stripped(self, text: str) -> str:
        """SentencePiece tokenizers write a space before the first word that is not part of the text."""
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class Detokenizer(TextReader):
    """Text of one sample, and nothing else: how it goes on follows from the last few tokens."""

    __slots__ = ()

    def tail(self, token_ids: Sequence[int], end: int) -> list[int]:
        """The last of the first `end` tokens that have a text: as many as decide how the text goes on, which are a
        character that is not whole, and what could become a stop string."""
        needed = MAX_CHAR_BYTES * (2 + (0 if self._matcher is None else max(self._matcher.depth)))
        tail: list[int] = []
        for index in reversed(range(end)):
            if needed <= 0:
                break
            if piece := self._token_bytes(token_ids[index]):
                tail.append(token_ids[index])
                needed -= len(piece)
        return tail[::-1]

    def go_on_after(self, num_tokens: int, tail: Sequence[int]) -> None:
        """Stand where one that has seen so many tokens, of this `tail`, and found no stop string, stands; this one
        must be new."""
        min_tokens, self._min_tokens = self._min_tokens, sys.maxsize  # the tail may begin within a character
        self.push(tail)
        self._min_tokens, self.num_tokens = min_tokens, num_tokens

    def catch_up(self, token_ids: Sequence[int], end: int) -> None:
        """Go on after the first `end` tokens."""
        self.go_on_after(end, self.tail(token_ids, end))
