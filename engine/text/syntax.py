"""The markers that a model writes around its thoughts and its calls of tools, found out from its vocabulary and
chat template.

A marker is a token of its own, or spelled in the text. It is looked for as a token where the vocabulary has it as
one, because then the model was trained to write that token, and letters that look like it are text.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cierzo.engine.text.vocabulary import Vocabulary

# Beginning and end of a thought; beginning and end of a call, or of a list of calls; in a call, what comes before
# its arguments, and before its id.
Mark = Literal["think", "/think", "call", "/call", "args", "id"]

MISTRAL: dict[str, Mark] = {
    "[THINK]": "think",
    "[/THINK]": "/think",
    "[TOOL_CALLS]": "call",
    "[ARGS]": "args",
    "[CALL_ID]": "id",
}
THINK_TAGS: dict[str, Mark] = {"<think>": "think", "</think>": "/think"}
CALL_TAGS: dict[str, Mark] = {"<tool_call>": "call", "</tool_call>": "/call"}
LLAMA_CALL = "<|python_tag|>"
SPELLED_THOUGHTS = "v11"  # of Mistral's tokenizers, the one whose reasoning models spell their think tags


class Syntax(msgspec.Struct, frozen=True, omit_defaults=True):
    """Markers of a model. tokens: those that are tokens, by id. spelled: those that are spelled out in the text,
    all with the same first character of ASCII.

    call_marker: the spelling of the one that opens calls. named_calls: behind it may stand a name and arguments;
    else JSON alone. bare_calls: an answer that is the JSON of a call from its first character on is a call.
    """

    tokens: dict[int, Mark] = {}
    spelled: dict[str, Mark] = {}
    call_marker: str = ""
    named_calls: bool = False
    bare_calls: bool = False

    @property
    def think_open_id(self) -> int | None:
        """The token that begins a thought."""
        return self._id("think")

    @property
    def think_close_id(self) -> int | None:
        """The token that ends a thought."""
        return self._id("/think")

    @property
    def call_open_id(self) -> int | None:
        """The token that opens a call, or a list of calls."""
        return self._id("call")

    def _id(self, mark: Mark) -> int | None:
        return next((token_id for token_id, known in self.tokens.items() if known == mark), None)


def syntax_of(vocabulary: Vocabulary, template_source: str | None, tekken_version: str | None) -> Syntax | None:
    """The markers of a model with this vocabulary; None if it marks nothing.

    template_source: its chat template, if it has one. tekken_version: of a Mistral tokenizer, such as "v13".
    """
    source, special_ids = template_source or "", vocabulary.special_ids
    marks: dict[str, Mark] = {spelling: mark for spelling, mark in MISTRAL.items() if spelling in special_ids}
    is_mistral = "[TOOL_CALLS]" in marks
    by_default = tekken_version == SPELLED_THOUGHTS and template_source is None
    bare_calls = LLAMA_CALL in special_ids and '"parameters"' in source
    if bare_calls:
        marks[LLAMA_CALL] = "call"
    if "[THINK]" not in marks:
        marks |= _tags(vocabulary, source, THINK_TAGS, by_default)
    if "call" not in marks.values():
        marks |= _tags(vocabulary, source, CALL_TAGS, False)
    if not marks:
        return None
    found = {spelling: _token(vocabulary, spelling) for spelling in marks}
    tokens = {token_id: marks[spelling] for spelling, token_id in found.items() if token_id is not None}
    spelled = {spelling: marks[spelling] for spelling, token_id in found.items() if token_id is None}
    call_marker = next((spelling for spelling, mark in marks.items() if mark == "call"), "")
    return Syntax(tokens, spelled, call_marker, is_mistral, bare_calls and not spelled)


def _tags(vocabulary: Vocabulary, source: str, tags: dict[str, Mark], by_default: bool) -> dict[str, Mark]:
    """The tags of a kind, if the template writes one of them, or all of them are tokens."""
    written = any(tag in source for tag in tags)
    is_known = written or by_default or all(_token(vocabulary, tag) is not None for tag in tags)
    return tags if is_known else {}


def _token(vocabulary: Vocabulary, spelling: str) -> int | None:
    """The one token that a marker is, if it is one: a control token, or an added one that has a text."""
    if spelling in vocabulary.special_ids:
        return vocabulary.special_ids[spelling]
    token_ids = vocabulary.encode_piece(spelling)
    return token_ids[0] if len(token_ids) == 1 else None
