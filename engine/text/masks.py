"""Masks of a request, from what its client says to what the core is told: words become sequences of token ids.

A bad word is banned as its tokens spell it: alone, behind one space, and behind a line break, where a vocabulary
with a mark for spaces spells it otherwise. These are the token ids of the text without its leading spaces, of a
space and that text, and what a line break and the text have more than the break. Of each sequence the last token
may not be chosen where the answer ends in those before it. So the sequences are banned, and not the text: other
tokens that spell it, or a longer token that holds it, are not seen.
"""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import replace

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Generate, ModelInfo, SamplingParams, Submit, ThinkingBudget
from cierzo.engine.text.syntax import Syntax

MAX_SHOWN_IDS = 20


class Pieces(Protocol):
    """The part of a `Vocabulary` that is used."""

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        ...


def masked(
    submit: Submit,
    message: Generate,
    vocabulary: Pieces | None,
    syntax: Syntax | None,
    model: ModelInfo,
    *,
    in_thinking: bool,
) -> Submit:
    """The `Submit` of a message that `validate` has passed, with its masks, and without bad words as text.

    in_thinking: its prompt ends within a thought. Raises InvalidRequest for what contradicts itself or the model.
    """
    params = submit.sampling
    asks = params.bad_words or params.allowed_token_ids or params.max_thinking_tokens is not None
    if not asks and message.tool_choice != "none":
        return submit
    words = banned(message, vocabulary, syntax, model.vocab_size)
    budget = thinking_budget(params, syntax, in_thinking=in_thinking)
    if params.allowed_token_ids:
        _refuse_nothing_left(submit, words, budget, model)
    return replace(submit, sampling=replace(params, bad_words=()), banned_token_ids=words, thinking=budget)


def banned(message: Generate, vocabulary: Pieces | None, syntax: Syntax | None, vocab_size: int) -> list[list[int]]:
    """Sequences of tokens that an answer may not hold: its bad words, and with `tool_choice` "none" the marker of
    calls. Those with a token that the model does not have are left out. Raises InvalidRequest."""
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(message.sampling.bad_words):
        field = f"sampling.bad_words[{index}]"
        if vocabulary is None:
            what = "bad_words need a tokenizer; the served checkpoint has none"
            raise InvalidRequest(what, field=field, limit="left out", value=word)
        spelled = _spelled(vocabulary, word)
        if not all(spelled):
            what = f"{field} has no tokens: it cannot be banned"
            raise InvalidRequest(what, field=field, limit="a word that has tokens", value=word)
        found |= dict.fromkeys(spelled)
    if message.tool_choice == "none" and syntax is not None and syntax.call_open_id is not None:
        found[syntax.call_open_id,] = None
    return [[*word] for word in found if max(word) < vocab_size]


def _spelled(vocabulary: Pieces, word: str) -> list[tuple[int, ...]]:
    """The token ids of a word in the places where it may begin."""
    bare = word.lstrip(" ")
    texts = (bare, f" {bare}") if bare else (word,)
    spelled = [tuple(vocabulary.encode_piece(text)) for text in texts]
    line_break = vocabulary.encode_piece("\n")
    behind = vocabulary.encode_piece(f"\n{bare}")
    if len(behind) > len(line_break) and behind[: len(line_break)] == line_break:
        spelled.append(tuple(behind[len(line_break) :]))
    return spelled


def thinking_budget(params: SamplingParams, syntax: Syntax | None, *, in_thinking: bool) -> ThinkingBudget | None:
    """The budget of each thought of an answer. Raises InvalidRequest for a model that marks none by tokens."""
    if params.max_thinking_tokens is None:
        return None
    open_id = None if syntax is None else syntax.think_open_id
    close_id = None if syntax is None else syntax.think_close_id
    if open_id is None or close_id is None:
        raise InvalidRequest(
            "max_thinking_tokens needs a model that marks its thoughts by single tokens; the served one does not",
            field="sampling.max_thinking_tokens",
            limit="left out",
            value=params.max_thinking_tokens,
        )
    return ThinkingBudget(params.max_thinking_tokens, open_id, close_id, in_thinking)


def _refuse_nothing_left(
    submit: Submit, words: list[list[int]], budget: ThinkingBudget | None, model: ModelInfo
) -> None:
    """Refuse allowed tokens of which none could be chosen, or not the one that closes a thought."""
    params, field = submit.sampling, "sampling.allowed_token_ids"
    allowed = {*params.allowed_token_ids}
    if budget is not None and budget.close_id not in allowed:
        raise InvalidRequest(
            f"{field} with max_thinking_tokens must hold token {budget.close_id}, which closes a thought",
            field=field,
            limit=f"with {budget.close_id}",
            value=params.allowed_token_ids[:MAX_SHOWN_IDS],
        )
    left = allowed - {word[0] for word in words if len(word) == 1}
    if len(submit.output_token_ids) + 1 < params.min_tokens:
        left -= {*params.stop_token_ids, *(() if params.ignore_eos else model.eos_token_ids)}
    if not left:
        raise InvalidRequest(
            f"{field} leave no token to choose: each is banned, or ends the answer before min_tokens",
            field=field,
            limit="a token that may be chosen",
            value=len(allowed),
        )
