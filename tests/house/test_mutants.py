"""The lists of faults follow the code, though `make mutants`, which takes an hour, runs by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted((ROOT / "tests" / "mutants").glob("*.json"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_fault_has_its_place(path: Path) -> None:
    faults = msgspec.json.decode(path.read_bytes())
    assert faults
    for fault in faults:
        sound = (ROOT / fault["file"]).read_text(encoding="utf-8")
        assert sound.count(fault["find"]) == 1, f"{fault['file']}: {fault['find']!r}"
        assert fault["replace"] != fault["find"]
        for test in fault["tests"].split():
            _require_test(test, fault["why"])


def _require_test(test: str, why: str) -> None:
    """Fail unless `test`, an argument of pytest (a file, a folder, or file::function[case]), exists; flags pass."""
    name, _, function = test.partition("::")
    if "/" not in name:
        return
    path = ROOT / name
    assert path.exists(), f"{why}: no {name}"
    if function:
        source = path.read_text(encoding="utf-8")
        assert f"def {function.split('[')[0].split('::')[-1]}(" in source, f"{why}: {name} has no {function}"
