"""A vocabulary of forty tokens for grammars, and what a grammar says of an output, asked anew for each."""

from __future__ import annotations

from functools import cache

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from cierzo.engine.messages import Vocabulary
from cierzo.engine.text.token_table import grammar_tokenizer

VOCAB, CONTROL, EOS = 40, 38, 39
TOKENS = [
    *(bytes([97 + index]) for index in range(26)),
    *(b"%d" % digit for digit in range(10)),
    b'"',
    b"ab",
    b"",
    b"",
]
VOCABULARY = Vocabulary(tokens=TOKENS, control_ids=[CONTROL], eos_token_ids=[EOS])
FREE = '%llguidance {"no_forcing": true}\n'  # any spelling of a text in tokens will do


def spelled(token_ids: list[int]) -> str:
    """The text of tokens."""
    return b"".join(TOKENS[token_id] for token_id in token_ids).decode()


@cache
def _tokenizer() -> LLTokenizer:
    return grammar_tokenizer(VOCABULARY)


@cache
def _says(grammar: str, output: tuple[int, ...]) -> tuple[frozenset[int], bool, bool]:
    matcher = LLMatcher(_tokenizer(), grammar, log_level=0)
    if not matcher.consume_tokens([*output]):
        return frozenset(), False, False
    if matcher.is_stopped():
        return frozenset(), True, True
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    held = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    return frozenset(held.tolist()), False, matcher.is_accepting()


def permits(grammar: str, output: list[int]) -> frozenset[int]:
    """Tokens that may stand behind an output."""
    return _says(grammar, (*output,))[0]


def has_ended(grammar: str, output: list[int]) -> bool:
    """Whether nothing may stand behind an output, which is whole."""
    return _says(grammar, (*output,))[1]


def may_end(grammar: str, output: list[int]) -> bool:
    """Whether an output is whole."""
    return _says(grammar, (*output,))[2]
