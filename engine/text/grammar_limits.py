"""Limits of grammars: the same for the process that compiles one and for the core that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 256 * 1024  # of a request's schema, pattern, choices or grammar, or the schemas of its tools
MAX_NESTING = 100  # brackets within each other: parsers that call themselves have a stack
# What llguidance counts; by its documentation 14,000 units of fuel and 20,000 items of a step take a millisecond.
MAX_ITEMS_IN_ROW = 1_000
INITIAL_LEXER_FUEL = 1_000_000
STEP_LEXER_FUEL = 100_000
STEP_MAX_ITEMS = 20_000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SIZE = 10_000  # symbols: what follows a token may take as long as so many items in a row
COMPILE_STACK_BYTES = (
    128 * 1024 * 1024
)  # the compiler calls itself for each rule within a rule; less than the core has


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
