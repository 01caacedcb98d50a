"""Kernels compiled ahead for another machine: Triton finds the cache that was carried, or it is said why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(code: str) -> list[Any]:
    """Lines of JSON that a process prints in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", '"'))]


HEAD = """
import json
from pathlib import Path
from triton.runtime import cache
from cierzo.bench.gpu import carried, conformance, widths
from cierzo.kernels.triton.compile import compile_ahead
widths.FORMATS = ()
cells = [cell for _, cell in conformance.checked() if cell[0] == "rms_norm" and cell[1].name == "small4"]
def compiled(cells, make=compile_ahead): return carried.compile_all(carried.launched(cells), 90, make)[0]
"""


def test_a_folder_that_was_moved_is_found_by_another_build_of_the_same_triton(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "carried"
    run(
        f"{HEAD}cache.triton_key = lambda: 'another build'\n"
        "carried.every_cell, carried.of_models = lambda: cells, list\n"
        f"assert carried.main(Path({str(made)!r})) == 0"
    )
    made.rename(folder)
    assert not list(folder.glob("*/*.ptx")), "more than machine code is carried"
    use = f"print(json.dumps(carried.use(Path({str(folder)!r}))))\n"
    measure = "print(json.dumps(compiled(cells)))\n"
    inherited = f"import os\nassert os.environ['TRITON_CACHE_DIR'] == {str(folder)!r}\n"
    told, found = run(HEAD + use + inherited + measure)
    number = found["configurations"]
    assert number > 0
    assert told == f"kernels compiled ahead: {number}"
    assert found == {"configurations": number, "from cache": number, "failed": 0, "errors": []}
    _, missed = run(
        HEAD + use + "cells = [cell for _, cell in conformance.checked() if cell[0] == 'mla_absorb']\n" + measure
    )
    assert missed["compiled"] == missed["configurations"] > 0
    compiler = json.loads((folder / "compiler.json").read_text())
    (folder / "compiler.json").write_text(json.dumps(compiler | {"triton": "3.0.0"}))
    (told,) = run(HEAD + use)
    assert told.startswith("kernels compiled ahead are Triton 3.0.0's, this is ")


def test_a_kernel_that_does_not_compile_is_counted(tmp_path: Path) -> None:
    code = "def refuse(*_): raise ValueError('no registers')\nprint(json.dumps(compiled(cells, refuse)))"
    (found,) = run(HEAD + code)
    assert found["failed"] == found["configurations"] > 0
    assert found["errors"][0] == "rms_norm: ValueError: no registers"


@pytest.mark.parametrize(
    "text", ["", "{", '{"triton": 1', "[]", '{"triton": "VERSION"}', '{"triton": "VERSION", "keys": 3}']
)
def test_a_damaged_bundle_is_told_and_not_used(tmp_path: Path, text: str) -> None:
    from cierzo.bench.gpu import carried

    (tmp_path / carried.COMPILER).write_text(text.replace("VERSION", carried.triton.__version__), encoding="utf-8")
    before = carried.knobs.cache.dir
    assert carried.use(tmp_path).startswith("kernels compiled ahead are damaged, and all are compiled here")
    assert carried.knobs.cache.dir == before


def test_a_machine_without_the_bundle_says_so(tmp_path: Path) -> None:
    from cierzo.bench.gpu import carried

    assert carried.use(tmp_path) == f"no kernels were compiled ahead: {tmp_path} has none"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
