"""The markers that a model writes around its thoughts and its calls of tools, found out from its vocabulary and
chat template.

A marker is a token of its own, or spelled in the text. It is looked for as a token where the vocabulary has it as
one, because then the model was trained to write that token, and letters that look like it are text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
CALL_MARKS: tuple[Mark, ...] = ("call", "/call")
WITH_CALL_IDS = "v11"  # of Mistral's tokenizers, the one whose calls have ids behind a marker
SPELLED_THOUGHTS = "v11"  # of Mistral's tokenizers, the one whose reasoning models spell their think tags


class Syntax(msgspec.Struct, frozen=True, omit_defaults=True):
    """Markers of a model. tokens: those that are tokens, by id. spelled: those that are spelled out in the text,
    all with the same first character of ASCII.

    call_marker: the spelling of the one that opens calls. named_calls: behind it may stand a name and arguments;
    else JSON alone. call_ids: between them, behind a marker, an id. bare_calls: the JSON of a call at the beginning
    of an answer, or behind its thought, is a call.
    """

    tokens: dict[int, Mark] = {}
    spelled: dict[str, Mark] = {}
    call_marker: str = ""
    named_calls: bool = False
    call_ids: bool = False
    bare_calls: bool = False

    def without_calls(self, kept: Collection[int]) -> Syntax | None:
        """These markers but for those of calls that are not among the tokens `kept`; None if no marker is left."""
        tokens = {one: mark for one, mark in self.tokens.items() if one in kept or mark not in CALL_MARKS}
        left = msgspec.structs.replace(self.without_spelled_calls(), tokens=tokens)
        return left if left.tokens or left.spelled else None

    def without_spelled_calls(self) -> Syntax:
        """These markers but for those of calls that are no tokens: what looks like such a call is text."""
        spelled = {spelling: mark for spelling, mark in self.spelled.items() if mark not in CALL_MARKS}
        if len(spelled) == len(self.spelled) and not self.bare_calls:
            return self
        return msgspec.structs.replace(self, spelled=spelled, bare_calls=False)

    @property
    def marks_thinking(self) -> bool:
        """Whether thoughts have markers, of whatever kind."""
        return "think" in (*self.tokens.values(), *self.spelled.values())

    @property
    def marks_calls(self) -> bool:
        """Whether calls can be told from text."""
        return self.bare_calls or "call" in (*self.tokens.values(), *self.spelled.values())

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
    source = template_source or ""
    # Some markers are tokens that have a text: where a vocabulary knows them, it keeps them from users' texts too.
    ids: Mapping[str, int] = getattr(vocabulary, "control_ids", vocabulary.special_ids)
    marks = {spelling: mark for spelling, mark in MISTRAL.items() if spelling in ids}
    is_mistral = "[TOOL_CALLS]" in marks
    bare_calls = LLAMA_CALL in ids and '"parameters"' in source
    if bare_calls:
        marks[LLAMA_CALL] = "call"
    if "[THINK]" not in marks:
        by_default = tekken_version == SPELLED_THOUGHTS and template_source is None
        marks |= THINK_TAGS if by_default or _are_used(THINK_TAGS, source, ids) else {}
    if "call" not in marks.values():
        marks |= CALL_TAGS if _are_used(CALL_TAGS, source, ids) else {}
    if not marks:
        return None
    tokens = {ids[spelling]: mark for spelling, mark in marks.items() if spelling in ids}
    spelled = {spelling: mark for spelling, mark in marks.items() if spelling not in ids}
    call_marker = next((spelling for spelling, mark in marks.items() if mark == "call"), "")
    call_ids = "[CALL_ID]" in ids and tekken_version in (None, WITH_CALL_IDS)
    return Syntax(tokens, spelled, call_marker, is_mistral, call_ids, bare_calls and not spelled)


def _are_used(tags: Mapping[str, Mark], source: str, ids: Mapping[str, int]) -> bool:
    """Whether the template writes one of these tags, or all of them are tokens."""
    return any(tag in source for tag in tags) or all(tag in ids for tag in tags)
