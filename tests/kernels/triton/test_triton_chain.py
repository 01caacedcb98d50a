"""Kernels that are launched before those in front of them have ended: they wait before they touch memory."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cierzo.bench.gpu.configurations import configurations
from cierzo.kernels import triton as kernels
from cierzo.kernels.triton.launch import CHAINED

WAITING = ast.dump(ast.parse("after_others()").body[0])


def functions() -> dict[str, list[tuple[Callable[..., Any], ast.FunctionDef]]]:
    """Kernels and their source, by their decorator, of all files of kernels."""
    found: dict[str, list[tuple[Callable[..., Any], ast.FunctionDef]]] = {"chained": [], "kernel": []}
    for one in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(one.name)
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Name) and decorator.id in found:
                        found[decorator.id].append((getattr(module, node.name).fn, node))
    return found


def test_they_wait_in_their_first_statement_and_no_other_kernel_does() -> None:
    found = functions()
    assert len(found["chained"]) >= 13
    assert {function for function, _ in found["chained"]} == CHAINED
    for _, node in found["chained"]:
        first = node.body[1] if ast.get_docstring(node) is not None else node.body[0]
        assert ast.dump(first) == WAITING, node.name
        assert ast.unparse(node).count("after_others") == 1, node.name
    assert not [node.name for _, node in found["kernel"] if WAITING in map(ast.dump, ast.walk(node))]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_their_machine_code_does(compiled: dict[str, Any]) -> None:
    """With all else that the report calls a fault."""
    chained = [name for name in compiled if "launch_pdl" in configurations()[name].options]
    assert len(chained) >= 10
    assert len(chained) < len(compiled)
    assert {name: report["faults"] for name, report in compiled.items() if report["faults"]} == {}
