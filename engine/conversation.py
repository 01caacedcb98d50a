"""Turns of a conversation, tools, the parts of an answer, and the base of messages, as they cross a socket;
`messages` has the rest."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages: an unknown field is an error, not a silence."""


class Piece(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Base of what a conversation is made of: an unknown field is an error, as in messages."""


class ToolCall(Piece, frozen=True):
    """A call that an assistant message of the history made. `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = ""


class TextChunk(Piece, frozen=True, tag="text"):
    """Part of a turn's content: text."""

    text: str


class ThinkingChunk(Piece, frozen=True, tag="thinking"):
    """Part of a turn's content: a thought. `closed` false: the answer goes on within it."""

    thinking: str
    closed: bool = True


class ImageChunk(Piece, frozen=True, tag="image", omit_defaults=True):
    """Part of a turn's content: an image (feature "images"). `url`: a data URL of its file; left out: the next of
    the request's `images`. `digest`: blake2b of the file, 16 bytes; of another file than came with it, it is
    refused."""

    url: str = ""
    digest: bytes = b""


Content = str | list[TextChunk | ThinkingChunk | ImageChunk]


class ChatMessage(Piece, frozen=True, omit_defaults=True):
    """A turn of a conversation. `role` is system, user, assistant or tool.

    `reasoning`: a thought that comes before the content. `name`: of a tool that gave a result. `prefix` (feature
    "parts"), of the last turn, an assistant's: the answer goes on with it.
    """

    role: str
    content: Content = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""
    name: str = ""
    prefix: bool = False


class Tool(Piece, frozen=True, omit_defaults=True):
    """A function that the model may call. `parameters`: JSON schema of its arguments; `strict` (feature
    "grammars"): they hold it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


class Grammar(Piece, frozen=True, omit_defaults=True):
    """A rule that an answer holds (feature "grammars"). `value`: the JSON text of the schema, the pattern, the
    texts to choose from, or the grammar in llguidance's dialect of Lark; nothing for "json_object"."""

    kind: GrammarKind
    value: str | list[str] = ""


PartKind = Literal["text", "thinking", "call"]


class Part(Piece, frozen=True, omit_defaults=True):
    """A piece of an output (feature "parts"): text, a thought, or a call of a tool.

    In deltas: pieces that follow each other and have the same `kind` (and `call`) are one part, `text` is what is
    new of it. In a final record: a whole part. Of a call, `text` is the JSON of its arguments, as it was generated,
    `call` its number in the sample, from 0; `name` comes with its first piece, and so does `id`, unless the model
    may write it behind the arguments: then with the last. `num_tokens`: tokens that it was made of, as far as that
    is certain; markers belong to what they open or close. Of all parts they are all.
    """

    kind: PartKind
    text: str = ""
    call: int = 0
    name: str = ""
    id: str = ""
    num_tokens: int = 0
