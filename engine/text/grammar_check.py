"""The compiler of grammars: whether the core could follow one, up to its first mask."""

from __future__ import annotations

import re

import numpy as np
from llguidance import LLMatcher

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.messages import Vocabulary
from cierzo.engine.text.call_rules import ARGUMENTS
from cierzo.engine.text.grammar_limits import (
    INITIAL_LEXER_FUEL,
    MAX_GRAMMAR_SIZE,
    MAX_ITEMS_IN_ROW,
    MAX_LEXER_STATES,
    STEP_LEXER_FUEL,
    STEP_MAX_ITEMS,
    parser_limits,
)
from cierzo.engine.text.token_table import grammar_tokenizer

MAX_REASON_CHARS = 300
_OF_SCHEMA = "failed to compile JSON schema: "
_AT_LINE = re.compile(r"(?:at )?(\d+)\(\d+\): ")
# The limit that a message of llguidance speaks of, by words that are in it.
_LIMITS = {
    "grammar size": f"{MAX_GRAMMAR_SIZE} symbols",
    "schema too large": "smaller",
    "initial lexer configuration": f"{INITIAL_LEXER_FUEL} units of work",
    "Current row has": f"{MAX_ITEMS_IN_ROW} items in a row",
    "lexer states": f"{MAX_LEXER_STATES} states",
    "fuel": f"{STEP_LEXER_FUEL} units of work",
    "items": f"{STEP_MAX_ITEMS} items",
}


class GrammarCompiler:
    """Compiles grammars of one vocabulary. Making one takes as long as `grammar_tokenizer`."""

    def __init__(self, table: Vocabulary) -> None:
        self._tokenizer = grammar_tokenizer(table)
        self._limits = parser_limits()

    def check(self, grammar: str) -> None:
        """Compile a grammar and make its first mask. Raises InvalidRequest, with a field where that can be told,
        where it is none, or passes a limit, or no answer can hold it; CierzoError where llguidance itself fails."""
        try:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            error = matcher.get_error()
            mask = b"" if error else matcher.compute_bitmask()
            error = error or matcher.get_error()
        except Exception as raised:
            raise CierzoError(f"internal error: the grammar's compiler failed: {_told(raised)}") from raised
        except BaseException as raised:  # how a panic of Rust arrives
            if isinstance(raised, KeyboardInterrupt | SystemExit):
                raise
            raise CierzoError(f"internal error: the grammar's compiler failed: {_told(raised)}") from raised
        if error:
            raise _refusal(error, grammar)
        if not np.frombuffer(mask, np.uint8).any():
            raise InvalidRequest("no answer can hold the grammar: no token may begin it", limit="satisfiable")


def _refusal(error: str, grammar: str) -> InvalidRequest:
    """The error for what llguidance says; its first line has the reason, others show the grammar."""
    reason, field = error.partition("\n")[0], None
    if (place := _AT_LINE.match(reason)) is not None:
        reason, field = reason[place.end() :], _field_of(grammar, int(place[1]))
    told = reason.removeprefix(_OF_SCHEMA)[:MAX_REASON_CHARS]
    if reason.startswith("NoExtension"):
        return InvalidRequest("no answer can hold the grammar", field=field, limit="satisfiable", value=told)
    limit = next((limit for words, limit in _LIMITS.items() if words in error), "what llguidance takes")
    return InvalidRequest(f"the grammar is refused: {told}", field=field, limit=limit, value=told)


def _field_of(grammar: str, line: int) -> str | None:
    """The field that a line of a grammar is from; None for one that the house has written."""
    lines = grammar.splitlines()
    rule = lines[line - 1].partition(":")[0] if line <= len(lines) else ""
    if rule.startswith(ARGUMENTS):
        return f"tools[{rule.removeprefix(ARGUMENTS)}].parameters"
    return "grammar.value" if grammar.startswith("{") or rule.lower() == "held" else None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:MAX_REASON_CHARS]}"
