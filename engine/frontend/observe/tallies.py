"""Plain numbers that the front end counts while it works. Pure; `Collector` tells them to Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from math import nan

from cierzo.engine.frontend.sample import NEVER_S, Sample

# Upper bounds of latencies, seconds.
BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Histogram:
    """Counts of durations, by bucket; the last one has those beyond all bounds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration, so many times."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += times
        self.sum_s += seconds * times


class Pace:
    """Times between the tokens of each sample. Nearly all samples that get tokens in a step had some in the step
    before, so they share one gap: it is counted by a number that goes up, and entered once the step is over.

    before_s, now_s: times of the last two steps that had tokens.
    """

    __slots__ = ("before_s", "gaps", "now_s", "num_others", "num_shared")

    def __init__(self) -> None:
        self.gaps = Histogram()
        self.before_s = self.now_s = nan
        self.num_shared = self.num_others = 0

    def step(self, now: float) -> None:
        """A step's output has come."""
        self.enter()
        if self.num_others:
            self.before_s, self.num_others = self.now_s, 0
        self.now_s = now

    def enter(self) -> None:
        """Count the gaps of the last step, as far as that is not done."""
        if self.num_shared:
            self.gaps.add(self.now_s - self.before_s, self.num_shared)
            self.num_others += 1  # the step had tokens
            self.num_shared = 0

    def apart(self, sample: Sample) -> None:
        """Count the gap of a sample that had no token in the step before."""
        self.num_others += 1
        if sample.last_s != NEVER_S:
            self.gaps.add(self.now_s - sample.last_s)


class TenantTally:
    """Sums over the requests of a tenant. `ends`: how many ended how; the other fields are those of its cost
    records, added up."""

    __slots__ = (
        "cached_tokens",
        "computed_tokens",
        "ends",
        "first_tokens",
        "kv_block_s",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "recomputed_tokens",
        "steps",
    )

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}
        self.first_tokens = Histogram()
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.computed_tokens = self.recomputed_tokens = self.steps = self.preemptions = 0
        self.kv_block_s = 0.0

    def count(self, end: str) -> None:
        """Count the end of a request."""
        self.ends[end] = self.ends.get(end, 0) + 1
