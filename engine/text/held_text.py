"""Rules for a text that a client asks for: a JSON text, a pattern, one of some texts, or a grammar of its own.

What the client has written stands in a rule as JSON, as strings or as a pattern, and cannot reach beyond its end; a
grammar of its own stands apart, under the name OF_CLIENT.
"""

from __future__ import annotations

import json
import re

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Grammar
from cierzo.engine.text.grammar_limits import MAX_GRAMMAR_BYTES, MAX_NESTING
from cierzo.engine.text.schema_checks import refuse_unheld

OF_CLIENT = "of_client"
ANY_OBJECT = '{"type":"object"}'
# Between the signs of a JSON text: one space, or a line break and what indents the next line. Without a limit, a
# model may write spaces for ever.
JSON_SPACE = r" |\r?\n[ \t]{0,64}"
OPTIONS_KEY = "x-guidance"  # of a schema, llguidance's own options: a request has no say in them
MAX_SHOWN_CHARS = 100
# A name that a schema does not list could be one that it lists, spelled with \u: it may not be spelled so.
JSON_ESCAPES = '"\\bfnrt'
_JSON_OPTIONS = json.dumps({"whitespace_pattern": JSON_SPACE, "json_allowed_escapes": JSON_ESCAPES})
# Of Lark: strings, patterns and comments, in which anything may stand; and what a grammar of a client may not have.
_LARK = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\\n])+/'
    r"|(?P<ours><|%llguidance\b|@)|(?P<open>[({\[])|(?P<close>[)}\]])"
)
_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|(?P<open>[{\[])|(?P<close>[}\]])')
_SPACES = dict.fromkeys(map(ord, "\t\n\r"), " ")  # which JSON has between its signs alone: a rule is one line
_decode_json = msgspec.json.Decoder().decode


def held_rules(grammar: Grammar) -> dict[str, str]:
    """Rules for the text that a client asks for, of which `held` is the first. Raises InvalidRequest."""
    value, field = grammar.value, "grammar.value"
    if grammar.kind == "choice":
        return _choice(value, field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} of {grammar.kind} is one text", field=field, limit="string", value="a list")
    _refuse_long(field, len(value.encode()))
    match grammar.kind:
        case "json_schema":
            return {"held": json_rule(value, field)}
        case "regex":
            return _pattern(value, field)
        case "lark":
            _refuse_strange(value, field)
            return {"held": f"@{OF_CLIENT}"}
    if value:
        what = "grammar.value says what a json_object is: that is for json_schema"
        raise InvalidRequest(what, field=field, limit="left out", value=value[:MAX_SHOWN_CHARS])
    return {"held": json_rule(ANY_OBJECT, field)}


def json_rule(schema: str, field: str) -> str:
    """The right side of a rule for a JSON text that holds a schema, which is JSON text itself. Raises
    InvalidRequest for what is none; whether llguidance takes it, only its compiler can tell."""
    if _nesting(_BRACKETS, schema) > MAX_NESTING:
        raise _too_nested(field)
    try:
        decoded = _decode_json(schema)
    except (msgspec.DecodeError, UnicodeError) as error:
        what = f"{field} is no JSON: {str(error)[:MAX_SHOWN_CHARS]}"
        raise InvalidRequest(what, field=field, limit="a JSON schema", value=schema[:MAX_SHOWN_CHARS]) from error
    if decoded is True:
        schema, decoded = "{}", {}
    if decoded is False or not isinstance(decoded, dict):
        what = f"{field} is no schema that a text could hold"
        raise InvalidRequest(what, field=field, limit="a JSON schema", value=schema[:MAX_SHOWN_CHARS])
    if OPTIONS_KEY in decoded:
        what = f"{field} has {OPTIONS_KEY}: a schema cannot set the options of its compiler"
        raise InvalidRequest(what, field=field, limit=f"without {OPTIONS_KEY}", value=OPTIONS_KEY)
    refuse_unheld(decoded, field)
    inner = schema.translate(_SPACES).strip()[1:]
    return f'%json {{"{OPTIONS_KEY}":{_JSON_OPTIONS}{"," if decoded else ""}{inner}'


def quoted(text: str) -> str:
    """A text as Lark writes it: in ASCII, as its strings have no control characters."""
    return json.dumps(text)


def _choice(value: str | list[str], field: str) -> dict[str, str]:
    if not isinstance(value, list) or not value or not all(value):
        limit = "a list of texts, none of them empty"
        told = "a text" if isinstance(value, str) else "an empty one" if value else "an empty list"
        raise InvalidRequest(f"{field} must be {limit}", field=field, limit=limit, value=told)
    _refuse_long(field, sum(len(text.encode()) for text in value))
    return {"held": "HELD", "HELD": " | ".join(map(quoted, value))}


def _pattern(value: str, field: str) -> dict[str, str]:
    from llguidance import regex_to_lark

    if (len(value) - len(value.rstrip("\\"))) % 2:
        what = f"{field} ends in a backslash that escapes nothing"
        raise InvalidRequest(what, field=field, limit="a pattern", value=value[-MAX_SHOWN_CHARS:])
    if not value:
        what = f"{field} is empty: no text but the empty one matches it"
        raise InvalidRequest(what, field=field, limit="a pattern", value="")
    return {"held": "HELD", "HELD": f"/{regex_to_lark(value, 'dws')}/"}


def _refuse_strange(value: str, field: str) -> None:
    """Refuse a client's grammar that names control tokens, the grammars around it, or options of the compiler."""
    found = next((match for match in _LARK.finditer(value) if match["ours"]), None)
    if found is not None:
        what = f"{field} has {found[0]} outside of strings: a grammar is about text alone"
        limit = "without tokens by name or id, %llguidance and @"
        raise InvalidRequest(what, field=field, limit=limit, value=value[found.start() :][:MAX_SHOWN_CHARS])
    if _nesting(_LARK, value) > MAX_NESTING:
        raise _too_nested(field)


def _nesting(pattern: re.Pattern[str], text: str) -> int:
    """The deepest place of a text, by its brackets outside of strings."""
    depth = deepest = 0
    for match in pattern.finditer(text):
        if match["open"]:
            depth += 1
            deepest = max(depth, deepest)
        elif match["close"]:
            depth -= 1
    return deepest


def _too_nested(field: str) -> InvalidRequest:
    what = f"{field} has more than {MAX_NESTING} brackets within each other"
    return InvalidRequest(what, field=field, limit=f"{MAX_NESTING} within each other", value="more")


def _refuse_long(field: str, num_bytes: int) -> None:
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise too_long(field, num_bytes)


def too_long(field: str, num_bytes: int) -> InvalidRequest:
    """The refusal of a grammar by its length."""
    what = f"{field} has {num_bytes} bytes, allowed: {MAX_GRAMMAR_BYTES}"
    return InvalidRequest(what, field=field, limit=f"{MAX_GRAMMAR_BYTES} bytes", value=num_bytes)
