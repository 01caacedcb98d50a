"""Lines of Python that each folder may have: a change that needs more raises its number, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

# Folder -> lines. A file counts for the longest folder that it lies in.
BUDGET = {
    "src": 230,
    "engine": 5_200,
    "engine/cost": 1_500,
    "engine/frontend": 14_550,
    "engine/gateway": 6_040,
    "engine/testing": 1_050,
    "engine/model": 1_570,
    "engine/text": 5_620,
    "engine/weights": 4_250,
    "engine/worker": 5_010,
    "engine/commands": 900,
    "kernels": 630,
    "kernels/cpu": 1_630,
    "kernels/cuda": 950,
    "kernels/formats": 1_340,
    "kernels/ops": 1_750,
    "kernels/ref": 1_010,
    "kernels/triton": 6_120,
    "scheduler": 2_460,
    "cache": 720,
    "bench": 10_490,
    "bench/plan": 1_510,
}
# Benchmarks, plans and the count of work, together.
MEASURING = ("bench", "engine/cost")
MEASURING_BUDGET = 13_480


@pytest.fixture(scope="module")
def lines(root: Path, tracked: list[Path]) -> dict[Path, int]:
    """Lines of every Python file that is not a test."""
    files = [path for path in tracked if path.suffix == ".py" and path.parts[0] != "tests" and len(path.parts) > 1]
    return {path: (root / path).read_text(encoding="utf-8").count("\n") for path in files}


def _folder(path: Path) -> str:
    """The budget's folder that a file counts for."""
    fitting = [folder for folder in BUDGET if Path(folder) in path.parents]
    assert fitting, f"{path} is in no folder of the budget"
    return max(fitting, key=len)


def test_no_folder_exceeds_its_budget(lines: dict[Path, int]) -> None:
    sizes = dict.fromkeys(BUDGET, 0)
    for path, count in lines.items():
        sizes[_folder(path)] += count
    grown = [
        f"{folder}: {size:,} lines, its budget is {BUDGET[folder]:,}"
        for folder, size in sizes.items()
        if size > BUDGET[folder]
    ]
    assert not grown, "\n".join([*grown, "Find what can go. Else raise the number, with a reason in the commit."])


def test_what_measures_is_smaller_than_what_is_measured(lines: dict[Path, int]) -> None:
    size = sum(count for path, count in lines.items() if any(Path(folder) in path.parents for folder in MEASURING))
    assert size <= MEASURING_BUDGET, f"{MEASURING}: {size:,} lines, together at most {MEASURING_BUDGET:,}"
