"""Values that an implementation makes of an object at the first call and finds again in every later one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def derived(make: Function) -> Function:
    """Keep what `make` returns for an object and further arguments for as long as the object lives.

    The object is known by its identity, so that a copy of it (`dataclasses.replace`) begins anew; it must take weak
    references. The further arguments are given by position and must be hashable. A value that refers to its object
    would keep both for ever.
    """
    kept: dict[int, tuple[weakref.ref[Any], dict[tuple[Any, ...], Any]]] = {}

    def find(owner: Any, *key: Any) -> Any:
        at = id(owner)
        entry = kept.get(at)
        if entry is None:
            entry = kept[at] = weakref.ref(owner, lambda _: kept.pop(at)), {}
        values = entry[1]
        if key not in values:
            values[key] = make(owner, *key)
        return values[key]

    return find  # type: ignore[return-value]  # its arguments are those of `make`
