"""Arrivals and prompts are functions of their seed."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cierzo.bench.traces import random_prompt
from cierzo.bench.workload import poisson_arrivals


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = poisson_arrivals(20_000, rate=50.0, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.05)  # of an exponential; 0 for evenly spaced arrivals


def test_seeds_repeat_and_differ() -> None:
    assert poisson_arrivals(5, 1.0, 7) == poisson_arrivals(5, 1.0, 7)
    assert poisson_arrivals(5, 1.0, 7) != poisson_arrivals(5, 1.0, 8)
    prompts = {tuple(random_prompt(index, 8, 1000, seed)) for index in range(20) for seed in range(2)}
    assert len(prompts) == 40
    assert random_prompt(3, 8, 1000, 0) == random_prompt(3, 8, 1000, 0)


def test_prompts_lie_in_the_vocabulary() -> None:
    ids = random_prompt(0, 500, 16, seed=0)
    assert len(ids) == 500
    assert set(ids) == set(range(16))
