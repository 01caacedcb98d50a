"""Configurations that are kept by their arguments, and what they may depend on."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

from cierzo.kernels import triton as package
from cierzo.kernels.triton import heuristics
from cierzo.kernels.triton.launch import KEPT, Configuration, kept, kernel

CHOICES = {"WIDTH_KEEPS_BITS", "DESCRIBED_TOKENS"}  # of heuristics, which a process sets at its start

for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")


def names(code: CodeType) -> Iterator[str]:
    """All global names and attributes that a function's code mentions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)


def reached(function: Callable[..., Any], seen: set[Any]) -> Iterator[FunctionType]:
    """A function, and all of our own that it may call."""
    plain = getattr(function, "__wrapped__", function)
    if not isinstance(plain, FunctionType) or plain in seen or not plain.__module__.startswith("cierzo."):
        return
    seen.add(plain)
    yield plain
    for name in names(plain.__code__):
        yield from reached(plain.__globals__.get(name), seen)  # type: ignore[arg-type]


def choices_of(function: Callable[..., Any]) -> set[str]:
    return {name for one in reached(function, set()) for name in names(one.__code__)} & CHOICES


@pytest.mark.parametrize("function", KEPT, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_what_is_kept_depends_on_its_arguments_alone(function: Callable[..., Any]) -> None:
    assert choices_of(function) == set()


def test_choices_are_found_through_calls() -> None:
    assert choices_of(heuristics.tile) == {"WIDTH_KEEPS_BITS"}
    assert choices_of(lambda: heuristics.DESCRIBED_TOKENS) == set()  # of a test: none of ours
    assert choices_of(heuristics.thresholds) == {"DESCRIBED_TOKENS"}


@kernel
def _nothing(x_ptr):
    pass


def test_equal_arguments_give_the_same_configuration() -> None:
    @kept
    def configuration(pointer: str, wide: bool | int) -> Configuration:
        return Configuration(_nothing, {"x_ptr": pointer}, {"WIDE": wide})

    KEPT.remove(next(one for one in KEPT if one.__name__ == "configuration"))
    found = configuration("*bf16", True)
    assert configuration("*bf16", True) is found
    assert configuration("*fp32", True) is not found
    assert configuration("*bf16", 1) is not found  # a constant of another type is other code
    with pytest.raises(TypeError, match="unhashable"):
        configuration([], True)  # type: ignore[arg-type]


def test_choices_are_kept_while_the_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    @heuristics.decided
    def choice(tokens: int) -> tuple[int | None, heuristics.Tile | None]:
        made.append(tokens)
        return heuristics.DESCRIBED_TOKENS, heuristics._forced

    before = choice(5)
    assert choice(5) is before
    assert made == [5]
    with heuristics.forced(heuristics.Tile(16, 16, 64)) as _:
        assert choice(5)[1] is not None
    assert choice(5)[1] is None
    for name, value in (("DESCRIBED_TOKENS", 7), ("WIDTH_KEEPS_BITS", False), ("APART_TOKENS", 2), ("TILES", {})):
        told = len(made)
        monkeypatch.setattr(heuristics, name, value)
        assert choice(5)[0] == heuristics.DESCRIBED_TOKENS
        assert len(made) == told + 1
