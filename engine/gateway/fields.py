"""A table of every field of a request's body: served, harmless and passed over, or refused by name, and why.

It has every field of the types of OpenAI's and Mistral's own clients (a test walks them), those that clients of
vLLM send, and ours. `field_rows` has the rows, docs/http-fields.md is made of them, and `Sieve` holds a body
against them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.absent import lacking
from cierzo.engine.frontend.bounds import must_be, shown

Treatment = Literal["served", "passed over", "refused"]
MAX_TOLD = 32  # names of fields that were passed over, for one header
MAX_NAME_CHARS = 64


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A field, and what becomes of it.

    argument: the keyword of `Client.generate` that gets its value. note: for a reader of the documentation; of a
    refused one, for whoever sends it. harmless: values of a refused one that ask for nothing. inner: the table of
    the object that it is.
    """

    name: str
    treatment: Treatment
    argument: str = ""
    note: str = ""
    harmless: tuple[Any, ...] = ()
    inner: Table | None = None


Table = dict[str, Row]


def served(name: str, argument: str = "", note: str = "", inner: Table | None = None) -> Row:
    """Row of a field that is served, as `argument` of a generation or by what reads the body."""
    return Row(name=name, treatment="served", argument=argument, note=note, inner=inner)


def same(*names: str) -> tuple[Row, ...]:
    """Rows of fields that are called as the arguments that they become."""
    return tuple(served(name, name) for name in names)


def over(*names: str, note: str = "", inner: Table | None = None) -> tuple[Row, ...]:
    """Rows of fields that change no answer."""
    return tuple(Row(name=name, treatment="passed over", note=note, inner=inner) for name in names)


def refused(name: str, why: str, *harmless: Any) -> Row:
    """Row of a field that is refused, unless it has one of the values that ask for nothing."""
    return Row(name=name, treatment="refused", note=why, harmless=harmless)


def table(*parts: Row | Iterable[Row]) -> Table:
    """Rows by name. A name that comes again replaces the earlier row."""
    rows = [row for part in parts for row in ([part] if isinstance(part, Row) else part)]
    return {row.name: row for row in rows}


class Sieve:
    """Takes what is served out of the objects of one body, refuses by name, and notes what it passes over.

    lenient: unknown fields are passed over too. A null says nothing: it is as if the field were left out.
    """

    def __init__(self, lenient: bool = False) -> None:
        self._lenient = lenient
        self._over: dict[str, None] = {}

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Names of what was passed over, such as messages.content.annotations, that a header can hold."""
        names = [*self._over]
        return (*names[:MAX_TOLD], *(["..."] if len(names) > MAX_TOLD else []))

    def served(self, values: Any, rows: Table, place: str = "") -> dict[str, Any]:
        """The fields of the object `values` at `place` that are served. Raises InvalidRequest for others."""
        _require_object(values, place)
        found = {}
        for name, value in values.items():
            if value is None:
                continue
            row = rows.get(name)
            if row is None:
                self._unknown(name, value, rows, place)
                continue
            if row.treatment == "refused":
                _refuse(row, value, place)
                continue
            if row.inner is not None:
                value = self.served(value, row.inner, at(place, name))
            if row.treatment == "served":
                found[name] = value
            else:
                self.pass_over(at(place, name))
        return found

    def kind(self, values: Any, kinds: Table, place: str, default: str | None = None) -> str:
        """The type that an object says it has. Raises InvalidRequest for one that is not served."""
        _require_object(values, place)
        kind = values.get("type")
        kind = default if kind is None else kind
        row = kinds.get(kind) if isinstance(kind, str) else None
        if row is not None and row.treatment == "served":
            return row.name
        limit = ", ".join(name for name, one in kinds.items() if one.treatment == "served")
        field = at(place, "type")
        if kind is None:
            raise InvalidRequest(
                f"{field} is missing, allowed: {limit}", field=field, limit=limit, value="left out"
            )
        why = f"; {row.note}" if row is not None else ""
        told = shown(kind)
        raise InvalidRequest(f"{field} is {told!r}, allowed: {limit}{why}", field=field, limit=limit, value=told)

    def pass_over(self, place: str) -> None:
        """Note that a field is not looked at."""
        if len(self._over) <= MAX_TOLD:
            name = re.sub(r"\[\d+\]", "", place).encode("ascii", "backslashreplace").decode()
            self._over[re.sub(r"[^\w.\-]", "?", name)[:MAX_NAME_CHARS]] = None

    def _unknown(self, name: str, value: Any, rows: Table, place: str) -> None:
        field, reason = at(place, shown(name)), lacking(name)
        if self._lenient and not reason:
            self.pass_over(at(place, name[:MAX_NAME_CHARS]))
            return
        known = [row.name for row in rows.values() if row.treatment != "refused"]
        nearest = difflib.get_close_matches(name[:MAX_NAME_CHARS], known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        what = reason or f"unknown field {field}{hint}"
        raise InvalidRequest(what, field=field, limit=nearest[0] if nearest else "left out", value=shown(value))


def at(place: str, name: str) -> str:
    """The place of a field of the object at `place`."""
    return f"{place}.{name}" if place else name


def _require_object(values: Any, place: str) -> None:
    if not isinstance(values, dict):
        raise must_be(place, "an object", values)


def _refuse(row: Row, value: Any, place: str) -> None:
    if any(type(value) is type(one) and value == one for one in row.harmless):
        return
    field = at(place, row.name)
    limit = " or ".join(["left out", *(msgspec.json.encode(one).decode() for one in row.harmless)])
    raise InvalidRequest(f"{field}: {row.note}; it must be {limit}", field=field, limit=limit, value=shown(value))
