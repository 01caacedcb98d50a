"""Launches through Triton's own compiler and launcher on the stand-in for a card: values, refusals, faults,
delay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from standin.ask import ask
from standin.library import available

from cierzo.kernels.triton import heuristics, moe, norm

pytestmark = pytest.mark.skipif(not available(), reason="Triton's wheels are for Linux on x86-64")
FOLDER = Path(__file__).parents[2] / "support" / "standin"
CASES = [
    name
    for file in ("launches.py", "calls.py")
    for name in re.findall(r"^@case\ndef (\w+)\(", (FOLDER / file).read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("standin")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, str]:
    """Errors by case. One process runs them: it imports torch once."""
    answers: dict[str, str] = ask("launches", str(folder))
    assert set(answers) == set(CASES)
    return answers


@pytest.mark.parametrize("name", CASES)
def test_it(told: dict[str, str], name: str) -> None:
    assert told[name] == ""


def test_a_launch_has_the_interpreters_bits(told: dict[str, str], folder: Path) -> None:
    x, weight, there = torch.load(folder / "norm.pt")
    assert torch.equal(norm.rms_norm(x, weight, 1e-5), there)


@pytest.mark.parametrize("described_tokens", [20, 1 << 30])
def test_experts_have_the_interpreters_bits(
    told: dict[str, str], folder: Path, described_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in they were read through descriptors; read through pointers, they have the same."""
    x, matrices, weights, order, starts, there = torch.load(folder / "experts.pt", weights_only=False)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", described_tokens)
    here = moe.expert_mlp(x, *matrices[:2], weights, order, starts, *matrices[2:])
    assert torch.equal(here, there)
