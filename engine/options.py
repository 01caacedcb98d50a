"""Command line options drawn from the structs that hold them: a field's annotation reads, and describes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from cierzo.engine.settings import unwrap, word_reader

_METAVARS = {int: "N", float: "X", str: "TEXT"}
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_options(
    parser: Parser,
    struct: type[msgspec.Struct],
    *,
    skip: Iterable[str] = (),
    readers: Mapping[str, Callable[[str], Any]] = {},
) -> None:
    """Add an option for each field of `struct`; the option of a field that holds several values may be repeated.

    readers: by field, what reads the option's word, where the annotation does not say all.
    """
    for field in msgspec.structs.fields(struct):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        kinds, metas = unwrap(field.type)
        description = next((meta.description for meta in metas if meta.description), "")
        default = None if field.default is msgspec.NODEFAULT else field.default
        if kinds == (bool,):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=description)
        elif isinstance(default, tuple):
            item = kinds[0]
            text = f"{description}; may be repeated"
            parser.add_argument(flag, type=word_reader(item), action="append", metavar=_METAVARS[item], help=text)
        else:
            choices = [choice for choice in kinds if isinstance(choice, str)]
            parser.add_argument(
                flag,
                type=str if choices else readers.get(field.name) or word_reader(field.type),
                choices=choices or None,
                default=default,
                metavar=None if choices else _METAVARS[kinds[0]],
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
