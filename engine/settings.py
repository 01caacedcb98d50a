"""Settings held against the annotations of the struct that has them, as errors and the command line need it.

A wrong value is refused in one shape, wherever it was given: "threads must be an integer from 1 to 1024, got 0", a
ConfigError with field, limit and value. `limit_of` words the limit, `require` checks a struct, `settings_of` makes
one from keywords, `word_reader` reads a word of a command line.
"""

from __future__ import annotations

import difflib
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from cierzo.engine.errors import ConfigError, refusal

ENDS = r"\Z"  # of a pattern: what it is about is the whole word
LARGEST_INT = 2**63 - 1  # that a message between processes can carry
S = TypeVar("S", bound=msgspec.Struct)


def settings_of(kind: type[S], given: Mapping[str, Any], prefix: str = "") -> S:
    """The struct with these keywords. Raises ConfigError for an unknown name, which it follows with the nearest
    known ones, and for a value beyond its limit."""
    known = kind.__struct_fields__
    for name, value in given.items():
        if name not in known:
            limit = "one of " + ", ".join(difflib.get_close_matches(str(name), known) or known)
            raise ConfigError(
                f"there is no setting {prefix}{name}: it must be {limit}",
                field=f"{prefix}{name}",
                limit=limit,
                value=value,
            )
    return require(kind(**given), prefix)


def require(settings: S, prefix: str = "") -> S:
    """Give settings each the type that its annotation names: an integer where a float is meant becomes
    one, as do numbers of numpy. Raises ConfigError for what has another type or lies beyond its limit."""
    kind = type(settings)
    checked = {
        field.name: _checked(field.type, getattr(settings, field.name), prefix + field.name)
        for field in msgspec.structs.fields(kind)
    }
    return kind(**checked)


def _checked(annotation: Any, value: Any, name: str) -> Any:
    kinds, _ = unwrap(annotation)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if isinstance(value, Mapping):
                return settings_of(kind, value, f"{name}.")
            if isinstance(value, kind):
                return require(value, f"{name}.")
    try:
        return _converted(annotation, value)
    except (ValueError, OverflowError):
        raise refusal(name, limit_of(annotation, value), value) from None


def _converted(annotation: Any, value: Any) -> Any:
    """The value in the annotation's own type. Raises ValueError where that cannot be, or its limits forbid it."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = float(value)
    found = msgspec.convert(value, annotation)  # a ValidationError is a ValueError
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError
    if isinstance(found, int) and abs(found) > LARGEST_INT:
        raise ValueError
    return found


def word_reader(annotation: Any) -> Callable[[str], Any]:
    """A function that reads a setting from a word of the command line, for argparse: what it raises is told as the
    argument's error."""
    kinds, _ = unwrap(annotation)
    number = next((kind for kind in (int, float) if kind in kinds), str)

    def read(word: str) -> Any:
        value: Any = word
        try:
            word.encode()  # the shell hands over bytes that are no text too
            value = number(word)
            return _converted(annotation, value)
        except ValueError:
            raise ArgumentTypeError(f"must be {limit_of(annotation, value)}, got {word!r}") from None

    return read


# --- limits in words ---------------------------------------------------------------------------------------


def limit_of(annotation: Any, value: Any = None) -> str:
    """Say what a value must be: "an integer from 1 to 1024", "one of auto, on, off", "a finite number above 0".

    The limit that every integer has is named only where `value` is beyond it.
    """
    kinds, metas = unwrap(annotation)
    if all(isinstance(kind, str) for kind in kinds):
        return "one of " + ", ".join(kinds)
    if bool in kinds:
        structs = [f", or a {kind.__name__}" for kind in kinds if issubclass(kind, msgspec.Struct)]
        return "True or False" + "".join(structs)
    if int in kinds:
        too_large = isinstance(value, Integral) and int(value) > LARGEST_INT and _first(metas, "le") is None
        return f"an integer of at most {LARGEST_INT}" if too_large else "an integer" + _bounds(metas)
    if float in kinds:
        return "a finite number" + _bounds(metas)
    if str in kinds:
        pattern = _first(metas, "pattern")
        return "text in UTF-8" if pattern is None else f"text like {pattern.removeprefix('^').removesuffix(ENDS)}"
    name = kinds[0].__name__
    return f"a {name}, or a mapping with its fields" if issubclass(kinds[0], msgspec.Struct) else f"a {name}"


def _bounds(metas: tuple[Meta, ...]) -> str:
    above, least, most = (_first(metas, name) for name in ("gt", "ge", "le"))
    if above is not None:
        return f" above {above}"
    if most is not None:
        return f" from {least} to {most}"
    return "" if least is None else f" of at least {least}"


def _first(metas: tuple[Meta, ...], name: str) -> Any:
    return next((value for meta in metas if (value := getattr(meta, name)) is not None), None)


def unwrap(annotation: Any) -> tuple[tuple[Any, ...], tuple[Meta, ...]]:
    """(types or literal values, Metas) of an annotation such as Annotated[Count | None, Meta(...)].

    None is left out; of tuple[int, ...] the type of its items is given.
    """
    return tuple(_kinds(annotation)), tuple(_metas(annotation))


def _kinds(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif origin is Literal:
        yield from get_args(annotation)
    elif annotation not in (NoneType, ...):
        yield origin or annotation


def _metas(annotation: Any) -> Iterator[Meta]:
    yield from (part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Meta))
    for part in get_args(annotation):
        yield from _metas(part)
