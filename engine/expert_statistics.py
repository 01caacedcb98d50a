"""Statistics of the experts that real traffic chooses: what an engine counts and what follows. No torch, numpy.

Letters: T tokens in a step, E experts, K experts per token. A `layer` is an index among the MoE layers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Literal

import msgspec

Phase = Literal["decode", "prefill"]


class StepBucket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps of more than most_tokens / 2 and at most `most_tokens` tokens, a power of two.

    tokens: of these steps together. distinct: by layer, the distinct experts of each step, added over the steps.
    """

    most_tokens: int
    steps: int
    tokens: int
    distinct: list[int]


class ExpertStatistics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counted over the steps of an engine. Every layer's `expert_tokens` add up to (tokens of all steps) * K.

    layers: which of the model's layers are MoE. expert_tokens: by layer and expert, the tokens that chose it.
    decode, prefill: the steps, by their number of tokens, ascending, those without any left out; a step with a
    prompt token among its tokens is a prefill step.
    """

    layers: list[int]
    num_experts: int
    top_k: int
    expert_tokens: list[list[int]]
    decode: list[StepBucket]
    prefill: list[StepBucket]

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(bucket.tokens for bucket in (*self.decode, *self.prefill))

    def steps(self, phase: Phase | None = None) -> int:
        """Steps of one phase, or of both."""
        return sum(bucket.steps for bucket in self.buckets(phase))

    def buckets(self, phase: Phase | None = None) -> list[StepBucket]:
        """Return the buckets of one phase, or of both added up."""
        if phase is not None:
            return self.decode if phase == "decode" else self.prefill
        return _added(self.decode, self.prefill)

    def distinct_per_step(self, layer: int, phase: Phase | None = None) -> float:
        """Distinct experts of a step, on average; NaN without steps."""
        buckets = self.buckets(phase)
        steps = sum(bucket.steps for bucket in buckets)
        return sum(bucket.distinct[layer] for bucket in buckets) / steps if steps else math.nan

    def imbalance(self, layer: int) -> float:
        """Tokens of the most chosen expert over those of the mean one: 1 to E / K; NaN without tokens."""
        counts = self.expert_tokens[layer]
        return max(counts) * len(counts) / sum(counts) if any(counts) else math.nan

    def entropy_share(self, layer: int) -> float:
        """Entropy of the choices over log E: 1 if all experts are chosen alike; NaN without tokens."""
        counts = self.expert_tokens[layer]
        total = sum(counts)
        if not total or len(counts) < 2:
            return math.nan
        return -sum(n / total * math.log(n / total) for n in counts if n) / math.log(len(counts))


def bucket_index(tokens: int) -> int:
    """The bucket of a step of `tokens` >= 1: i holds more than 2^(i-1), up to 2^i."""
    return (tokens - 1).bit_length()


def expected_distinct(statistics: ExpertStatistics, layer: int, tokens: float, phase: Phase | None = None) -> float:
    """Distinct experts that a step of `tokens` tokens needs in one layer, from what was measured.

    If tokens chose independently, each expert e with its measured share p_e of all tokens, that were

        f(T) = sum over e of 1 - (1 - p_e)^T

    which is E (1 - (1 - K/E)^T) where all p_e are equal. Tokens of one prompt resemble each other, so that fewer
    experts are touched: f is multiplied with measured / f(mean T) of the buckets, interpolated in log T between
    them. At one token the ratio is 1, as f(1) = K; beyond the largest bucket it stays what it was there. (f bends
    within a bucket: where steps of 33 to 64 tokens are mixed, its ratio is up to 2 % low.) `phase`: the ratios of
    decode or of prefill steps alone; the shares are those of all tokens. Raises ValueError where nothing was
    counted, and for negative tokens.
    """
    distinct = independent_distinct(statistics, layer, tokens)
    if tokens < 1:
        return distinct
    points = [(0.0, 1.0)]
    for bucket in statistics.buckets(phase):
        mean_tokens = bucket.tokens / bucket.steps
        ratio = bucket.distinct[layer] / bucket.steps / independent_distinct(statistics, layer, mean_tokens)
        if mean_tokens > 1:
            points.append((math.log2(mean_tokens), ratio))
    distinct *= _interpolated(points, math.log2(tokens))
    return min(max(distinct, float(statistics.top_k)), float(statistics.num_experts))


def independent_distinct(statistics: ExpertStatistics, layer: int, tokens: float) -> float:
    """f(T) of `expected_distinct`: as if tokens chose independently. Raises as that does."""
    if not 0 <= layer < len(statistics.layers):
        raise ValueError(f"layer {layer} of {len(statistics.layers)} MoE layers")
    if not 0 <= tokens < math.inf:
        raise ValueError(f"tokens {tokens}: a step has 0 or more")
    counts, total = statistics.expert_tokens[layer], statistics.tokens
    if total == 0:
        raise ValueError("the expert statistics hold no steps")
    if tokens < 1:
        return tokens * statistics.top_k
    return sum(1.0 if n >= total else -math.expm1(tokens * math.log1p(-n / total)) for n in counts)


def difference(later: ExpertStatistics, earlier: ExpertStatistics) -> ExpertStatistics:
    """Return what was counted between two readings of one engine. Raises ValueError if they are of two engines."""
    if (later.layers, later.num_experts, later.top_k) != (earlier.layers, earlier.num_experts, earlier.top_k):
        raise ValueError("expert statistics of two models")
    found = msgspec.structs.replace(
        later,
        expert_tokens=[
            [new - old for new, old in zip(*rows, strict=True)]
            for rows in zip(later.expert_tokens, earlier.expert_tokens, strict=True)
        ],
        decode=_added(later.decode, earlier.decode, sign=-1),
        prefill=_added(later.prefill, earlier.prefill, sign=-1),
    )
    if min((bucket.steps for bucket in (*found.decode, *found.prefill)), default=0) < 0:
        raise ValueError("the earlier expert statistics hold more steps than the later: the engine began anew")
    return found


def _interpolated(points: list[tuple[float, float]], x: float) -> float:
    """Straight between points of ascending x, level beyond them."""
    after = bisect_right(points, (x, math.inf))
    if after == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _added(some: list[StepBucket], others: list[StepBucket], sign: int = 1) -> list[StepBucket]:
    """Bucket by bucket some + sign * others, those left out that then hold nothing."""
    mine, theirs = ({bucket.most_tokens: bucket for bucket in side} for side in (some, others))
    found = []
    for most in sorted(mine | theirs):
        none = StepBucket(most_tokens=most, steps=0, tokens=0, distinct=[0] * len((mine | theirs)[most].distinct))
        a, b = mine.get(most, none), theirs.get(most, none)
        bucket = StepBucket(
            most_tokens=most,
            steps=a.steps + sign * b.steps,
            tokens=a.tokens + sign * b.tokens,
            distinct=[x + sign * y for x, y in zip(a.distinct, b.distinct, strict=True)],
        )
        if bucket.steps:
            found.append(bucket)
    return found
