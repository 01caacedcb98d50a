"""Argument checks by named sizes: `sizes("linear", x=(x, "T K"), weight=(weight, "N K"))`.

A letter that occurs twice must have the same size; "32" is a literal size, "*" matches anything. The error
names the operation, the argument, the size expected and who set it. The check runs on every call, so it is
kept to a few hundred nanoseconds per argument and never touches a tensor's values.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn


class ArgumentError(ValueError):
    """An operation was called with a tensor of the wrong shape, dtype or layout."""


def sizes(operation: str, /, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Check every argument's shape against its letters and return the letters' sizes."""
    known: dict[str, int] = {}
    for name, (tensor, letters) in arguments.items():
        names = _split(letters)
        shape = tensor.shape
        if len(shape) != len(names):
            _fail(operation, name, f"must have {len(names)} axes [{letters}], has shape {list(shape)}")
        for letter, size in zip(names, shape, strict=True):
            if letter == "*":
                continue
            expected = int(letter) if letter.isdigit() else known.setdefault(letter, size)
            if expected != size:
                _fail(operation, name, f"[{letters}] needs {letter} = {expected}, has shape {list(shape)}")
    return known


def same_dtype(operation: str, /, **tensors: Any) -> None:
    """All tensors share one dtype."""
    first, *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first[1].dtype:
            _fail(operation, name, f"has dtype {tensor.dtype}, {first[0]} has {first[1].dtype}")


def dtype(operation: str, expected: Any, /, **tensors: Any) -> None:
    """Every tensor has the dtype `expected`."""
    for name, tensor in tensors.items():
        if tensor.dtype != expected:
            _fail(operation, name, f"must have dtype {expected}, has {tensor.dtype}")


def require(operation: str, holds: bool, message: str) -> None:
    """Anything else about the arguments that must hold."""
    if not holds:
        raise ArgumentError(f"{operation}: {message}")


def _fail(operation: str, name: str, message: str) -> NoReturn:
    raise ArgumentError(f"{operation}: {name} {message}")


@cache
def _split(letters: str) -> tuple[str, ...]:
    return tuple(letters.split())
