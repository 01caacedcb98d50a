"""The compiler of grammars: whether the core could follow one, up to its first mask."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, partial

from llguidance import LLMatcher

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.messages import Generate, ModelInfo, Vocabulary
from cierzo.engine.text.call_rules import ARGUMENTS
from cierzo.engine.text.grammar import (
    OPTIONS,
    GrammarWriter,
    about,
    asks_for_grammar,
    grammar_field,
    grammar_of,
    vocabulary_of,
    writer_of,
)
from cierzo.engine.text.grammar_limits import (
    COMPILE_STACK_BYTES,
    INITIAL_LEXER_FUEL,
    MAX_GRAMMAR_SIZE,
    MAX_ITEMS_IN_ROW,
    MAX_LEXER_STATES,
    STEP_LEXER_FUEL,
    STEP_MAX_ITEMS,
    parser_limits,
)
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.token_table import grammar_tokenizer

MAX_REASON_CHARS = 300
_OF_SCHEMA = "failed to compile JSON schema: "
_OF_PATTERN = "regex parse error:"
_ONE_OF = "oneOf constraints are not supported"  # llguidance goes on with an option that no request can set
_QUOTED = re.compile('"[^"]*"')
_AT_LINE = re.compile(r"^(?:at )?\d+\(\d+\): ")
_stack_size = threading.Lock()  # of threads to come: a setting of the whole process
UNHELD = "no answer can hold the grammar"
# The limit that a message of llguidance speaks of, by words that are in it.
_LIMITS = {
    "grammar size": f"{MAX_GRAMMAR_SIZE} symbols",
    "schema too large": "smaller",
    "initial lexer configuration": f"{INITIAL_LEXER_FUEL} units of work",
    "Current row has": f"{MAX_ITEMS_IN_ROW} items in a row",
    "too many states": f"{MAX_LEXER_STATES} states",
    "fuel": f"{STEP_LEXER_FUEL} units of work",
    "items": f"{STEP_MAX_ITEMS} items",
}


class CheckedGrammars:
    """Grammars of the answers to messages of one model, for a caller without a front end. Messages that come one
    after another mostly share their grammar: the last one is not compiled again."""

    def __init__(self, prompts: PromptEncoder, model: ModelInfo) -> None:
        self._prompts, self._model = prompts, model
        self._checked = ""

    @cached_property
    def _writer(self) -> GrammarWriter | None:
        """Made with the first grammar: the bytes of all tokens take half a second to find."""
        return writer_of(self._prompts, self._model)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        table = vocabulary_of(self._prompts, self._model)
        assert table is not None, "a grammar was written without a vocabulary"
        return GrammarCompiler(table)

    def of(self, message: Generate, *, in_thinking: bool) -> str:
        """The grammar of the answer to a message, which was compiled; "" where it may be anything. Raises
        InvalidRequest."""
        if not asks_for_grammar(message):
            return ""
        one_call = self._prompts.call_limit(message) == "one"
        grammar = grammar_of(self._writer, message, in_thinking=in_thinking, one_call=one_call, apart=True)
        if grammar != self._checked:
            try:
                on_deep_stack(partial(self._compiler.check, grammar))
            except CierzoError as error:
                raise about(grammar_field(message), error) from error
            self._checked = grammar
        return grammar


class GrammarCompiler:
    """Compiles grammars of one vocabulary. Making one takes as long as `grammar_tokenizer`."""

    def __init__(self, table: Vocabulary) -> None:
        self._tokenizer = grammar_tokenizer(table)
        self._limits = parser_limits()

    def check(self, grammar: str) -> None:
        """Compile a grammar and make its first mask: for a caller who is called by `on_deep_stack`. Raises
        InvalidRequest, with a field where that can be told, where it is none, or passes a limit, or no answer can
        hold it; CierzoError where llguidance itself fails.

        What clients have written is compiled alone, too: that none of it can be held might show behind a thought.
        """
        for field, part in _parts(grammar):
            self._check(part, field)
        self._check(grammar, None)

    def _check(self, grammar: str, field: str | None) -> None:
        try:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            error = matcher.get_error()
            mask = b"" if error else matcher.compute_bitmask()
            error = error or matcher.get_error()
        except Exception as raised:
            raise _failure(raised) from raised
        except BaseException as raised:  # how a panic of Rust arrives
            if isinstance(raised, KeyboardInterrupt | SystemExit):
                raise
            raise _failure(raised) from raised
        if error:
            raise _refusal(error, field)
        if not any(mask):
            raise InvalidRequest(UNHELD, field=field, limit="satisfiable", value="no token may begin it")


def _parts(grammar: str) -> Iterator[tuple[str, str]]:
    """The parts of a grammar that clients have written, each a grammar of its own, by their fields."""
    if grammar.startswith("{"):
        ours, theirs = (each["lark_grammar"] for each in json.loads(grammar)["grammars"])
        yield "grammar.value", f"{OPTIONS}\n{theirs}"
    else:
        ours = grammar
    rules = dict(line.partition(": ")[::2] for line in ours.split("\n"))
    for name, rule in rules.items():
        if name.startswith(ARGUMENTS):
            yield f"tools[{name.removeprefix(ARGUMENTS)}].parameters", f"{OPTIONS}\nstart: {rule}"
        elif name == "held" and ours is grammar:
            terminal = f"\nHELD: {rules['HELD']}" if rule == "HELD" else ""
            yield "grammar.value", f"{OPTIONS}\nstart: {rule}{terminal}"


def on_deep_stack(call: Callable[[], None]) -> None:
    """Call in a thread whose stack is deep enough to compile any grammar of a size that is allowed."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    with _stack_size:
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammars")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if raised:
        raise raised[0]


def _refusal(error: str, field: str | None) -> InvalidRequest:
    """The error for what llguidance says. Its first line has the reason, others show the grammar; but of a pattern
    another one says what is wrong."""
    reason, _, rest = error.partition("\n")
    reason = _AT_LINE.sub("", reason).removeprefix(_OF_SCHEMA)
    if reason.endswith(_OF_PATTERN) and (detail := re.search("^error: (.*)$", rest, re.MULTILINE)) is not None:
        reason = f"{reason} {detail[1]}"
    if reason.startswith(_ONE_OF):
        reason = f"{_ONE_OF}, unless by their types or constants no value fits two branches"
    told = reason[:MAX_REASON_CHARS]
    if reason.startswith("NoExtension"):
        return InvalidRequest(UNHELD, field=field, limit="satisfiable", value=told)
    own = _QUOTED.sub("", reason)  # names of the grammar's own may be words of limits too
    limit = next((limit for words, limit in _LIMITS.items() if words in own), "what llguidance takes")
    return InvalidRequest(f"the grammar is refused: {told}", field=field, limit=limit, value=told)


def _failure(raised: BaseException) -> CierzoError:
    return CierzoError(
        f"internal error: the grammar's compiler failed: {type(raised).__name__}: {str(raised)[:200]}"
    )
