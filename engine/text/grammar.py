"""Grammars of whole answers: what a client asks for, inside of what the model writes around it.

An answer is a thought, where the model may think, and then its body: text that is held to the client's grammar,
calls of the tools that the request lists, or text and calls. All of that is one grammar in llguidance's dialect of
Lark. Control tokens stand in it by their ids, so that no text spells one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.messages import Generate, ModelInfo, Vocabulary
from cierzo.engine.text.call_rules import SPACE, Rules, call_bodies, marker
from cierzo.engine.text.grammar_limits import MAX_GRAMMAR_BYTES
from cierzo.engine.text.held_text import OF_CLIENT, held_rules, too_long
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import Syntax
from cierzo.engine.text.token_table import token_table

FREE_CHOICES = ("auto", "none")  # of tools: no call must come
# All spellings of a text are alike: none is forced on the model, and a mask holds whatever may come.
OPTIONS = '%llguidance {"no_forcing": true}'
JSON_KINDS = ("json_object", "json_schema")


def must_call(message: Generate) -> bool:
    """Whether the answer to a message is calls alone."""
    return message.tool_choice not in FREE_CHOICES


def asks_for_grammar(message: Generate) -> bool:
    """Whether a message holds its answer to something."""
    if message.grammar is not None or must_call(message):
        return True
    return message.tool_choice == "auto" and any(tool.strict for tool in message.tools)


def vocabulary_of(prompts: PromptEncoder, model: ModelInfo) -> Vocabulary | None:
    """The vocabulary that grammars of a served model are about; None if it can have none, for lack of a tokenizer
    or of a token that ends an answer."""
    if prompts.tokenizer is None or not model.eos_token_ids:
        return None
    return token_table(prompts.tokenizer, model.vocab_size, tuple(model.eos_token_ids))


def writer_of(prompts: PromptEncoder, model: ModelInfo) -> GrammarWriter | None:
    """Writer of the grammars of a served model; None if it can have none."""
    table = vocabulary_of(prompts, model)
    thinks_unasked = prompts.template is None or prompts.template.thinks_unasked
    return None if table is None else GrammarWriter(table, prompts.syntax, thinks_unasked=thinks_unasked)


def grammar_of(
    writer: GrammarWriter | None, message: Generate, *, in_thinking: bool, one_call: bool, apart: bool
) -> str:
    """The grammar of the answer to a message; "" where it may be anything. The rest is as in `GrammarWriter.write`.
    Raises InvalidRequest."""
    if not asks_for_grammar(message):
        return ""
    if writer is None:
        what = "grammars need a tokenizer with a token that ends an answer; the served checkpoint has none"
        raise InvalidRequest(what, field=grammar_field(message), limit="left out", value="given")
    return writer.write(message, in_thinking=in_thinking, one_call=one_call, apart=apart)


def grammar_field(message: Generate) -> str:
    """The field that a message's grammar comes from, for whoever refuses it."""
    return "tools" if message.grammar is None or must_call(message) else "grammar"


def about(field: str | None, error: CierzoError) -> CierzoError:
    """A refusal of a grammar again, as one of this field."""
    return type(error)(
        error.message,
        field=error.field or field,
        limit=error.limit,
        value=error.value,
        retry_after_s=error.retry_after_s,
    )


class GrammarWriter:
    """Writes the grammars of answers of one model."""

    def __init__(self, table: Vocabulary, syntax: Syntax | None, *, thinks_unasked: bool = True) -> None:
        """thinks_unasked: the model may think where no effort is said."""
        self._syntax = syntax
        self._thinks_unasked = thinks_unasked
        silent = {token_id for token_id, token in enumerate(table.tokens) if not token}
        self._text_token = f"<[^{_ranges(silent.union(table.control_ids, table.eos_token_ids))}]>"

    def write(self, message: Generate, *, in_thinking: bool, one_call: bool, apart: bool) -> str:
        """The grammar of an answer that is held to something. Raises InvalidRequest.

        in_thinking: the prompt ends within a thought. one_call: the answer holds no second call. apart: its reader
        tells thoughts from text.
        """
        held = None if must_call(message) else message.grammar
        rules: Rules = {"text_token": self._text_token}
        may_think = self._may_think(message, apart=apart)
        spaced = held is None or held.kind in JSON_KINDS
        thought = self._thought(rules, in_thinking=in_thinking, may_think=may_think, spaced=spaced)
        bodies = []
        if held is not None:
            rules |= held_rules(held)
            bodies.append("held")
        if message.tools and message.tool_choice != "none":
            bodies += self._calls(
                message, rules, one_call=one_call, with_text=held is None and not must_call(message)
            )
        rules["start"] = f"{thought} body".strip()
        rules["body"] = " | ".join(bodies)
        text = "\n".join((OPTIONS, *(f"{name}: {rule}" for name, rule in rules.items())))
        if held is not None and held.kind == "lark":
            text = json.dumps(
                {"grammars": [{"lark_grammar": text}, {"name": OF_CLIENT, "lark_grammar": held.value}]}
            )
        if len(text) > 2 * MAX_GRAMMAR_BYTES:
            raise too_long("tools", len(text))
        return text

    def _may_think(self, message: Generate, *, apart: bool) -> bool:
        """Whether an answer may begin with a thought: in a conversation, where its effort lets the model think.
        Where thoughts would be read as text, only if an effort is said."""
        if message.messages is None:
            return False
        if message.reasoning_effort is None:
            return apart and self._thinks_unasked
        return message.reasoning_effort != "none"

    def _thought(self, rules: Rules, *, in_thinking: bool, may_think: bool, spaced: bool) -> str:
        """Part of an answer before its body: a thought, none, or either as the model likes. spaced: a body of that
        kind may begin with spaces, which models write behind a tag."""
        syntax = self._syntax
        if syntax is None or not syntax.marks_thinking or not (in_thinking or may_think):
            return ""
        begin, end = marker(syntax, "think"), marker(syntax, "/think")
        if syntax.think_close_id is None:
            rules["thought_rest[lazy]"] = f"/(?s:.*)/ {end}"
        else:
            rules["thought_rest"] = f"text_token* {end}"
        behind = ""
        if spaced and not (syntax.named_calls and syntax.think_close_id is not None):
            rules |= SPACE
            behind = " space"
        if in_thinking:
            return f"thought_rest{behind}"
        return f"({begin} thought_rest{behind})?"

    def _calls(self, message: Generate, rules: Rules, *, one_call: bool, with_text: bool) -> list[str]:
        """Bodies that hold calls. Raises InvalidRequest where the model marks none."""
        choice, syntax = message.tool_choice, self._syntax
        if syntax is None or not syntax.marks_calls:
            if message.grammar is not None and not must_call(message):
                return []
            what = "the served model marks no calls, so that none can be made sure of"
            field = "tool_choice" if must_call(message) else "tools.strict"
            raise InvalidRequest(what, field=field, limit="left out", value=choice)
        is_name = must_call(message) and choice != "required"
        tools = [(number, tool) for number, tool in enumerate(message.tools) if tool.name == choice or not is_name]
        return call_bodies(syntax, tools, rules, one_call=one_call or is_name, with_text=with_text)


def _ranges(token_ids: Iterable[int]) -> str:
    """Token ids as llguidance writes them: "0-9,12"."""
    ranges: list[list[int]] = []
    for token_id in sorted(token_ids):
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ranges)
