"""The price of a step, how it is learned, and what chunks are cut to by it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import (
    DECODE_STRIDE,
    FIRST_ROWS,
    LEARN_EVERY_S,
    LEAST_CHUNK,
    SEEN_ENOUGH,
    CostLearner,
    StepCost,
    StepWork,
)
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult
from cierzo.scheduler.policy import PRICED_STRIDE
from cierzo.scheduler.request import NewRequest
from cierzo.scheduler.scheduler import Scheduler

ROW = StepCost(step_s=1.0, prompt_s=0.0, sequence_s=0.0, decode_context_s=0.0, row_s=0.1, pair_s=0.0)
CARD = StepCost(0.014, 0.035, 6e-5, 1.5e-8, 3.8e-5, 1.2e-9, context_pairs=192.0)


def chunk(start: int, count: int, **more: Any) -> StepWork:
    """A step of one chunk."""
    return StepWork(1, 0, count, count * start + count * (count + 1) / 2, start + count, **more)


# --- the price -------------------------------------------------------------------------------------------------


def test_a_step_is_the_sum_of_its_work() -> None:
    cost = StepCost(1.0, 10.0, 100.0, 1e3, 1e4, 1e5, context_pairs=2.0)
    assert cost.seconds(StepWork(3, 50)) == 1 + 3 * 100 + 50 * 1e3
    assert cost.seconds(StepWork(4, 50, 2, 7.0, 6)) == 1 + 10 + 4 * 100 + 50 * 1e3 + 2 * 1e4 + (7 + 2 * 6) * 1e5


COSTS = st.builds(
    StepCost,
    step_s=st.floats(0, 1),
    prompt_s=st.floats(0, 1),
    sequence_s=st.sampled_from([0.0, 1e-3]),
    decode_context_s=st.just(0.0),
    row_s=st.sampled_from([0.0, 1e-6, 4e-5, 1e-2]),
    pair_s=st.sampled_from([0.0, 1e-9, 1e-5]),
    context_pairs=st.sampled_from([0.0, 192.0]),
)


@given(COSTS, st.integers(0, 1 << 18), st.floats(-1, 10))
def test_the_largest_chunk_that_fits(cost: StepCost, start: int, seconds: float) -> None:
    most = cost.most_tokens(start, seconds)
    assert most >= 0
    if most:
        assert cost.chunk_s(start, most) <= seconds * (1 + 1e-9) or most > 1 << 60
    if most < 1 << 60:
        assert cost.chunk_s(start, most + 1) >= seconds * (1 - 1e-9) - 1e-12


@given(COSTS, st.integers(0, 1 << 18), st.integers(1, 5000))
def test_a_chunk_adds_what_it_is_said_to_add(cost: StepCost, start: int, count: int) -> None:
    with_it = cost.seconds(chunk(start, count))
    assert with_it == pytest.approx(cost.step_s + cost.prompt_s + cost.chunk_s(start, count), rel=1e-9)


@given(COSTS, st.integers(0, 1 << 18))
def test_the_least_chunk_takes_as_long_as_its_context_costs_whatever_its_size(cost: StepCost, start: int) -> None:
    least = cost.least_tokens(start)
    fixed_s = cost.context_pairs * start * cost.pair_s
    own_s = cost.row_s + cost.pair_s * start
    assert least == LEAST_CHUNK or (least - 1) * own_s < fixed_s * (1 + 1e-9) <= least * own_s * (1 + 2e-9)
    assert LEAST_CHUNK <= least <= max(LEAST_CHUNK, cost.context_pairs + 1)


# --- learning --------------------------------------------------------------------------------------------------


def steps(seed: int, count: int, context_pairs: float) -> list[StepWork]:
    """Mixed steps: prompts that grow, beside sequences that decode."""
    draw, start, found = random.Random(seed), 0, []
    for _ in range(count):
        decodes = draw.randint(1, 32)
        context = decodes * draw.randint(100, 4000)
        if draw.random() < 0.4:
            found.append(StepWork(decodes, context))
            continue
        rows = draw.choice((64, 200, 496, 496, 1000))
        start = 0 if start + rows > 60_000 else start
        found.append(StepWork(decodes + 1, context, rows, rows * (start + (rows + 1) / 2), start + rows))
        start += rows
    return found


@pytest.mark.parametrize("true", [CARD, msgspec.structs.replace(CARD, row_s=7e-4, pair_s=2e-8), ROW])
@pytest.mark.parametrize("outliers", [0.0, 0.03])
def test_a_machine_s_price_is_learned_from_its_steps(true: StepCost, outliers: float) -> None:
    """Times are off by 5 % at random, and some steps take ten times as long."""
    draw, learner = random.Random(1), CostLearner(true.context_pairs)
    for work in steps(1, 300, true.context_pairs):
        wrong = (10.0 if draw.random() < outliers else 1.0) * draw.gauss(1.0, 0.05)
        learner.observe(work, true.seconds(work) * max(0.1, wrong))
    found = [(work, abs(learner.cost.seconds(work) / true.seconds(work) - 1)) for work in steps(2, 300, 0.0)]
    errors = sorted(error for work, error in found if work.rows)
    assert errors[len(errors) // 2] < 0.05
    assert errors[-len(errors) // 20] < 0.1
    errors = sorted(error for work, error in found if not work.rows)  # few of them were learned from
    assert errors[len(errors) // 2] < 0.3
    assert min(learner.cost.step_s, learner.cost.row_s, learner.cost.pair_s) >= 0


def test_the_same_measurements_give_the_same_price() -> None:
    found = []
    for _ in range(2):
        learner = CostLearner(192.0)
        for work in steps(3, 100, 192.0):
            learner.observe(work, CARD.seconds(work))
        found.append(learner.cost)
    assert found[0] == found[1]


@pytest.mark.parametrize("seconds", [1000.0, 1e-5])
def test_one_outlier_changes_little(seconds: float) -> None:
    learner = CostLearner(192.0)
    for work in steps(4, 200, 192.0):
        learner.observe(work, CARD.seconds(work))
    before = learner.cost
    work = chunk(1000, 496)
    learner.observe(work, seconds)
    assert learner.cost.seconds(work) == pytest.approx(before.seconds(work), rel=0.25)


def test_a_machine_that_slows_down_is_followed() -> None:
    learner = CostLearner(192.0)
    for number, work in enumerate(steps(5, 400, 192.0)):
        learner.observe(work, CARD.seconds(work) * (1 if number < 200 else 2))
    work = chunk(1000, 496)
    assert learner.cost.seconds(work) == pytest.approx(2 * CARD.seconds(work), rel=0.1)


def test_nothing_is_told_before_enough_steps_were_seen() -> None:
    learner = CostLearner()
    for number in range(1, SEEN_ENOUGH + 1):
        assert not learner.is_priced
        assert learner.cost.seconds(chunk(0, 1000)) == 0.0
        assert learner.observe(chunk(0, 100 * number), 0.1 * number) == (number == SEEN_ENOUGH)
    assert not learner.observe(StepWork(1, 5), 0.0), "a clock that stood still"


def test_of_steps_that_only_decode_few_are_learned() -> None:
    learner = CostLearner()
    changed = [learner.observe(StepWork(4, 100 + n), 0.01) for n in range(10 * DECODE_STRIDE)]
    assert sum(changed) == pytest.approx(10, abs=2)


def test_of_short_steps_one_is_learned_from_in_a_while() -> None:
    learner = CostLearner()
    for count in range(SEEN_ENOUGH):
        learner.observe(chunk(0, 16 + count), 1.0)
    seconds = LEARN_EVERY_S / 10
    learned = [learner.observe(chunk(0, 32), seconds) for _ in range(100)]
    assert 9 <= sum(learned) <= 11
    assert learner.observe(chunk(0, 64), 2 * LEARN_EVERY_S)  # of a longer one always


def test_a_long_time_without_prompts_forgets_no_prompt() -> None:
    learner = CostLearner(192.0)
    for work in steps(6, 200, 192.0):
        learner.observe(work, CARD.seconds(work))
    for number in range(60_000 * DECODE_STRIDE // 32):
        work = StepWork(8, 8000 + number)
        features = (1.0, 0.0, 0.0, 8.0, 8000.0 + number, 0.0, 0.0, 0.0)
        learner._take([feature / CARD.seconds(work) for feature in features], 1.0)
    learner.observe(work := chunk(5000, 496), CARD.seconds(work))
    assert learner.cost.seconds(work) == pytest.approx(CARD.seconds(work), rel=0.2)


# --- chunks ----------------------------------------------------------------------------------------------------


class Machine:
    """A scheduler that has a price, a clock moved by hand, and a model that says 7."""

    def __init__(self, cost: StepCost | None, **limits: Any) -> None:
        self.now = 0.0
        cache = KVCacheManager(CacheConfig(num_blocks=8192, block_tokens=32, prefix_caching=False))
        defaults = {"budget_tokens": 4096, "max_chunk_tokens": 2048, "max_running": 64, "max_model_len": 262_144}
        self.limits = SchedulerConfig(**{**defaults, **limits})
        self.scheduler = Scheduler(self.limits, cache, lambda: self.now, cost)

    def add(self, request_id: int, prompt_tokens: int, max_tokens: int = 1000, **fields: Any) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens)
        prompt = tuple(range(prompt_tokens))
        self.scheduler.add(NewRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **fields))

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        self.scheduler.commit(plan, StepResult([[7] if seq.samples else [] for seq in plan.seqs]))
        return plan

    def chunks(self) -> dict[int, int]:
        """Tokens of each request in the next step."""
        return {seq.key[0]: len(seq.token_ids) for seq in self.step().seqs}

    def ends(self) -> dict[int, str]:
        return {d.request_id: d.finish.reason for d in self.scheduler.take_deltas() if d.finish is not None}


def test_chunks_shrink_as_their_context_grows_and_steps_take_as_long() -> None:
    machine = Machine(CARD, max_step_s=0.25, budget_tokens=32_768, max_chunk_tokens=16_384)
    for request_id in range(8):
        machine.add(request_id, 100)
    machine.step()
    machine.add(100, 240_000, arrival_s=0.0)
    counts, predicted = [], []
    while machine.scheduler._live[100][0].num_planned < 240_000:
        plan = machine.step()
        counts.append(len(plan.seqs[-1].token_ids))
        predicted.append(plan.predicted_s)
        assert plan.work is not None
        assert plan.predicted_s == CARD.seconds(plan.work)
        assert plan.work.decode_context == sum(seq.start + 1 for seq in plan.seqs[:-1])
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 8 * counts[-2]
    assert all(0.248 < seconds <= 0.25 for seconds in predicted[:-1])


def test_of_steps_that_only_decode_few_are_priced() -> None:
    machine = Machine(CARD)
    machine.add(1, 50)
    plans = [machine.step() for _ in range(100)]
    priced = [plan for plan in plans if plan.work is not None]
    assert plans[0] in priced
    assert 100 // PRICED_STRIDE <= len(priced) <= 100 // PRICED_STRIDE + 2
    for before, plan in itertools.pairwise(plans):
        expected = before.predicted_s if plan.work is None else CARD.seconds(plan.work)
        assert plan.predicted_s == expected > 0
    machine.add(2, 50)
    assert machine.step().work is not None


def test_without_a_target_or_a_price_chunks_are_cut_by_tokens() -> None:
    shapes = []
    for cost, max_step_s in ((CARD, 0.0), (None, 0.01), (None, 0.0)):
        machine = Machine(cost, max_step_s=max_step_s)
        machine.add(1, 50)
        machine.add(2, 20_000)
        shapes.append([machine.chunks() for _ in range(8)])
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0][1] == {1: 1, 2: 2048}


def test_a_price_that_comes_later_counts_from_the_next_step_on() -> None:
    machine = Machine(None, max_step_s=3.0)
    machine.add(1, 10_000)
    assert machine.chunks() == {1: 4096}
    machine.scheduler.reprice(ROW)
    assert machine.chunks() == {1: 20}  # 1 s, and 0.1 s for each


def test_a_prompt_advances_however_late_the_step_is() -> None:
    """Decoding alone takes longer than the target."""
    machine = Machine(msgspec.structs.replace(ROW, step_s=9.0), max_step_s=3.0)
    machine.add(1, 50)
    assert machine.chunks() == {1: LEAST_CHUNK}
    assert machine.chunks() == {1: LEAST_CHUNK}


def test_a_late_chunk_is_no_smaller_than_is_worth_its_context() -> None:
    machine = Machine(CARD, max_step_s=0.06)
    machine.add(1, 262_000)
    counts = [machine.chunks()[1] for _ in range(400)]
    start = sum(counts)
    last = machine.chunks()[1]
    assert last == CARD.least_tokens(start) > 100
    assert 2 * last * (CARD.row_s + start * CARD.pair_s) >= 0.95 * CARD.chunk_s(start, last)


def test_a_long_prompt_leaves_half_of_the_time_to_those_behind_it() -> None:
    machine = Machine(ROW, max_step_s=9.0, max_chunk_tokens=60)
    machine.add(1, 1000)
    machine.add(2, 30)
    assert machine.chunks() == {1: 40, 2: 30}  # 8 s are left: 4, and 3 of the others
    assert machine.chunks() == {1: 60, 2: 1}  # nobody is behind it: tokens are the limit again


def test_a_second_prompt_that_would_get_too_few_tokens_waits() -> None:
    machine = Machine(ROW, max_step_s=5.0, max_chunk_tokens=60)
    machine.add(1, 1000)
    machine.add(2, 1000)
    assert machine.chunks() == {1: 20, 2: LEAST_CHUNK}  # it is admitted, and gets the least
    machine.scheduler.reprice(msgspec.structs.replace(ROW, step_s=3.05))
    assert machine.chunks() == {1: LEAST_CHUNK}  # 1.95 s: 9 tokens are half, and what is left is for 3
    machine.scheduler.abort(1)
    assert machine.chunks() == {2: 19}


def test_nobody_is_admitted_when_the_time_is_spent() -> None:
    machine = Machine(ROW, max_step_s=2.0, max_chunk_tokens=60)
    machine.add(1, 10)  # of the second that is left, all
    machine.add(2, 50)
    assert machine.chunks() == {1: 10}
    assert machine.chunks() == {1: 1, 2: LEAST_CHUNK}


class Learning(Machine):
    """A machine that learns from steps of 5 ms, and half a millisecond for each row of a chunk: 490 fit."""

    ROWS = StepCost(step_s=5e-3, prompt_s=0.0, sequence_s=0.0, decode_context_s=0.0, row_s=5e-4, pair_s=0.0)

    def __init__(self, target_s: float = 0.25) -> None:
        self.learner = CostLearner(0.0, target_s)
        super().__init__(self.learner.cost, max_step_s=target_s)

    def taken(self, slower: float = 1.0) -> tuple[StepWork, float]:
        """Work and seconds of the next step."""
        work = self.step().work or StepWork(1, 1)
        seconds = self.ROWS.seconds(work) * slower
        if self.learner.observe(work, seconds):
            self.scheduler.reprice(self.learner.cost)
        return work, seconds


@pytest.mark.parametrize("decodes_before", [0, 4, 4 * PRICED_STRIDE * SEEN_ENOUGH])
@pytest.mark.parametrize("prompts", [1, 3])
def test_the_first_long_prompts_after_a_start_keep_to_the_target(decodes_before: int, prompts: int) -> None:
    machine = Learning()
    machine.add(1, 20)
    for _ in range(decodes_before):
        machine.taken()
    for number in range(prompts):
        machine.add(2 + number, 10_000)
    taken = [machine.taken() for _ in range(30)]
    rows = [work.rows for work, _ in taken]
    assert rows[0] == FIRST_ROWS
    assert max(seconds for _, seconds in taken) <= 0.25 * (1 + 1e-9)
    assert max(rows[10:]) > 420, "and is used"
    for before, after in itertools.pairwise(rows):
        assert after <= 2 * before


def test_alone_a_prompt_is_not_slowed_down_at_the_start() -> None:
    machine = Learning()
    machine.add(1, 10_000)
    assert machine.chunks() == {1: 4096}


def test_a_start_on_a_slow_machine_takes_smaller_chunks_still() -> None:
    """A step of 64 rows takes more than half of the target, or more than all of it."""
    for slower, expected in ((5.0, [64, 86, 89]), (16.0, [64, 27, 22]), (60.0, [64, LEAST_CHUNK, LEAST_CHUNK])):
        machine = Learning()
        machine.add(1, 2)
        machine.chunks()
        machine.add(2, 10_000)
        assert [machine.taken(slower)[0].rows for _ in range(3)] == expected


def test_a_step_above_the_target_tells_how_many_rows_fit() -> None:
    learner = CostLearner(0.0, 0.25)
    for _ in range(SEEN_ENOUGH + 1):
        learner.observe(chunk(0, 4096), 2.0)  # alone
    assert learner.cost.most_rows == 512
    learner.observe(chunk(0, 64), 1.0)
    assert learner.cost.most_rows == 512, "there is a price"
    assert CostLearner(0.0, 0.0).cost.most_rows > 1 << 60, "without a target"


# --- deadlines -------------------------------------------------------------------------------------------------


def test_who_passes_a_deadline_within_a_step_ends_with_that_step() -> None:
    machine = Machine(None)
    machine.add(1, 50, deadline_at_s=1.0)
    machine.add(2, 50)
    plan = machine.scheduler.schedule()
    machine.now = 1.5
    machine.scheduler.commit(plan, StepResult([[7], [7]]))
    deltas = machine.scheduler.take_deltas()
    assert [(delta.request_id, delta.token_ids) for delta in deltas] == [
        (1, [7]),
        (2, [7]),
        (1, []),
    ]  # token and end
    assert deltas[-1].finish is not None
    assert (deltas[-1].finish.reason, deltas[-1].finish.output_tokens) == ("deadline", 1)
    assert machine.chunks() == {2: 1}


def test_a_deadline_passes_while_a_step_is_in_flight() -> None:
    machine = Machine(None)
    machine.add(1, 50, deadline_at_s=1.0)
    first = machine.scheduler.schedule()
    machine.now = 1.0
    assert not machine.scheduler.schedule().seqs
    assert machine.ends() == {1: "deadline"}
    machine.scheduler.commit(first, StepResult([[7]]))
    assert not machine.scheduler.take_deltas()


@pytest.mark.parametrize(("deadline_at_s", "ends"), [(4.0, True), (6.0, False)])
def test_a_prompt_that_cannot_make_its_deadline_ends_at_once(deadline_at_s: float, ends: bool) -> None:
    """It takes 11 s by itself: twice what is left, and more, or less."""
    machine = Machine(ROW)
    machine.add(1, 100, deadline_at_s=deadline_at_s)
    plan = machine.step()
    assert bool(plan.seqs) != ends
    assert machine.ends() == ({1: "deadline"} if ends else {})


def test_a_prompt_is_given_up_before_any_of_its_chunks() -> None:
    machine = Machine(ROW, budget_tokens=50, max_running=1)
    machine.add(1, 100, deadline_at_s=6.0)
    assert machine.chunks() == {1: 50}
    machine.now = 3.5  # 6 s are missing, and 2.5 left
    assert not machine.step().seqs
    assert machine.ends() == {1: "deadline"}


def test_without_a_price_no_prompt_is_given_up() -> None:
    machine = Machine(None)
    machine.add(1, 100, deadline_at_s=0.001)
    assert machine.chunks() == {1: 100}
