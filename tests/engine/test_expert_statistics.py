"""What follows from counted experts, against sums written out and against simulated routing."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import msgspec
import pytest

from cierzo.engine.expert_statistics import (
    ExpertStatistics,
    StepBucket,
    bucket_index,
    difference,
    expected_distinct,
)


def one_layer(expert_tokens: list[int], top_k: int, decode: list[tuple[int, int, int, int]]) -> ExpertStatistics:
    buckets = [StepBucket(most_tokens=m, steps=s, tokens=t, distinct=[d]) for m, s, t, d in decode]
    return ExpertStatistics(
        layers=[0],
        num_experts=len(expert_tokens),
        top_k=top_k,
        expert_tokens=[expert_tokens],
        decode=buckets,
        prefill=[],
    )


@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (1024, 10)])
def test_buckets_end_at_powers_of_two(tokens: int, index: int) -> None:
    assert bucket_index(tokens) == index


def test_equal_shares_give_the_formula_of_uniform_routing() -> None:
    statistics = one_layer([25] * 8, 2, [(1, 100, 100, 200)])  # 100 tokens, two experts each of 8
    for tokens in (1, 2, 7, 500):
        assert expected_distinct(statistics, 0, tokens) == pytest.approx(8 * (1 - (1 - 2 / 8) ** tokens))
    assert expected_distinct(statistics, 0, 0) == 0


def test_an_expert_of_every_token_and_one_of_none() -> None:
    statistics = one_layer([10, 10, 0], 2, [(1, 10, 10, 20)])
    assert expected_distinct(statistics, 0, 1) == expected_distinct(statistics, 0, 1e6) == 2


def test_measured_buckets_correct_the_formula_and_are_interpolated_in_log_tokens() -> None:
    # 8 experts, K = 2, uniform; steps of 4 tokens touched 4 experts, where independent tokens touch 5.47
    uniform = [8 * (1 - 0.75**tokens) for tokens in range(65)]
    statistics = one_layer([10] * 8, 2, [(4, 10, 40, 40)])
    ratio = 4 / uniform[4]
    assert expected_distinct(statistics, 0, 4) == pytest.approx(4)
    assert expected_distinct(statistics, 0, 2) == pytest.approx(uniform[2] * (1 + ratio) / 2)  # half way to 1
    assert expected_distinct(statistics, 0, 64) == pytest.approx(uniform[64] * ratio)
    assert expected_distinct(statistics, 0, 64, "prefill") == pytest.approx(uniform[64])  # nothing was measured
    assert expected_distinct(statistics, 0, 4, "decode") == pytest.approx(4)


def test_two_buckets_are_met_and_joined_by_a_line() -> None:
    statistics = one_layer([100] * 8, 2, [(4, 20, 80, 100), (16, 20, 320, 120)])
    f = [8 * (1 - 0.75**tokens) for tokens in range(17)]
    assert expected_distinct(statistics, 0, 4) == pytest.approx(5)
    assert expected_distinct(statistics, 0, 16) == pytest.approx(6)
    assert expected_distinct(statistics, 0, 8) == pytest.approx(f[8] * (5 / f[4] + 6 / f[16]) / 2)


def test_a_step_needs_at_least_one_tokens_experts_and_at_most_all() -> None:
    low = one_layer([10] * 8, 2, [(4, 10, 40, 10)])  # cannot be: less than K a step
    assert expected_distinct(low, 0, 4) == 2
    high = one_layer([10] * 8, 2, [(4, 10, 40, 80)])
    assert expected_distinct(high, 0, 64) == 8


def test_simulated_skewed_routing_is_predicted_between_and_beyond_the_buckets() -> None:
    """Independent tokens with skewed shares: E (1 - (1 - K/E)^T) is off by far, the measured shares are not."""
    generator = random.Random(1)
    weights = [1 / (e + 1) for e in range(32)]

    def step(tokens: int) -> set[int]:
        return {e for _ in range(tokens) for e in choose()}

    def choose() -> list[int]:
        chosen: list[int] = []
        while len(chosen) < 4:
            (e,) = generator.choices(range(32), weights)
            if e not in chosen:
                chosen.append(e)
        return chosen

    counts = [0] * 32
    for _ in range(4000):
        for e in choose():
            counts[e] += 1
    statistics = one_layer(counts, 4, [(1, 4000, 4000, 16000)])
    for tokens in (3, 8, 40):
        measured = sum(len(step(tokens)) for _ in range(300)) / 300
        uniform = 32 * (1 - (1 - 4 / 32) ** tokens)
        assert expected_distinct(statistics, 0, tokens) == pytest.approx(measured, rel=0.03)
        assert abs(uniform - measured) > 0.06 * measured


def test_imbalance_and_entropy() -> None:
    even = one_layer([5] * 4, 1, [(1, 20, 20, 20)])
    assert (even.imbalance(0), even.entropy_share(0)) == (1, pytest.approx(1))
    skewed = one_layer([15, 5, 0, 0], 1, [(1, 20, 20, 20)])
    assert skewed.imbalance(0) == 3
    assert skewed.entropy_share(0) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    nothing = one_layer([0] * 4, 1, [])
    assert all(map(math.isnan, (nothing.imbalance(0), nothing.entropy_share(0), nothing.distinct_per_step(0))))


def test_both_phases_are_added_up_and_a_reading_is_subtracted() -> None:
    one, two = (StepBucket(most_tokens=m, steps=2, tokens=m * 2, distinct=[m]) for m in (2, 4))
    later = msgspec.structs.replace(one_layer([9, 9], 1, []), decode=[one, two], prefill=[two])
    assert (later.tokens, later.steps(), later.steps("prefill")) == (20, 6, 2)
    assert [(b.most_tokens, b.steps, b.tokens, b.distinct) for b in later.buckets()] == [
        (2, 2, 4, [2]),
        (4, 4, 16, [8]),
    ]
    assert later.distinct_per_step(0) == pytest.approx(10 / 6)
    earlier = msgspec.structs.replace(one_layer([4, 5], 1, []), decode=[one])
    between = difference(later, earlier)
    assert (between.expert_tokens, between.decode, between.prefill) == ([[5, 4]], [two], [two])
    with pytest.raises(ValueError, match="began anew"):
        difference(earlier, later)
    with pytest.raises(ValueError, match="two models"):
        difference(later, one_layer([1, 1, 1], 1, []))


def test_what_cannot_be_answered_is_refused() -> None:
    counted, nothing = one_layer([5] * 4, 1, [(1, 20, 20, 20)]), one_layer([0] * 4, 1, [])
    with pytest.raises(ValueError, match="no steps"):
        expected_distinct(nothing, 0, 1)
    for tokens in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tokens"):
            expected_distinct(counted, 0, tokens)
    for layer in (-1, 1):
        with pytest.raises(ValueError, match=f"layer {layer} of 1"):
            expected_distinct(counted, layer, 1)


def test_the_module_stands_without_torch_and_numpy() -> None:
    code = "import sys, cierzo.engine.expert_statistics; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
