"""Percentiles against numpy, and the pairing of rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cierzo.bench.stats import median, paired_ratio, percentile, spread, summarise

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(VALUES, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert math.isclose(percentile(values, percent), np.percentile(values, percent), rel_tol=1e-9, abs_tol=1e-6)


def test_percentile_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="101"):
        percentile([1.0], 101)


def test_summary() -> None:
    summary = summarise([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (summary.count, summary.mean, summary.p50, summary.max) == (5, 22.0, 3.0, 100.0)
    assert 4.0 < summary.p90 < summary.p99 < 100.0
    assert summarise([]).count == 0


def test_spread_is_relative_to_the_median() -> None:
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert median([1.0, 2.0, 3.0, 10.0]) == 2.5


def test_ratio_pairs_rounds() -> None:
    """Rounds of very different speed, equal but for one; the ratio of the medians would say 2.5."""
    assert paired_ratio([1.0, 5.0, 10.0], [1.0, 2.0, 10.0]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])
