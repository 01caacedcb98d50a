"""Summaries, and the pairing of rounds."""

from __future__ import annotations

import pytest

from cierzo.bench.stats import paired_ratio, spread, summarise


def test_summary() -> None:
    summary = summarise([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (summary.count, summary.mean, summary.p50, summary.max) == (5, 22.0, 3.0, 100.0)
    assert (summary.p90, summary.p99) == pytest.approx((61.6, 96.16))  # between 4 and 100
    assert summarise([]).count == 0


def test_spread_is_relative_to_the_median() -> None:
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)


def test_ratio_pairs_rounds() -> None:
    """Rounds of very different speed, equal but for one; the ratio of the medians would say 2.5."""
    assert paired_ratio([1.0, 5.0, 10.0], [1.0, 2.0, 10.0]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])
