"""Forms of answers in bodies: a format or grammar that one holds, and a choice among its tools."""

from __future__ import annotations

from typing import Any

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import json_text, missing, must_be, one_of, shown
from cierzo.engine.gateway.field_rows import CHOICE, CHOICES, FORMATS, RESPONSE_CHOICE, RESPONSE_CHOICES
from cierzo.engine.gateway.fields import at
from cierzo.engine.gateway.reading import Body, text

# What a choice of tools says that is no name. "any" is what Mistral's interface calls "required".
WORDS = ("auto", "none", "required", "any")
# Fields of structured_outputs, of which one says what the answer holds, and the engine's kinds of grammars.
KINDS = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}


def read_grammar(read: Body) -> None:
    """Take over what a format or structured_outputs ask for. Raises InvalidRequest for both of them."""
    _text_format(read) if read.endpoint == "responses" else _response_format(read)
    if (asked := read.given.get("structured_outputs")) is None:
        return
    if "grammar" in read.arguments:
        other = "text.format" if read.endpoint == "responses" else "response_format"
        what = f"structured_outputs and {other} both say what the answer holds"
        raise InvalidRequest(what, field="structured_outputs", limit="one of them", value="both")
    _structured(read, asked, "structured_outputs")


def read_choice(read: Body) -> None:
    """Take over the choice of tools: a word, or the name of one."""
    if (choice := read.given.get("tool_choice")) is None:
        return
    if not isinstance(choice, dict):
        one_of("tool_choice", choice if isinstance(choice, str) else str(shown(choice)), WORDS)
        return
    if read.endpoint == "responses":
        read.sieve.kind(choice, RESPONSE_CHOICES, "tool_choice")
        place, found = "tool_choice", read.sieve.served(choice, RESPONSE_CHOICE, "tool_choice")
    else:
        read.sieve.kind(choice, CHOICES, "tool_choice", default="function")  # which Mistral's clients may leave out
        place, chosen = "tool_choice.function", read.sieve.served(choice, CHOICE, "tool_choice")
        if "function" not in chosen:
            raise missing(place)
        found = chosen["function"]
    field, name = at(place, "name"), text(place, found, "name")
    if name in WORDS:
        limit = f"a name other than {', '.join(WORDS)}, which are choices of their own"
        raise InvalidRequest(f"{field} is {name!r}, allowed: {limit}", field=field, limit=limit, value=name)
    read.arguments["tool_choice"], read.places["tool_choice"] = name, field


def _response_format(read: Body) -> None:
    if (asked := read.given.get("response_format")) is None:
        return
    place, kind = "response_format.json_schema", read.sieve.kind(asked, FORMATS, "response_format")
    schema = asked.get("json_schema")
    if schema is not None and kind != "json_schema":
        raise must_be(place, f"left out, unless response_format.type is json_schema, not {kind}", schema)
    if schema is None and kind == "json_schema":
        raise missing(place)
    _format(read, kind, schema or {}, "response_format.type", place)


def _text_format(read: Body) -> None:
    if (asked := read.given.get("text", {}).get("format")) is None:
        return
    place, kind = "text.format", read.sieve.kind(asked, FORMATS, "text.format")
    if "schema" in asked and kind != "json_schema":
        limit = f"left out, unless text.format.type is json_schema, not {kind}"
        raise must_be("text.format.schema", limit, asked["schema"])
    _format(read, kind, asked, "text.format.type", place)


def _format(read: Body, kind: str, fields: dict[str, Any], kind_at: str, place: str) -> None:
    """Take over a format of this kind. fields: of the object at `place`, which has the schema."""
    if kind == "json_object":
        _take(read, "json_object", None, kind_at)
    elif kind == "json_schema":
        field = at(place, "schema")
        if "schema" not in fields:
            raise missing(field)
        _take(read, "json_schema", _schema(fields["schema"], field), field)


def _structured(read: Body, fields: dict[str, Any], place: str) -> None:
    asked = [name for name in KINDS if name in fields]
    if fields.get("json_object") is False:  # as clients say it who fill in every field
        asked.remove("json_object")
    if len(asked) != 1:
        limit = f"one of {', '.join(KINDS)}"
        told = ", ".join(asked) or "none"
        raise InvalidRequest(f"{place} has {told}, allowed: {limit}", field=place, limit=limit, value=told)
    (name,) = asked
    value, field = fields[name], at(place, name)
    if name == "json_object":
        if value is not True:
            raise must_be(field, "true or false", value)
        value = None
    elif name == "json":
        value = value if isinstance(value, str) else _schema(value, field)
    elif name == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise must_be(field, "a list of texts", value)
    elif not isinstance(value, str):
        raise must_be(field, "a text", value)
    _take(read, KINDS[name], value, field)


def _take(read: Body, kind: str, value: Any, place: str) -> None:
    read.arguments["grammar"] = {"kind": kind} | ({} if value is None else {"value": value})
    read.places |= dict.fromkeys(("grammar", "grammar.kind", "grammar.value"), place)


def _schema(value: Any, place: str) -> str:
    if not isinstance(value, dict):
        raise must_be(place, "an object", value)
    return json_text(place, value)
