"""Command line options drawn from the structs that hold them: a field's type converts, its Meta describes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import msgspec

_METAVARS = {int: "N", float: "X", str: "TEXT"}
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_options(parser: Parser, struct: type[msgspec.Struct], *, skip: Iterable[str] = ()) -> None:
    """One option per field of `struct`. A field that holds several values is an option that may be repeated."""
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        kinds, description = _unwrap(field.type)
        default = None if field.default is msgspec.NODEFAULT else field.default
        if kinds == (bool,):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=description)
        elif isinstance(default, tuple):
            kind = kinds[0]
            text = f"{description}; may be repeated"
            parser.add_argument(flag, type=kind, action="append", metavar=_METAVARS[kind], help=text)
        else:
            choices = [choice for choice in kinds if isinstance(choice, str)]
            kind = next((kind for kind in kinds if kind in (int, float)), str)
            parser.add_argument(
                flag,
                type=kind,
                choices=choices or None,
                default=default,
                metavar=None if choices else _METAVARS[kind],
                help=description,
            )


def chosen(
    arguments: argparse.Namespace, struct: type[msgspec.Struct], *, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """What the options that `add_options` made were given, as keywords of `struct`; None leaves its default."""
    given = {
        name: getattr(arguments, name)
        for name in struct.__struct_fields__
        if name not in skip and getattr(arguments, name) is not None
    }
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _unwrap(annotation: Any) -> tuple[tuple[Any, ...], str]:
    """((types or literal values), description) of an annotation such as Annotated[int | None, Meta(...)]."""
    metas = getattr(annotation, "__metadata__", ())
    description = next((meta.description for meta in metas if meta.description), "")
    bare = _bare(annotation)
    parts = map(_bare, getattr(bare, "__args__", (bare,)))
    return tuple(part for part in parts if part not in (type(None), ...)), description


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation
