"""Keywords of JSON schemas that llguidance 1.9.1 takes, and does not hold: they are refused, so that what a schema
says is so. What it knows and cannot hold, it refuses itself; tests/engine/text/test_schema_checks.py has each case.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from cierzo.engine.errors import InvalidRequest

# Where a schema has others within it: in maps by name, in lists, and alone.
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
ALONE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
)
MAX_CLASSES = 100  # of characters, in all patterns of a schema: each takes a tenth of a millisecond to look at
_CONTROLS = [chr(code) for code in range(32) if chr(code) != "\n"]
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*(\]?)", re.DOTALL)  # or what begins like one, to the end
_SETS = re.compile(r"(?:\\.|[^\\])*?(\[|&&|--|~~)", re.DOTALL)  # signs of Rust's classes
_BEFORE_CLASS = re.compile(r"(?:\\.|[^\[\\])*", re.DOTALL)
_PROPERTY = re.compile(r"\\[pP](?:\{[^}]*\}|.)")  # of Unicode, which Python's patterns have not
# Control characters that JSON has under no letter of its own: without \u there are none in a string.
_unspeakable = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]").search
_ESCAPED = re.compile(r"\\(?:x\{?|u\{?|U\{?)0*([0-9a-fA-F]{1,2})(?![0-9a-fA-F])|\\([aev0-7]|c[A-Za-z])|\\.")
_SPEAKABLE = "there are none but \\b, \\f, \\n, \\r, \\t"
MAX_EXACT = 2**53  # llguidance has numbers as doubles
LOWEST, HIGHEST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
EXCLUDED = ((LOWEST[1], HIGHEST, math.floor), (HIGHEST[1], LOWEST, math.ceil))


def refuse_unheld(schema: Any, field: str) -> None:
    """Raise InvalidRequest for a schema, or one within it, that says what an output would not hold."""
    classes = set[str]()
    schemas = [*_schemas(schema)]
    for each in schemas:
        _refuse_classes(each, classes, field)
        _refuse_controls(each, field)
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(each.get(keyword), bool):
                raise _unheld(field, keyword, "a number", "a boolean, as in draft 4, is passed over")
        _refuse_counts(each, field)
    _refuse_near(schema, schemas, field)


def _refuse_near(root: Any, schemas: list[dict[str, Any]], field: str) -> None:
    """Refuse a whole number as an excluded bound with the other bound within 1 of it, which would be taken all the
    same. Bounds of schemas that hold together, by $ref or allOf and the like, count as those of one."""
    parents: dict[int, int] = {}

    def group(at: int) -> int:
        while (above := parents.setdefault(at, at)) != at:
            parents[at] = at = parents[above]
        return at

    for each in schemas:
        others = [one for name in LISTS[:3] for one in _listed(each.get(name))]
        for other in (*others, _target(root, each.get("$ref"))):
            if isinstance(other, dict):
                parents[group(id(other))] = group(id(each))
    for excluded, beyond, toward in EXCLUDED:
        found = ((group(id(each)), _number(each, name)) for each in schemas for name in beyond)
        near = {(at, toward(bound)) for at, bound in found if bound is not None and bound % 1}
        for each in schemas:
            whole = None if each.get("type") == "integer" else _number(each, excluded)
            if whole is not None and not whole % 1 and (group(id(each)), whole) in near:
                why = f"with the other bound within 1 of it, {whole} is taken"
                raise _unheld(field, excluded, f"the other bound whole, or not near {whole}", why)


def _refuse_classes(schema: dict[str, Any], seen: set[str], field: str) -> None:
    """Refuse a class of characters that has the controls, and lacks the quote or the backslash: as JSON has the one
    and the other behind a backslash, both would be taken all the same."""
    names = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(names if isinstance(names, dict) else ())):
        for _, found in _parts(pattern) if isinstance(pattern, str) else ():
            if not found or found in seen:
                continue
            seen.add(found)
            if (sign := _SETS.match(found, 1)) is not None:
                why = f"{found[:32]} would be a set of classes, which JSON Schema's patterns do not have"
                raise _unheld(field, "pattern", f"{sign[1]} within [ ] behind a backslash", why)
            if len(seen) > MAX_CLASSES:
                raise _unheld(field, "pattern", f"{MAX_CLASSES} classes", "too many classes to look at")
            if _has_controls_alone(found):
                limit = 'no class with all control characters, but without " or \\, as [^"\\x00-\\x1f] is none'
                raise _unheld(field, "pattern", limit, f"{found[:32]} would take what it leaves out")


def _refuse_controls(schema: dict[str, Any], field: str) -> None:
    """Refuse a text to be held with a control character, which would be left out, and a number that is rounded."""
    for keyword in ("const", "enum"):
        found = [schema.get(keyword)]
        while found:
            value = found.pop()
            if isinstance(value, str) and _unspeakable(value):
                raise _unheld(field, keyword, "no control characters", _SPEAKABLE)
            if isinstance(value, int | float) and abs(value) > MAX_EXACT:
                raise _unheld(field, keyword, "numbers of 53 bits", "a longer one is rounded")
            if isinstance(value, dict):
                found += [*value, *value.values()]
            found += _listed(value)
    names = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(names if isinstance(names, dict) else ())):
        if isinstance(pattern, str) and (_unspeakable(pattern) or _escapes_controls(pattern)):
            raise _unheld(field, "pattern", "control characters in [ ] alone", _SPEAKABLE)


def _escapes_controls(pattern: str) -> bool:
    """Whether a pattern has such a character outside of its classes, escaped."""
    found = (match for before, _ in _parts(pattern) for match in _ESCAPED.finditer(before))
    return any(match[2] or (match[1] and _unspeakable(chr(int(match[1], 16)))) for match in found)


def _parts(pattern: str) -> Iterator[tuple[str, str]]:
    """A pattern as texts, each with the class of characters behind it, in time that grows with its length alone."""
    at = 0
    while (before := _BEFORE_CLASS.match(pattern, at)) is not None:
        found = _CLASS.match(pattern, before.end())
        if found is None or not found[1]:
            yield pattern[at:], ""
            return
        yield before[0], found[0]
        at = found.end()


def _has_controls_alone(text: str) -> bool:
    """Whether a class has the control characters, and not both characters that JSON escapes too."""
    with warnings.catch_warnings(action="ignore"):
        try:
            has = re.compile(_PROPERTY.sub("", text)).fullmatch
        except re.error:  # llguidance has its own word about it
            return False
    return not (has('"') and has("\\")) and all(has(control) for control in _CONTROLS)


def _refuse_counts(schema: dict[str, Any], field: str) -> None:
    """Refuse a least number of properties where one of a free name may come twice and be counted so."""
    least, required = _number(schema, "minProperties"), schema.get("required")
    if least is None or least < 2 or (isinstance(required, list) and len(required) >= least):
        return
    is_free = schema.get("additionalProperties", True) is not False or bool(schema.get("patternProperties"))
    if is_free:
        raise _unheld(field, "minProperties", "0 or 1, or as many as required", "a name may come twice")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema, those within it, and those that it refers to by their place in it, wherever that is."""
    found, seen = [schema], set[int]()
    while found:
        each = found.pop()
        if not isinstance(each, dict) or id(each) in seen:
            continue
        seen.add(id(each))
        found.append(_target(schema, each.get("$ref")))
        yield each
        for keyword in MAPS:
            if isinstance(inner := each.get(keyword), dict):
                found += inner.values()
        for keyword in (*LISTS, "items"):
            found += _listed(each.get(keyword))
        found += [each.get(keyword) for keyword in ALONE]


def _target(root: Any, reference: Any) -> Any:
    """The part of a schema that a reference "#/..." names; None if there is none."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return root if reference == "#" else None
    found = root
    for name in unquote(reference[2:]).split("/"):
        if isinstance(found, dict):
            found = found.get(name.replace("~1", "/").replace("~0", "~"))
        elif isinstance(found, list) and re.fullmatch("[0-9]{1,6}", name) and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(schema: dict[str, Any], keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unheld(field: str, keyword: str, limit: str, why: str) -> InvalidRequest:
    what = f"{field} has {keyword}, which an output would not hold: {why}"
    return InvalidRequest(what, field=field, limit=f"{keyword}: {limit}", value=keyword)
