"""Small statistics of timings: summaries, spread, paired ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median as median  # for all of bench

import msgspec
import numpy as np


class Summary(msgspec.Struct, frozen=True):
    """A sample at a glance, in the unit of its values; all zero for an empty one."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


def summarise(values: Sequence[float]) -> Summary:
    """Count, mean and the percentiles that latency is reported in."""
    if not values:
        return Summary()
    percentiles = np.percentile(values, (50, 90, 99, 100)).tolist()
    return Summary(len(values), math.fsum(values) / len(values), *percentiles)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far the rounds of one measurement lie apart."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else math.inf


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ours[i] / theirs[i]: rounds that ran side by side share the machine's mood. Raises ValueError for
    unequal lengths or none."""
    return median([our / their for our, their in zip(ours, theirs, strict=True)])
