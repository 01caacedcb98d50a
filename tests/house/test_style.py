"""Sizes, docstrings, and the one reader of environment variables."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 500
MAX_DEVICE_FILE_LINES = 700
MAX_FUNCTION_LINES = 60
MAX_TRITON_LINES = 150
DESCRIBED_ELSEWHERE = "kernels.cpu.abi"  # mirrors abi.h, whose comments it would repeat
DEVICE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".hpp"}
READS_ENVIRONMENT = "engine.environment"
# Openings of docstrings that are neither noun nor verb, or lack their noun (docs/architecture.md, section 12).
BAD_OPENINGS = ("Of", "Its", "It", "One", "Their", "They", "Those", "That", "What", "Both", "The same")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(nodes: dict[str, list[ast.AST]]) -> Iterator[tuple[str, Function]]:
    for name, found in nodes.items():
        yield from ((name, node) for node in found if isinstance(node, Function))


def _lines_without_docstring(node: Function) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    doc = node.body[0]
    return lines - ((doc.end_lineno or doc.lineno) - doc.lineno + 1)


def _function_limit(node: Function) -> int:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    jitted = any(name == "kernel" or ("triton" in name and "jit" in name) for name in decorators)
    return MAX_TRITON_LINES if jitted else MAX_FUNCTION_LINES


def test_files_are_one_idea(root: Path, tracked: list[Path]) -> None:
    limits = {".py": MAX_FILE_LINES, **dict.fromkeys(DEVICE_SUFFIXES, MAX_DEVICE_FILE_LINES)}
    long = []
    for path in tracked:
        limit = limits.get(path.suffix)
        if limit and (lines := (root / path).read_text(encoding="utf-8").count("\n")) > limit:
            long.append(f"{path}: {lines} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_functions_fit_on_a_screen(nodes: dict[str, list[ast.AST]]) -> None:
    long = [
        f"{module}:{node.lineno} {node.name}: {lines} lines, at most {_function_limit(node)}"
        for module, node in _functions(nodes)
        if (lines := _lines_without_docstring(node)) > _function_limit(node)
    ]
    assert not long, "\n".join(long)


def test_public_names_have_docstrings(modules: dict[str, ast.Module]) -> None:
    bare = [
        f"{module}:{node.lineno} {node.name}"
        for module, tree in modules.items()
        for node in tree.body
        if module != DESCRIBED_ELSEWHERE
        and isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare, "\n".join(bare)


def test_docstrings_open_with_a_noun_or_a_verb(modules: dict[str, ast.Module]) -> None:
    found = [
        f"{module}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if module != DESCRIBED_ELSEWHERE
        and isinstance(node, Function | ast.ClassDef | ast.Module)
        and (text := ast.get_docstring(node))
        and any(text.startswith(f"{opening} ") for opening in BAD_OPENINGS)
    ]
    assert not found, "\n".join(["begin with a noun or a verb that a stranger understands:", *found])


def test_one_file_reads_environment_variables(nodes: dict[str, list[ast.AST]]) -> None:
    readers = {
        f"{module}:{node.lineno}"
        for module, found in nodes.items()
        for node in found
        if module != READS_ENVIRONMENT
        and (
            (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
            or (isinstance(node, ast.ImportFrom) and node.module == "os" and _names_environment(node))
        )
    }
    assert not readers, f"only {READS_ENVIRONMENT} may read them: {sorted(readers)}"


def _names_environment(node: ast.ImportFrom) -> bool:
    return any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
