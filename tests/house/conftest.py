"""The tree as data: every Python file of the package, parsed and walked once."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "cache", "scheduler", "engine", "bench")
ABOVE = "src/cierzo"  # the command line; the folders are linked beside it


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def modules() -> dict[str, ast.Module]:
    """Module name below `cierzo` (a package's own name for its __init__) -> parsed source."""
    below = [(path, path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    above = [(path, path.relative_to(ROOT / ABOVE)) for path in (ROOT / ABOVE).glob("*.py")]
    found = {}
    for path, name in sorted([*above, *below]):
        parts = name.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "cierzo"
        found[module] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


@pytest.fixture(scope="session")
def nodes(modules: dict[str, ast.Module]) -> dict[str, list[ast.AST]]:
    """Module name -> every node of its tree."""
    return {name: list(ast.walk(tree)) for name, tree in modules.items()}


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Files under version control that exist, relative to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
