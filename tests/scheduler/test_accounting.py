"""What each request is told to have cost, and that the sums over all of them are the scheduler's counters."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Finish, StepPlan, StepResult
from cierzo.scheduler.request import NewRequest
from cierzo.scheduler.scheduler import Scheduler

EOS = 5


class Booked:
    """A scheduler over few blocks, a clock moved by hand, and each request's cost as counted from the plans."""

    def __init__(self, num_blocks: int = 64, block_tokens: int = 4, **limits: int) -> None:
        self.now = 0.0
        self.cache = KVCacheManager(CacheConfig(num_blocks=num_blocks, block_tokens=block_tokens))
        defaults = {"budget_tokens": 16, "max_chunk_tokens": 8, "max_running": 4, "max_model_len": 20}
        self.scheduler = Scheduler(SchedulerConfig(**{**defaults, **limits}), self.cache, lambda: self.now)
        self.finishes: dict[int, Finish] = {}
        self.rows: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        self.again: dict[int, int] = {}
        self.done: dict[int, set[int]] = {}  # positions that were computed
        self.block_s: dict[int, float] = {}

    def add(self, request_id: int, prompt: list[int], max_tokens: int = 5, output: tuple[int, ...] = ()) -> None:
        self.scheduler.add(
            NewRequest(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                output_token_ids=output,
                sampling=SamplingParams(seed=1, max_tokens=max_tokens),
                eos_token_ids=(EOS,),
            )
        )
        self.collect()

    def wait(self, seconds: float) -> None:
        """Let time pass: whoever holds blocks pays for it."""
        for request in self.scheduler._running.values():
            held = len(request.blocks.block_ids) * seconds
            self.block_s[request.key[0]] = self.block_s.get(request.key[0], 0.0) + held
        self.now += seconds

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.collect()
        return plan

    def commit(self, plan: StepPlan, token: int = 1, failed: int | None = None) -> None:
        """Take a step's result in, and book what of it is taken."""
        for index, seq in enumerate(plan.seqs):
            request = self.scheduler._running.get(seq.key)
            if request is None or request.epoch != seq.epoch or index == failed:
                continue
            number, positions = seq.key[0], range(seq.start, seq.start + len(seq.token_ids))
            done = self.done.setdefault(number, set())
            self.rows[number] = self.rows.get(number, 0) + len(positions)
            self.steps[number] = self.steps.get(number, 0) + 1
            self.again[number] = self.again.get(number, 0) + len(done.intersection(positions))
            done.update(positions)
        failures = {} if failed is None else {failed: "told to"}
        self.scheduler.commit(plan, StepResult([[token] if s.samples else [] for s in plan.seqs], None, failures))
        self.scheduler.check()
        self.collect()

    def step(self) -> None:
        plan = self.schedule()
        self.wait(0.25)
        self.commit(plan)

    def drain(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("work is left, and nothing ends it")

    def collect(self) -> None:
        for delta in self.scheduler.take_deltas():
            if delta.finish is not None:
                self.finishes[delta.request_id] = delta.finish

    def check_books(self) -> None:
        """Each request's cost is what the plans say, and the sums are the counters, exactly."""
        assert not self.scheduler.has_work()
        for number, finish in self.finishes.items():
            expected = [book.get(number, 0) for book in (self.rows, self.again, self.steps)]
            assert [finish.computed_tokens, finish.recomputed_tokens, finish.steps] == expected, number
            assert finish.kv_block_s == self.block_s.get(number, 0.0), number
        stats, finishes = self.scheduler.stats(), [*self.finishes.values()]
        assert stats.computed_tokens == sum(one.computed_tokens for one in finishes)
        assert stats.recomputed_tokens == sum(one.recomputed_tokens for one in finishes)
        assert stats.sequence_steps == sum(one.steps for one in finishes)
        assert stats.preemptions == sum(one.preemptions for one in finishes)
        for order in (finishes, finishes[::-1]):
            total = 0.0
            for one in order:
                total += one.kv_block_s
            assert total == stats.kv_block_s
        assert stats.waiting_tokens == 0


def test_one_request_s_books() -> None:
    """Six tokens in chunks of eight, three tokens out: blocks for six tokens, then one for the ninth and tenth."""
    booked = Booked()
    booked.add(1, [1, 2, 3, 4, 0, 1], max_tokens=4)
    assert booked.scheduler.stats().waiting_tokens == 6
    booked.drain()
    finish = booked.finishes[1]
    assert (finish.computed_tokens, finish.recomputed_tokens, finish.steps) == (6 + 3, 0, 4)
    assert finish.kv_block_s == 0.25 * (2 + 2 + 2 + 3)
    booked.check_books()


@pytest.mark.parametrize(("tokens", "steps"), [([1, 1], 3), ([1, EOS], 2), ([EOS, 1], 2)])
def test_a_step_that_gives_several_tokens_is_one_step(tokens: list[int], steps: int) -> None:
    """Two chunks, and what comes with the second; the first end counts."""
    booked = Booked()
    booked.add(1, [1, 2, 3, 4] * 3, max_tokens=3)
    booked.add(2, [2] * 2, max_tokens=1)
    booked.step()
    plan = booked.schedule()
    booked.scheduler.commit(plan, StepResult([tokens]))
    booked.collect()
    booked.drain()
    assert booked.finishes[1].steps == steps
    assert booked.scheduler.stats().sequence_steps == sum(one.steps for one in booked.finishes.values())


def test_what_the_prefix_cache_has_is_not_computed() -> None:
    booked = Booked()
    booked.add(1, [1, 2, 3, 4, 0, 1, 2, 3, 4], max_tokens=1)
    booked.drain()
    booked.add(2, [1, 2, 3, 4, 0, 1, 2, 3, 0], max_tokens=1)
    booked.drain()
    assert booked.finishes[2].cached_tokens == 8
    assert booked.finishes[2].computed_tokens == 1
    assert booked.finishes[2].kv_block_s == 0.25 * 3  # blocks that are shared count for each
    booked.check_books()


def test_a_preempted_request_computes_again_what_it_does_not_find() -> None:
    booked = Booked(num_blocks=5)
    booked.add(1, [1, 2, 3, 4, 0], max_tokens=12)
    booked.add(2, [2, 2, 3, 4, 0], max_tokens=12)
    booked.drain()
    assert booked.scheduler.stats().preemptions > 0
    assert booked.finishes[2].recomputed_tokens > 0
    assert booked.finishes[1].recomputed_tokens == 0
    booked.check_books()


def test_waiting_tokens_are_those_of_who_runs_and_who_waits() -> None:
    booked = Booked(max_running=1, max_chunk_tokens=3, budget_tokens=4)
    booked.add(1, [1, 2, 3, 4, 0])
    booked.add(2, [1, 2, 3])
    assert booked.scheduler.stats().waiting_tokens == 8
    booked.step()
    assert booked.scheduler.stats().waiting_tokens == 8 - 2  # of two: half of four tokens, beside another


def test_a_step_that_fails_is_no_cost() -> None:
    booked = Booked()
    booked.add(1, [1, 2, 3])
    booked.add(2, [2, 2, 3])
    plan = booked.schedule()
    booked.wait(1.0)
    booked.commit(plan, failed=0)
    assert (booked.finishes[1].reason, booked.finishes[1].computed_tokens, booked.finishes[1].steps) == (
        *("failed", 0),
        0,
    )
    booked.drain()
    booked.check_books()


@pytest.mark.parametrize("ahead", [False, True])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_sums_over_all_ends_are_the_counters(ahead: bool, seed: int) -> None:
    """Random traffic on few blocks: preemptions, aborts, failures, resumed requests, stop tokens; steps one by one,
    or each scheduled while the one before is in flight, and some run again after that."""
    draw = random.Random(seed)
    booked = Booked(num_blocks=draw.randint(5, 9), max_chunk_tokens=draw.randint(1, 8), max_running=4)
    flying: StepPlan | None = None
    added = 0
    while added < 12 or booked.scheduler.has_work() or flying is not None:
        if added < 12 and draw.random() < 0.5:
            prompt = [draw.randint(0, 1) for _ in range(draw.randint(1, 11))]
            output = tuple(draw.randint(0, 1) for _ in range(draw.choice((0, 0, 2))))
            booked.add(added, prompt, draw.randint(3, 9), output)
            added += 1
        plan = booked.schedule()
        booked.wait(draw.randint(1, 64) / 64)
        if draw.random() < 0.1 and added:
            booked.scheduler.abort(draw.randrange(added))
            booked.collect()
        first, flying = (flying, plan if plan.seqs else None) if ahead else (plan, None)
        if first is not None:
            if draw.random() < 0.1:
                first = booked.scheduler.revise(first)
            failed = draw.randrange(len(first.seqs)) if first.seqs and draw.random() < 0.1 else None
            booked.commit(first, EOS if draw.random() < 0.05 else 1, failed)
        booked.wait(draw.randint(0, 3) / 128)
    assert len(booked.finishes) == 12
    booked.check_books()
