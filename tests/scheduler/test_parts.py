"""Stop rule, policy, queue, legal moves: the scheduler's small parts alone."""

from __future__ import annotations

import itertools
import random

import pytest

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler import policy
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.queue import COMPACT_ABOVE, RequestHeap, SiblingGate
from cierzo.scheduler.request import LEGAL_MOVES, NewRequest, Request, State
from cierzo.scheduler.stop import stop_rule
from cierzo.scheduler.tenants import Tenants

SAMPLING = SamplingParams(seed=0)


def request(request_id: int, sample: int = 0, order: tuple[float, int] = (0.0, 0)) -> Request:
    blocks = KVCacheManager(CacheConfig(num_blocks=1)).open([1], 1)
    new = NewRequest(request_id=request_id, sample=sample, prompt_token_ids=(1,), sampling=SAMPLING)
    rule, tenant = stop_rule(SAMPLING, (), 1, 8), Tenants(1, 1).arrive("", 1.0)
    return Request((request_id, sample), new, [1], 1, blocks, rule, order, 0.0, tenant)


# --- stop ------------------------------------------------------------------------------------------------------


def test_eos_stop_tokens_and_lengths() -> None:
    sampling = SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=(8,))
    rule = stop_rule(sampling, (7, 9), num_prompt_tokens=10, max_model_len=100)
    assert rule.check(7, 11) is None  # one output token, two are due
    assert [rule.check(token, 12) for token in (7, 8, 9, 6)] == ["stop", "stop", "stop", None]
    assert (rule.check(6, 14), rule.check(6, 15), rule.check(7, 15)) == (None, "length", "stop")


def test_ignored_eos_leaves_the_stop_tokens() -> None:
    rule = stop_rule(SamplingParams(ignore_eos=True, stop_token_ids=(8,)), (7,), 1, 100)
    assert (rule.check(7, 5), rule.check(8, 5)) == (None, "stop")


def test_the_models_length_cuts_max_tokens() -> None:
    rule = stop_rule(SamplingParams(max_tokens=50), (), 10, max_model_len=12)
    assert (rule.check(1, 11), rule.check(1, 12)) == (None, "length")


# --- policy ----------------------------------------------------------------------------------------------------


def test_a_level_of_priority_is_worth_its_seconds() -> None:
    late_urgent = policy.waiting_order(29.0, 0, 30.0, 2)
    early_patient = policy.waiting_order(0.0, 1, 30.0, 1)
    assert late_urgent < early_patient
    assert early_patient < policy.waiting_order(31.0, 0, 30.0, 3)
    assert policy.waiting_order(0.0, 0, 30.0, 1) < policy.waiting_order(0.0, 0, 30.0, 2)


@pytest.mark.parametrize(
    ("missing", "budget", "contended", "chunk"),
    [
        (5000, 2048, False, 2048),  # alone: all there is
        (100, 2048, False, 100),
        (5000, 2048, True, 1024),
        (5000, 1000, True, 500),  # half of the rest
        (1024, 1100, True, 1024),  # short: whole
        (1024, 700, True, 700),
        (5000, 1, True, 1),  # never nothing
    ],
)
def test_chunks(missing: int, budget: int, contended: bool, chunk: int) -> None:
    assert policy.chunk_tokens(missing, budget, 1024, contended) == chunk


# --- queue -----------------------------------------------------------------------------------------------------


def test_the_heap_gives_the_least_whatever_was_removed() -> None:
    rng = random.Random(1)
    heap = RequestHeap()
    living: dict[tuple[float, int], Request] = {}
    for number in range(2000):
        if rng.random() < 0.55 or not living:
            order = (float(rng.randrange(5)), number)
            living[order] = request(number)
            heap.push(living[order], order)
        else:
            order = rng.choice(list(living)) if rng.random() < 0.7 else min(living)
            heap.discard(living.pop(order))
        entry = heap.first()
        assert (entry and entry[:2]) == (min(living) if living else None)
        assert len(heap) == len(living)
    assert set(heap) == set(living.values())


def test_the_heap_does_not_grow_by_what_was_removed() -> None:
    heap = RequestHeap()
    heap.push(request(0), (0.0, 0))
    for number in range(1, 1000):
        other = request(number)
        heap.push(other, (1.0, number))
        heap.discard(other)
    assert len(heap._heap) <= 2 * COMPACT_ABOVE


def test_a_request_that_returns_under_another_order_counts_once() -> None:
    heap = RequestHeap()
    one, other = request(1), request(2)
    heap.push(one, (0.0, 1))
    heap.push(other, (1.0, 2))
    heap.discard(one)
    heap.push(one, (2.0, 1))
    assert heap.first() == (1.0, 2, other)
    heap.discard(other)
    assert heap.first() == (2.0, 1, one)


# --- siblings --------------------------------------------------------------------------------------------------


def test_siblings_are_held_until_the_prompt_is_computed() -> None:
    gate = SiblingGate()
    samples = [request(5, sample) for sample in range(3)]
    assert [gate.enter(sample) for sample in samples] == [True, False, False]
    assert gate.enter(request(6))
    assert gate.prompt_computed(samples[1]) == []
    assert gate.prompt_computed(samples[0]) == samples[1:]
    assert len(gate) == 0


def test_the_lead_is_handed_on() -> None:
    gate = SiblingGate()
    samples = [request(5, sample) for sample in range(4)]
    for sample in samples:
        gate.enter(sample)
    assert gate.ended(samples[1]) is None  # was held
    assert gate.ended(samples[0]) is samples[2]
    assert len(gate) == 1
    gate.check({sample.key: sample for sample in samples[2:]})
    assert gate.prompt_computed(samples[2]) == [samples[3]]
    assert gate.ended(samples[2]) is None
    assert gate.enter(request(5, 9))


# --- moves -----------------------------------------------------------------------------------------------------


def test_only_legal_moves() -> None:
    for start, end in itertools.product(State, State):
        subject = request(1)
        subject.state = start
        if end in LEGAL_MOVES[start]:
            subject.move(end)
            assert subject.state is end
        else:
            with pytest.raises(AssertionError):
                subject.move(end)
