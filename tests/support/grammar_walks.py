"""Texts at random that a grammar allows, token by token; and what a mask must be, found out without a mask."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np
import regex
from llguidance import LLMatcher, LLTokenizer

from cierzo.engine.messages import Generate, Grammar, Vocabulary
from cierzo.engine.text.grammar import GrammarWriter
from cierzo.engine.text.grammar_limits import parser_limits
from cierzo.engine.text.token_table import grammar_tokenizer

END, OTHER_END, CONTROL = 256, 257, 258
# Tokens of several bytes, as vocabularies have them: across the borders of words, of characters and of numbers.
PIECES = (
    *('{"', '":', '": ', '", "', '"}', '":"', "[]", "{}", "]}", '["', "}, {", ": [", "true", "false", "null", "tr"),
    *(" ", "  ", "\n  ", ", ", "00", "12", "123", "2024", "-0", "1.", ".5", "e1", "the", "ab", "abc", "foo", "re"),
    *("red", "\\n", "\\u", '\\"', "ñ", "ü", "日", "😀", "name", '"name', "größe", "bar", "a]b"),
)


def small_vocabulary() -> Vocabulary:
    """All bytes, two ends, a control token, and pieces: every text can be spelled, most in several ways."""
    halves = [b"\xc3", b"\x9f\x98", b"\xb1\x22"]  # of characters, and beyond one
    pieces = [*dict.fromkeys(piece.encode() for piece in PIECES if len(piece.encode()) > 1), *halves[1:]]
    tokens = [bytes([byte]) for byte in range(256)] + [b"", b"", b""] + pieces
    return Vocabulary(tokens=tokens, control_ids=[CONTROL], eos_token_ids=[END, OTHER_END])


class Walker:
    """Follows grammars over a small vocabulary."""

    def __init__(self, table: Vocabulary | None = None) -> None:
        self.table = table or small_vocabulary()
        self.tokenizer: LLTokenizer = grammar_tokenizer(self.table)
        # Spaces between JSON's words, and more digits, lead nowhere: whoever walks at random is to come to an end.
        self._weights = np.array([_weight(token) for token in self.table.tokens])
        self._ends = np.array([_closes(token) for token in self.table.tokens])

    def matcher(self, grammar: str) -> LLMatcher:
        """The matcher of a grammar's text. Raises ValueError where it has none."""
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def mask(self, matcher: LLMatcher) -> np.ndarray:
        """Whether each token may come next."""
        words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(words, bitorder="little")[: len(self.table.tokens)].astype(bool)

    def walk(self, grammar: str, random: Random, max_tokens: int = 300) -> tuple[bytes, bool]:
        """A text that the grammar allows, and whether it is whole: token by token any that the mask has."""
        token_ids, is_whole = self.walk_tokens(grammar, random, max_tokens)
        return b"".join(self.table.tokens[token_id] for token_id in token_ids), is_whole

    def walk_tokens(self, grammar: str, random: Random, max_tokens: int = 300) -> tuple[list[int], bool]:
        """The same, its tokens, without the one that ends it."""
        matcher, written = self.matcher(grammar), list[int]()
        generator = np.random.default_rng(random.getrandbits(32))
        for number in range(max_tokens):
            if matcher.is_stopped():
                break
            weights = self._weights * self.mask(matcher)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            weights = weights * np.where(self._ends, 1 + number / 4, 1)
            assert weights.any(), (grammar, written)
            token_id = int(generator.choice(len(weights), p=weights / weights.sum()))
            if token_id in self.table.eos_token_ids:
                assert matcher.is_accepting()
                return written, True
            assert matcher.consume_token(token_id), matcher.get_error()
            written.append(token_id)
        return written, matcher.is_accepting()

    def brute_force(self, language: Language, before: bytes) -> np.ndarray:
        """The same mask behind `before`, of each token asked alone."""
        found = [bool(token) and language.may_begin(before + token) for token in self.table.tokens]
        for token_id in self.table.eos_token_ids:
            found[token_id] = language.holds(before)
        return np.array(found)

    def written(self, kind: str, value: Any = "", **fields: Any) -> str:
        """The text of the grammar of an answer to a text."""
        asked = Generate(stream=0, text="", grammar=Grammar(kind=kind, value=value), **fields)
        return GrammarWriter(self.table, None).write(asked, in_thinking=False, one_call=False, apart=False)


class Language:
    """A set of texts, by a pattern of bytes: another library's idea of it, which says too what may begin one."""

    def __init__(self, pattern: bytes) -> None:
        self._fullmatch = regex.compile(pattern).fullmatch

    @functools.cache  # noqa: B019
    def may_begin(self, text: bytes) -> bool:
        """Whether some text of it begins so."""
        return self._fullmatch(text, partial=True) is not None

    def holds(self, text: bytes) -> bool:
        """Whether it has this text."""
        return self._fullmatch(text) is not None


def language_of(*texts: str) -> Language:
    """These texts and no others."""
    return Language(b"|".join(regex.escape(text.encode()) for text in texts))


def documents(*values: list[str]) -> Language:
    """JSON texts, each given sign by sign, with the spaces between them that grammars allow."""
    space = b"(?: |\\r?\\n[ \\t]{0,64})?"
    return Language(b"|".join(space.join(regex.escape(sign.encode()) for sign in signs) for signs in values))


def _weight(token: bytes) -> float:
    if not token.strip():
        return 0.02 if token else 1.0
    return 0.3 if token.isdigit() else 1.0


def _closes(token: bytes) -> bool:
    return not token or token[-1:] in b'"]}'
