"""What is built, what is imported at start, and what the tracked files may say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = ("kernels", "cache", "scheduler", "engine", "bench")
COMPILED = {".cpp", ".h"}  # into kernels/cpu/_native*.so
MAX_CLIENT_IMPORT = 2.4  # times what asyncio and msgspec take by themselves; 2.12 with images
RESULTS = Path("bench/results")  # figures, not sources


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_ordinary_build_has_every_file(root: Path, tracked: list[Path], tmp_path: Path) -> None:
    """src/cierzo is made of symbolic links: a build must follow them, and take sources that are not Python."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path), "--no-compile"]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=60)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sources = {path for path in tracked if path.parts[0] in FOLDERS and path.suffix not in COMPILED}
    wanted = {f"cierzo/{path}" for path in sources if RESULTS not in path.parents}
    above = {str(path.relative_to("src")) for path in tracked if path.parts[:2] == ("src", "cierzo")}
    missing = sorted((wanted | above) - built)
    assert not missing, f"not built (a package without __init__.py, or no package_data in setup.py): {missing}"


@pytest.mark.parametrize(
    "module",
    [
        "cierzo",
        "cierzo.engine",
        "cierzo.cli",
        "cierzo.engine.config",
        "cierzo.engine.frontend.client",
        "cierzo.engine.frontend.frontend",
        "cierzo.scheduler.scheduler",
        "cierzo.cache.manager",
        "cierzo.testing",
    ],
)
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'pytest'}} & set(sys.modules)))"
    assert _python(code).strip() == ""


def test_client_imports_fast() -> None:
    """CPU time as a ratio, so that a slow or busy machine does not fail it; the least of three for a cold disk."""
    code = "import time; t = time.process_time(); import asyncio, msgspec; base = time.process_time() - t; "
    code += "import cierzo.engine.frontend.client; print((time.process_time() - t) / base)"
    assert min(float(_python(code)) for _ in range(3)) < MAX_CLIENT_IMPORT


@pytest.fixture(scope="module")
def lines(root: Path, tracked: list[Path]) -> list[tuple[Path, int, str]]:
    """File, number and text of every line that somebody wrote."""
    texts = [path for path in tracked if path.suffix in {".py", ".md", ".toml", ".json", ".cpp", ".cu", ".h", ""}]
    return [
        (path, number, line)
        for path in texts
        for number, line in enumerate((root / path).read_text(encoding="utf-8").splitlines(), start=1)
    ]


def test_no_path_of_a_machine_is_tracked(lines: list[tuple[Path, int, str]]) -> None:
    home = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/")
    found = [f"{path}:{number}" for path, number, line in lines if home.search(line)]
    assert not found, "\n".join(found)


def test_documents_referred_to_exist(lines: list[tuple[Path, int, str]], tracked: list[Path]) -> None:
    """A pointer to a page that a reader does not have helps no one."""
    present = {path.name for path in tracked}
    found = [
        f"{path}:{number} {name}"
        for path, number, line in lines
        if ".md" in line
        for name in re.findall(r"[\w-]+\.md\b", line)
        if name not in present
    ]
    assert not found, "\n".join(found)
