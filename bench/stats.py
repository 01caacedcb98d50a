"""Small statistics of timings: percentiles, medians, spread, paired ratios. No dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """A sample at a glance, in the unit of its values; all zero for an empty one."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default; `percent` in 0 .. 100.

    Raises ValueError for an empty sequence or a `percent` outside its range.
    """
    return _of_sorted(sorted(values), percent)


def _of_sorted(ordered: Sequence[float], percent: float) -> float:
    if not ordered:
        raise ValueError("percentile of no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0 .. 100, got {percent}")
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    """Middle value; the mean of the two middle ones for an even count."""
    return percentile(values, 50)


def summarise(values: Sequence[float]) -> Summary:
    """Count, mean and the percentiles that latency is reported in."""
    if not values:
        return Summary(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)
    p50, p90, p99 = (_of_sorted(ordered, percent) for percent in (50, 90, 99))
    return Summary(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far the rounds of one measurement lie apart."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else math.inf


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ours[i] / theirs[i]: rounds that ran side by side share the machine's mood, so pair them.

    Raises ValueError for unequal lengths or none.
    """
    return median([our / their for our, their in zip(ours, theirs, strict=True)])
