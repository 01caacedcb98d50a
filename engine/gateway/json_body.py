"""The JSON of a request's body, read strictly: what one reader takes for this and another for that is refused.

RFC 8259 leaves open what equal keys, numbers beyond a double and halves of surrogate pairs mean. Here they are
errors, as are NaN, Infinity, a byte order mark, and nesting beyond a stated depth. Each error names the place.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import MAX_SHOWN_CHARS, shown
from cierzo.engine.text.unicode import refuse_surrogates

PLACE = "body"  # the field of an error about all of it
_may_hold_surrogates = re.compile(rb"\\u[dD]").search
_NAME = re.compile(r"\w+", re.ASCII)
_SOUND = {int, bool, type(None)}
_Twice = dict[int, tuple[object, str]]


def read_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object that `body` is. Raises InvalidRequest if it is none, or not one that all readers agree on.

    max_depth: lists and objects within each other, the outermost counted.
    """
    doubts = _Doubts()
    try:
        values = json.loads(
            body.decode(),
            object_pairs_hook=doubts.of_pairs,
            parse_float=doubts.number,
            parse_constant=doubts.number,
        )
    except UnicodeDecodeError as error:
        raise _refused(f"the body is not UTF-8 at byte {error.start}", "JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _refused(f"the body is not JSON: {error.msg[:1].lower()}{error.msg[1:]}, {where}", "JSON") from None
    except ValueError:  # of Python's integers
        raise _refused("the body has an integer of too many digits", "JSON with numbers of 64 bits") from None
    except RecursionError:
        raise _too_deep(PLACE, max_depth) from None
    if not isinstance(values, dict):
        raise _refused("the body must be a JSON object", "a JSON object", shown(values))
    if doubts.found or body.count(b"[") + body.count(b"{") > max_depth or _may_hold_surrogates(body):
        _check(values, [], max_depth, doubts.twice)
    return values


class _Doubts:
    """Notes on what json.loads lets pass; where it is in the body, only `_check` can tell."""

    def __init__(self) -> None:
        self.found = False
        self.twice: _Twice = {}  # id of an object -> itself, and a key that it has twice

    def of_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            self.twice[id(values)] = (values, twice)
            self.found = True
        return values

    def number(self, text: str) -> float:
        value = float(text)
        self.found |= not math.isfinite(value)
        return value


def _check(value: Any, path: list[str | int], max_depth: int, twice: _Twice) -> None:
    """Raise InvalidRequest for what no body may hold, at `path` or below it."""
    if isinstance(value, str):
        if not value.isascii():
            refuse_surrogates(place_of(path), value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            place = place_of(path)
            raise InvalidRequest(
                f"{place} is {value}, allowed: finite numbers", field=place, limit="finite numbers", value=value
            )
    elif isinstance(value, dict | list):
        if len(path) >= max_depth:
            raise _too_deep(place_of(path), max_depth)
        if isinstance(value, dict):
            _check_keys(value, path, twice)
        elif set(map(type, value)) == {int}:
            return  # token ids, of which there may be many
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            kind = type(inner)
            if kind in _SOUND or (kind is str and inner.isascii()):
                continue
            path.append(key)
            _check(inner, path, max_depth, twice)
            path.pop()


def _check_keys(value: dict[str, Any], path: list[str | int], twice: _Twice) -> None:
    for name in value:
        if not name.isascii():
            refuse_surrogates(f"a name in {place_of(path)}", name)
    if (found := twice.get(id(value))) is not None:
        place = place_of([*path, found[1]])
        raise InvalidRequest(f"{place} is there twice", field=place, limit="once", value="twice")


def place_of(path: list[str | int]) -> str:
    """A path as errors name it: messages[0].content."""
    place = ""
    for step in path:
        if isinstance(step, int):
            place += f"[{step}]"
        elif len(step) <= MAX_SHOWN_CHARS and _NAME.fullmatch(step):
            place += f".{step}"
        else:
            place += f"[{shown(step)!a}]"
    return place.removeprefix(".") or PLACE


def _too_deep(place: str, max_depth: int) -> InvalidRequest:
    limit = f"{max_depth} levels"
    what = f"{shown(place)} is nested too deeply, allowed: {limit}"
    return InvalidRequest(what, field=place[:200], limit=limit, value="more levels")


def _refused(what: str, limit: str, value: object = None) -> InvalidRequest:
    return InvalidRequest(what, field=PLACE, limit=limit, value=value)
