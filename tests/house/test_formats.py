"""The name of a number format is spelled in few files: elsewhere a format is an object that is handed on."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from cierzo.kernels.cpu import abi
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, PACKED_FORMATS, FormatName, formats_on

# Rooms whose code may spell the name of a format, and rooms in them that are blind to formats. A room holds the
# modules below it, and a module belongs to the longest room that fits it, as in test_imports.
BLIND = ("bench.plan", "engine.cost.work", "engine.cost.step_model")
EVERYWHERE = (
    *("kernels.formats.number_formats", "engine.profiles", "bench"),
    *(f"kernels.triton.{name}" for name in ("four_bit", "heuristics", "linear", "moe", "product")),
)
CHECKPOINTS = (
    *("engine.checkpoint_format", "engine.weights.names", "engine.weights.plan", "engine.weights.published"),
    *("engine.quantisation", "engine.weights.companions", "engine.weights.pieces"),
    *("engine.weights.quantised", "engine.weights.grids"),
)
# fp8 and int8 are also formats of cached values and of activations, and rates of a device.
CACHED = ("cache.layout", "cache.pool", "engine.config", "kernels.triton.paged")
RATES = ("engine.cost", "bench.plan.calibrate")
SPELLED = {
    "nvfp4": (*EVERYWHERE, *CHECKPOINTS, "kernels.formats.nvfp4", "kernels.cpu.abi", "kernels.pack"),
    "mxfp4": (*EVERYWHERE, *CHECKPOINTS, "kernels.formats.mxfp4"),
    "int4": (*EVERYWHERE, "kernels.cpu.abi", "engine.quantisation"),
    "fp8": (*EVERYWHERE, *CHECKPOINTS, *CACHED, *RATES, "kernels.formats"),
    "int8": (*EVERYWHERE, *CACHED, *RATES, "kernels.cpu.abi", "engine.quantisation", "engine.weights.plan"),
}


def _texts(tree: ast.Module) -> Iterator[str]:
    """The string constants of a module that are no docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("format", SPELLED)
def test_a_formats_name_is_spelled_where_it_may_be(format: str, modules: dict[str, ast.Module]) -> None:
    rooms = {**dict.fromkeys(BLIND, False), **dict.fromkeys(SPELLED[format], True)}
    wrong = []
    for module, tree in modules.items():
        room = max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len, default="")
        if format in _texts(tree) and not rooms.get(room, False):
            wrong.append(module)
    assert not wrong, f"{', '.join(wrong)}: hand on a NumberFormat, or ask it, instead of spelling {format}"


def test_tables_that_stand_elsewhere_are_those_of_the_formats() -> None:
    """abi.py mirrors a header, and a type that a checker reads is written out."""
    assert list(abi.FORMATS) == list(PACKED_FORMATS)
    chosen = FormatName.__args__  # type: ignore[attr-defined]
    assert chosen == tuple(name for name, one in NUMBER_FORMATS.items() if one.devices)
    assert {name for device in ("cpu", "cuda") for name in formats_on(device)} == set(chosen)
