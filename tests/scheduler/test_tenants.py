"""Tenants share a step and the room: cases by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler import policy
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult
from cierzo.scheduler.request import NewRequest
from cierzo.scheduler.scheduler import Scheduler


class Bench:
    """A scheduler of 100 steps a second, whose tokens are all 7. `computed`: prompt tokens of each tenant."""

    def __init__(self, *, num_blocks: int = 256, prefix_caching: bool = False, **limits: Any) -> None:
        self.now = 0.0
        self.cache = KVCacheManager(
            CacheConfig(num_blocks=num_blocks, block_tokens=4, prefix_caching=prefix_caching)
        )
        defaults = {"budget_tokens": 16, "max_chunk_tokens": 8, "max_running": 8, "max_model_len": 256}
        self.scheduler = Scheduler(SchedulerConfig(**{**defaults, **limits}), self.cache, lambda: self.now)
        self.names: dict[int, str] = {}
        self.computed: Counter[str] = Counter()

    def add(self, name: str, num_tokens: int = 8, max_tokens: int = 1, weight: float = 1.0, **fields: Any) -> int:
        request_id = len(self.names)
        self.names[request_id] = name
        self.scheduler.add(
            NewRequest(
                request_id=request_id,
                prompt_token_ids=(1,) * num_tokens,
                sampling=SamplingParams(seed=1, max_tokens=max_tokens),
                tenant=name,
                weight=weight,
                **fields,
            )
        )
        return request_id

    def step(self) -> StepPlan:
        self.now += 0.01
        plan = self.scheduler.schedule()
        self.scheduler.check()
        for seq in plan.seqs:
            self.computed[self.names[seq.key[0]]] += len(seq.token_ids) * (seq.start < seq.num_prompt_tokens)
        self.scheduler.commit(plan, StepResult([[7] if seq.samples else [] for seq in plan.seqs]))
        self.scheduler.check()
        return plan

    def steps(self, count: int) -> Counter[str]:
        """Prompt tokens computed for each tenant in so many steps."""
        before = self.computed.copy()
        for _ in range(count):
            self.step()
        return self.computed - before

    def running(self) -> list[int]:
        return sorted(key[0] for key in self.scheduler._running)


def test_two_who_always_wait_get_the_same_and_a_third_of_double_weight_gets_twice_as_much() -> None:
    bench = Bench()
    for _ in range(300):
        bench.add("a")
        bench.add("b", weight=1.0)
        bench.add("c", weight=2.0)
    got = bench.steps(60)
    assert sum(got.values()) >= 60 * 15
    assert got["b"] / got["a"] == pytest.approx(1.0, abs=0.05)
    assert got["c"] / got["a"] == pytest.approx(2.0, abs=0.1)


def test_a_flood_before_does_not_delay_and_a_step_is_divided() -> None:
    bench = Bench()
    for _ in range(50):
        bench.add("a", num_tokens=20)
    bench.steps(5)
    late = bench.add("b", num_tokens=6)
    plan = bench.step()
    assert [seq.samples for seq in plan.seqs if seq.key[0] == late] == [True]
    assert len({bench.names[seq.key[0]] for seq in plan.seqs}) == 2


def test_who_was_idle_gains_no_credit() -> None:
    bench = Bench()
    bench.add("b")
    for _ in range(200):
        bench.add("a")
    bench.steps(40)  # b has been gone for most of them
    for _ in range(100):
        bench.add("b")
    got = bench.steps(20)
    assert got["a"] == pytest.approx(got["b"], rel=0.1)


def test_a_slow_stream_gathers_no_credit_either() -> None:
    bench = Bench(max_running=4)
    bench.add("b", max_tokens=200)
    for _ in range(400):
        bench.add("a")
    bench.steps(100)  # b decodes one token a step, a all the rest
    for _ in range(100):
        bench.add("b")
    got = bench.steps(20)
    assert got["a"] >= 0.8 * got["b"]


@pytest.mark.parametrize("answer_tokens", [1, 12])
def test_who_fills_its_share_of_slots_and_waits_gathers_no_credit(answer_tokens: int) -> None:
    bench = Bench(max_running=4)
    slow = [bench.add("b", max_tokens=240) for _ in range(8)]
    for _ in range(500):
        bench.add("a", num_tokens=30, max_tokens=answer_tokens)
    bench.steps(100)
    table = bench.scheduler._tenants._table
    assert table["a"].counter - table["b"].counter < 60
    assert slow[-1] in {request.key[0] for request in bench.scheduler._tenants.waiting()}


def test_debt_stays_with_whoever_leaves() -> None:
    """Who was served more than the others does not wash it off by an absence."""
    bench = Bench()
    bench.add("b", num_tokens=4, max_tokens=200)
    streams = [bench.add("a", num_tokens=4, max_tokens=200) for _ in range(3)]
    bench.steps(40)
    table = bench.scheduler._tenants._table
    debt = table["a"].counter
    assert debt > 2.5 * table["b"].counter
    for request_id in streams:
        bench.scheduler.abort(request_id)
    bench.steps(5)
    bench.add("a")
    assert table["a"].counter == debt


def test_the_table_forgets_who_is_even() -> None:
    bench = Bench()
    for number in range(100):
        bench.add(f"tenant {number}")
        bench.steps(3)
    assert len(bench.scheduler._tenants._table) <= 1


# --- room ------------------------------------------------------------------------------------------------------


def test_who_is_within_its_share_takes_a_slot_and_keeps_it() -> None:
    bench = Bench(max_running=4)
    for _ in range(8):
        bench.add("a", max_tokens=60)
    bench.steps(3)
    assert bench.running() == [0, 1, 2, 3]
    first, second, third = (bench.add("b", max_tokens=30) for _ in range(3))
    bench.step()
    assert bench.running() == [0, 1, first, second]  # the last two of a gave way, and no more than its excess
    before = bench.scheduler.stats().preemptions
    bench.steps(20)
    assert bench.running() == [0, 1, first, second]
    assert bench.scheduler.stats().preemptions == before == 2  # nobody takes anything back
    assert third not in bench.running()


def test_who_is_within_its_share_takes_blocks() -> None:
    bench = Bench(num_blocks=40, max_model_len=160, budget_tokens=64, max_chunk_tokens=64)
    for _ in range(4):
        bench.add("a", num_tokens=30, max_tokens=20)  # 8 blocks, and more by and by
    bench.steps(6)
    assert bench.cache.num_free < 8
    small = bench.add("b", num_tokens=40, max_tokens=4)
    bench.step()
    assert small in bench.running()
    assert 0 in bench.running()
    assert bench.scheduler.stats().preemptions >= 1


def test_nobody_is_preempted_in_vain() -> None:
    """The first of all is spared; where the others' room would not do, they keep it."""
    bench = Bench(num_blocks=40, max_model_len=160, budget_tokens=160, max_chunk_tokens=160)
    bench.add("a", num_tokens=120, max_tokens=20)  # 30 blocks
    bench.add("a", num_tokens=8, max_tokens=20)
    bench.steps(2)
    bench.add("b", num_tokens=60, max_tokens=4)
    bench.steps(3)
    assert bench.running() == [0, 1]
    assert bench.scheduler.stats().preemptions == 0


