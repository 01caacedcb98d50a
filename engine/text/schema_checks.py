"""Keywords of JSON schemas that llguidance 1.9.1 takes, and does not hold: they are refused, so that what a schema
says is so. What it knows and cannot hold, it refuses itself; tests/engine/text/test_schema_checks.py has each case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
LOWEST, HIGHEST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def refuse_unheld(schema: Any, field: str) -> None:
    """Raise InvalidRequest for a schema, or one within it, that says what an output would not hold."""
    for each in _schemas(schema):
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(each.get(keyword), bool):
                raise _unheld(field, keyword, "a number", "a boolean, as in draft 4, is passed over")
        _refuse_near_zero(each, field)
        _refuse_counts(each, field)


def _refuse_near_zero(schema: dict[str, Any], field: str) -> None:
    """Refuse bounds that exclude zero and lie within 1 of it: zero would be taken all the same."""
    if schema.get("type") == "integer":
        return
    bounds = [schema, *(each for each in _listed(schema.get("allOf")) if isinstance(each, dict))]
    for excluded, others, sign in (("exclusiveMinimum", HIGHEST, 1), ("exclusiveMaximum", LOWEST, -1)):
        if not any(_number(each, excluded) == 0 for each in bounds):
            continue
        near = [sign * bound for each in bounds for name in others if (bound := _number(each, name)) is not None]
        if near and min(near) < 1:
            limit = f"0 not excluded, or the other bound {sign} or further"
            raise _unheld(field, excluded, limit, "with the other bound within 1 of it, 0 is taken")


def _refuse_counts(schema: dict[str, Any], field: str) -> None:
    """Refuse a least number of properties where one of a free name may come twice and be counted so."""
    least, required = _number(schema, "minProperties"), schema.get("required")
    if least is None or least < 2 or (isinstance(required, list) and len(required) >= least):
        return
    is_free = schema.get("additionalProperties", True) is not False or bool(schema.get("patternProperties"))
    if is_free:
        raise _unheld(field, "minProperties", "0 or 1, or as many as required", "a name may come twice")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those within it."""
    found = [schema]
    while found:
        each = found.pop()
        if not isinstance(each, dict):
            continue
        yield each
        for keyword in MAPS:
            if isinstance(inner := each.get(keyword), dict):
                found += inner.values()
        for keyword in (*LISTS, "items"):
            found += _listed(each.get(keyword))
        found += [each.get(keyword) for keyword in ALONE]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(schema: dict[str, Any], keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unheld(field: str, keyword: str, limit: str, why: str) -> InvalidRequest:
    what = f"{field} has {keyword}, which an output would not hold: {why}"
    return InvalidRequest(what, field=field, limit=f"{keyword}: {limit}", value=keyword)
