"""docs/http-fields.md, made of the tables that the gateway holds bodies against.

python tests/support/http_fields.py        writes it
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cierzo.engine.gateway import field_rows as rows
from cierzo.engine.gateway.fields import Row, Table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "http-fields.md"
HEAD = """# Fields of a request's body

What becomes of every field that the clients of OpenAI, Mistral and vLLM send, endpoint by endpoint. This page is
made of the tables that bodies are held against (`engine/gateway/field_rows.py`); tests hold it to them, and them to
the types of the installed clients.

- **served**: it does what it says. *as `x`*: it is the field `x` of `generate` or of its `sampling`, with the type,
  default and limits of [rpc.md](rpc.md), section 4.
- **passed over**: it changes no answer here, and may be said.
- **refused**: an error of status 400 that names it, unless it has one of the values that ask for nothing.

A field that is in no table is refused by name, with the nearest one that is; a lenient server passes it over, and
says so in the answer's headers. That does not hold for names by which other engines know adapters, beam search or
embeddings: those are always refused. `null` is the same as left out, in every place. A temperature
that is left out is 0.7, as in `generate`, and not 1.

**JSON.** A body is one JSON object in UTF-8. Refused, with the place: a name that an object has twice, `NaN` and
`Infinity`, numbers beyond a double, halves of surrogate pairs, a byte order mark, and more than 64 levels of lists
and objects. Token ids as names, as in `logit_bias`, are written as JSON writes integers.

**Errors** name fields as the body does, also where the engine found them: `max_completion_tokens`,
`tools[0].function.name`, `input[2].arguments`.
"""
RULE = ("| field | | |", "|---|---|---|")
SECTIONS: tuple[tuple[str, str, Table], ...] = (
    ("## /v1/chat/completions", "", rows.CHAT),
    ("### A message", "Of any role; which one may have what, rpc.md says in section 4.", rows.MESSAGE),
    ("### Parts of a content, by type", "", rows.PARTS),
    ("### A text part", "", rows.TEXT_PART),
    ("### A thinking part", "", rows.THOUGHT_PART),
    ("### An image part", "", rows.IMAGE_PART),
    ("### Calls of a message, by type", "", rows.CALLS),
    ("### A call", "", rows.CALL),
    ("### Tools, by type", "", rows.TOOLS),
    ("### A tool", "", rows.TOOL),
    ("### A choice of tools that is an object, by type", "", rows.CHOICES),
    ("### The choice of a function", "", rows.CHOICE),
    ("### Types of formats", "", rows.FORMATS),
    ("## /v1/completions", "", rows.COMPLETIONS),
    ("## /v1/fim/completions", "", rows.FIM),
    ("## /v1/responses", "", rows.RESPONSES),
    ("### Items, by type", "An item without a type is a message.", rows.ITEMS),
    ("### A message among the items", "", rows.ITEM_MESSAGE),
    ("### Parts of its content, by type", "", rows.RESPONSE_PARTS),
    ("### A text of the input", "", rows.INPUT_TEXT),
    ("### A text of an answer", "", rows.OUTPUT_TEXT),
    ("### An image of the input", "", rows.INPUT_IMAGE),
    ("### A function call", "", rows.ITEM_CALL),
    ("### Its output", "", rows.ITEM_RESULT),
    ("### A thought", "", rows.ITEM_REASONING),
    ("### Tools of a response, by type", "", rows.RESPONSE_TOOLS),
    ("### A tool of a response", "", rows.RESPONSE_TOOL),
    ("### A choice of its tools that is an object, by type", "", rows.RESPONSE_CHOICES),
    ("### The choice of a function of a response", "", rows.RESPONSE_CHOICE),
    ("## /tokenize", "Of messages and tools the fields are those of /v1/chat/completions.", rows.TOKENIZE),
    ("## /detokenize", "", rows.DETOKENIZE),
)


def page() -> str:
    """The whole page."""
    return HEAD + "".join(
        "\n".join(["", title, "", *([text, ""] if text else []), *RULE, *_lines(table), ""])
        for title, text, table in SECTIONS
    )


def _lines(table: Table, within: str = "") -> list[str]:
    lines = []
    for row in table.values():
        lines.append(f"| `{within}{row.name}` | {row.treatment} | {_said(row)} |")
        lines += _lines(row.inner, f"{within}{row.name}.") if row.inner else []
    return lines


def _said(row: Row) -> str:
    values = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in row.harmless)
    words = [f"as `{row.argument}`" if row.argument else "", row.note, f"taken: {values}" if values else ""]
    return "; ".join(word for word in words if word)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