def test_growth_takes_from_whoever_is_most_above_its_share() -> None:
    bench = Bench(num_blocks=16, max_model_len=64, budget_tokens=64, max_chunk_tokens=64)
    bench.add("a", num_tokens=4, max_tokens=50)
    bench.add("a", num_tokens=4, max_tokens=50)
    bench.add("a", num_tokens=4, max_tokens=50)
    young = bench.add("b", num_tokens=4, max_tokens=50)
    while not bench.scheduler.stats().preemptions:
        bench.step()
    assert bench.running() == [0, 1, young]  # without tenants the youngest of all would have gone


def test_a_large_request_is_not_starved_by_a_flood_of_small_ones() -> None:
    bench = Bench(num_blocks=40, max_model_len=160, max_running=8, max_waiting=2000)
    bench.add("a", num_tokens=8, max_tokens=20)
    for _ in range(8):
        bench.add("b", num_tokens=4, max_tokens=6)
    bench.steps(2)
    large = bench.add("a", num_tokens=140, max_tokens=4)  # more than a's share of the room
    for _ in range(120):
        bench.add("b", num_tokens=4, max_tokens=6)
        bench.step()
    assert large not in {request.key[0] for request in bench.scheduler.requests()}


def test_a_request_that_waits_for_a_long_answer_stops_nobody_else() -> None:
    def served(num_tokens: int) -> Counter[str]:
        """Prompt tokens of each in 100 steps, beside an answer that holds a fifth of the room all the time."""
        bench = Bench(num_blocks=100, max_model_len=400, max_running=8, max_waiting=2000)
        bench.add("c", num_tokens=60, max_tokens=300)
        bench.steps(5)
        if num_tokens:
            bench.add("b", num_tokens=num_tokens)
        return bench_served(bench)

    def bench_served(bench: Bench) -> Counter[str]:
        before = bench.computed.copy()
        for _ in range(100):
            bench.add("a", num_tokens=4, max_tokens=6)
            bench.step()
        return bench.computed - before

    alone, beside = served(0), served(340)
    assert beside["b"] == 0
    assert beside["a"] >= 0.95 * alone["a"]
    assert served(240)["b"] == 240  # this one waits for nobody but those who come later


def test_priorities_order_a_tenant_s_own_requests_alone() -> None:
    for priority in (0, -100):
        bench = Bench(num_blocks=40, max_model_len=160, max_running=8)
        old = bench.add("a", num_tokens=8, max_tokens=100)
        bench.steps(3)
        bench.add("b", num_tokens=100, max_tokens=40, priority=priority)
        bench.steps(12)
        claims = bench.add("a", num_tokens=40, max_tokens=1)  # within its half of the room
        bench.steps(8)
        assert claims not in {request.key[0] for request in bench.scheduler.requests()}, priority
        assert old in bench.running()


def test_room_that_nobody_claims_is_anybody_s() -> None:
    bench = Bench(max_running=4)
    bench.add("b", max_tokens=100)
    for _ in range(6):
        bench.add("a", max_tokens=100)
    bench.steps(4)
    assert bench.running() == [0, 1, 2, 3]


# --- salts, weights --------------------------------------------------------------------------------------------


def test_requests_of_different_salts_share_no_block() -> None:
    bench = Bench(prefix_caching=True)
    found = []
    for salt in (b"", b"one", b"two", b"one"):
        bench.add("a", num_tokens=40, salt=salt)
        found.append(bench.step().seqs[0].start)
        bench.steps(6)
    assert found == [0, 0, 0, 36]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_is_above_nothing(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Bench().add("a", weight=weight)


def test_what_a_chunk_is_charged_for() -> None:
    assert policy.first_computed(0, 5, 0, 10) == (5, 5)
    assert policy.first_computed(5, 4, 5, 10) == (5, 10)  # the last one will be a decode row
    assert policy.first_computed(0, 10, 10, 10) == (0, 10)  # after a preemption
    assert policy.first_computed(4, 8, 6, 10) == (4, 10)  # two again, four new, two that were generated
