"""Limits of grammars: the same for the process that compiles one and for the core that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 256 * 1024  # of a schema, pattern or grammar as it comes
MAX_COMPILE_S = 2.0  # until the first mask: the process that takes longer is killed
# What llguidance counts; its documentation has the speeds: a step of 20 ms at the most.
MAX_ITEMS_IN_ROW = 1_000
INITIAL_LEXER_FUEL = 1_000_000
STEP_LEXER_FUEL = 100_000
STEP_MAX_ITEMS = 20_000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SIZE = 20_000  # symbols


def parser_limits() -> LLParserLimits:
    """The limits as llguidance takes them."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        verbose_errors=False,
    )
