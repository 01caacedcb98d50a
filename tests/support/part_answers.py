"""Vocabularies, syntaxes and answers for tests of what reads the parts of an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

import msgspec
from hypothesis import strategies as st

from cierzo.engine.messages import Part
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.syntax import CALL_TAGS, LLAMA_CALL, MISTRAL, THINK_TAGS, Syntax

FIRST_PIECE = 1000  # ids below are bytes, and markers
IDS = {marker: 300 + place for place, marker in enumerate((*MISTRAL, *THINK_TAGS, *CALL_TAGS, LLAMA_CALL, "[IMG]"))}


def _syntax(tokens: dict[str, str], spelled: dict[str, str], **options: object) -> Syntax:
    call_marker = next(marker for marker, mark in (tokens | spelled).items() if mark == "call")
    ids = {IDS[marker]: mark for marker, mark in tokens.items()}
    return Syntax(ids, spelled, call_marker, **options)


SYNTAXES = {
    "mistral": _syntax(MISTRAL, {}, named_calls=True),
    "magistral": _syntax(
        {marker: mark for marker, mark in MISTRAL.items() if "THINK" not in marker}, THINK_TAGS, named_calls=True
    ),
    "tags": _syntax({}, THINK_TAGS | CALL_TAGS),
    "tag tokens": _syntax(THINK_TAGS | CALL_TAGS, {}),
    "llama": _syntax({LLAMA_CALL: "call", **THINK_TAGS}, {}, bare_calls=True),
}


@dataclass
class Pieces:
    """A vocabulary of bytes, markers, and whatever pieces an answer is made of."""

    pieces: list[bytes] = field(default_factory=list)
    strip_leading_space: bool = False

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= FIRST_PIECE:
            return self.pieces[token_id - FIRST_PIECE]
        return bytes([token_id]) if token_id < 256 else b""

    def add(self, piece: bytes) -> int:
        """The id of a new piece."""
        self.pieces.append(piece)
        return FIRST_PIECE + len(self.pieces) - 1


FRAGMENTS = (
    *(
        "a",
        "b ",
        " c",
        "\n",
        "€",
        "\U0001f30d",
        "<",
        "<thi",
        "nk>",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        ";",
        "\\",
        "/",
    ),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "\n<tool_call>\n", "\n</tool_call>\n"),
    *('{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "parameters": {}}', '[{"name": "f", "arguments": {'),
    *(
        '{"arguments": {"a": [1, {"b": "}\\""}]}, "name": "h", "id": "abcdefghi"}',
        '{"name": "f", ',
        '"arguments": ',
    ),
    *('"id": "123456789", ', '{"x": [true, null, -1.5e3, "\\u00e9"]}', '{"x": tru}', "01", '"name": "', "1.", "-"),
    *(' f {"x": 1}', "get_weather", "123456789", '"type": "function", ', '"parameters": {"y": "<think>"}', "null"),
)


@st.composite
def answers(draw: st.DrawFn, name: str) -> tuple[Pieces, list[int]]:
    """Tokens that are fragments of what this syntax has, cut anywhere."""
    syntax, vocabulary = SYNTAXES[name], Pieces()
    specials = st.sampled_from([*syntax.tokens, IDS["[IMG]"]])
    part = st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS), specials, st.binary(max_size=2))
    token_ids: list[int] = []
    pending = b""
    for item in [*draw(st.lists(part, max_size=14)), None]:
        if isinstance(item, str | bytes):
            pending += item.encode() if isinstance(item, str) else item
            continue
        token_ids += [vocabulary.add(piece) for piece in draw(_cut(pending))]
        pending = b""
        if item is not None:
            token_ids.append(item)
    return vocabulary, token_ids


@st.composite
def _cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Pieces of these bytes."""
    pieces = []
    while data:
        length = draw(st.integers(1, 8))
        pieces.append(data[:length])
        data = data[length:]
    return pieces


def random_answer(rng: Random, name: str) -> tuple[Pieces, list[int]]:
    """The same by chance, longer, and with damage in the fragments."""
    syntax, vocabulary = SYNTAXES[name], Pieces()
    token_ids: list[int] = []
    data = b""
    for _ in range(rng.randint(0, 20)):
        if rng.random() < 0.25:
            token_ids += _cut_by_chance(rng, vocabulary, data)
            token_ids.append(rng.choice([*syntax.tokens, IDS["[IMG]"]]))
            data = b""
            continue
        fragment = rng.choice(FRAGMENTS).encode()
        if rng.random() < 0.1:
            at = rng.randrange(len(fragment))
            damage = rng.choice((b"", bytes([rng.randrange(256)]), b'"', b"}", b"{", b"\\", b" "))
            fragment = fragment[:at] + damage + fragment[at + rng.randint(0, 1) :]
        data += fragment
    return vocabulary, token_ids + _cut_by_chance(rng, vocabulary, data)


def _cut_by_chance(rng: Random, vocabulary: Pieces, data: bytes) -> list[int]:
    """Tokens that these bytes are."""
    token_ids = []
    while data:
        length = rng.choice((1, 1, 2, 3, 8, 30))
        token_ids.append(vocabulary.add(data[:length]))
        data = data[length:]
    return token_ids


def read(reader: PartsReader, token_ids: list[int], lengths: list[int] | None = None) -> tuple[str, list[Part]]:
    """The text of these tokens, pushed so many at a time, and all pieces, those of text alone too."""
    text, pieces, start = "", [], 0
    for length in [*(lengths or []), len(token_ids)]:
        before = reader.num_tokens
        more = reader.push(token_ids[start : start + length])
        text += more
        pieces += reader.parts or [Part(kind="text", text=more, num_tokens=reader.num_tokens - before)]
        start += length
        if reader.stop is not None or start >= len(token_ids):
            break
    more = reader.flush()
    return text + more, [*pieces, *(reader.parts or [Part(kind="text", text=more)])]


def joined(pieces: Iterable[Part]) -> list[Part]:
    """The whole parts that all pieces of an answer make up, those of text too."""
    parts: list[Part] = []
    for piece in pieces:
        if not (piece.text or piece.num_tokens or piece.name or piece.id):
            continue
        if parts and (parts[-1].kind, parts[-1].call) == (piece.kind, piece.call):
            last = parts.pop()
            assert piece.name == "" == (last.id and piece.id)
            text, num_tokens = last.text + piece.text, last.num_tokens + piece.num_tokens
            piece = msgspec.structs.replace(last, text=text, id=last.id or piece.id, num_tokens=num_tokens)
        parts.append(piece)
    return parts
