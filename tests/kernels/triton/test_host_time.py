"""Host's time of launches, one beside another: what is absolute depends on the machine and on what else it does."""

from __future__ import annotations

from typing import Any

import pytest
from standin.ask import ask
from standin.library import available

pytestmark = pytest.mark.skipif(not available(), reason="Triton's wheels are for Linux on x86-64")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    answer: dict[str, Any] = ask("host_time")
    return answer


def test_a_launch_takes_less_than_half_of_tritons_own_way(told: dict[str, Any]) -> None:
    assert 2 * told["launch"] < told["through Triton"], told


def test_a_launch_of_cuda_has_no_cost_that_only_an_error_has(told: dict[str, Any]) -> None:
    """Words of refusals that were written ahead of every launch took longer than all else."""
    assert told["CUDA C++"] < 4 * told["launch"], told


def test_operations_make_their_configurations_once(told: dict[str, Any]) -> None:
    """With its tensors and choices a launch takes a few times as long as alone; a Configuration would take more."""
    for name, (launches, host_us) in told["operations"].items():
        assert host_us / launches < 8 * told["launch"], (name, told)
