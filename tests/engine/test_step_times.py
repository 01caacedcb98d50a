"""How long steps took, what they are predicted to take, and what the core's figures say of it."""

from __future__ import annotations

import itertools

import pytest

from cierzo.cache.config import CacheConfig
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.work import StepShape
from cierzo.engine.messages import Submit
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.step_cost import RECENT, StepTimes, context_pairs, fitted_cost, predicted_cost
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import SEEN_ENOUGH, StepWork
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult

NUM_BLOCKS, BLOCK_TOKENS = 512, 16


class Clock:
    """Time that a step moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(FakeRunner):
    """Takes a second a step and a hundredth for each row, one step after the other."""

    clock: Clock
    ready_s: list[float]
    seen_s: list[float]  # what the core predicts while it collects
    core: EngineCore

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        super().launch(plan, batch)
        begin_s = max(self.clock.now, self.ready_s[-1] if self.ready_s else 0.0)
        self.ready_s.append(begin_s + 1.0 + 0.01 * plan.num_tokens)

    def collect(self) -> StepResult:
        self.seen_s.append(self.core.predicted_s)
        self.clock.now = max(self.clock.now, self.ready_s[len(self.seen_s) - 1])
        return super().collect()


def make_core(max_step_s: float = 0.0) -> tuple[EngineCore, Timed]:
    limits = SchedulerConfig(
        budget_tokens=512, max_chunk_tokens=256, max_running=8, max_model_len=4096, max_step_s=max_step_s
    )
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=NUM_BLOCKS, prefix_caching=False)
    runner = Timed(vocab_size=50, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, max_running=8, reads="last")
    runner.clock, runner.ready_s, runner.seen_s = Clock(), [], []
    core = EngineCore(fake_config(limits, cache, vocab_size=50), runner, runner.clock)
    runner.core = core
    return core, runner


def submit(request_id: int, prompt_tokens: int, max_tokens: int = 8) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, seed=request_id, ignore_eos=True)
    return Submit(request_id=request_id, prompt_token_ids=[1] * prompt_tokens, sampling=sampling)


def test_figures_of_steps() -> None:
    core, _ = make_core()
    assert (core.stats().step_s, core.stats().prefill_tokens_per_s) == (0.0, 0.0)
    core.submit(submit(1, 300, max_tokens=5))
    core.submit(submit(2, 100, max_tokens=3))
    assert core.stats().waiting_tokens == 400
    core.step_plain()  # 256 and 100 tokens, 4.56 s
    stats = core.stats()
    assert stats.step_s == pytest.approx(4.56)
    assert stats.prefill_tokens_per_s == pytest.approx(356 / 4.56)
    assert stats.waiting_tokens == 44 + 1
    core.step_plain()  # 44 tokens and one that is decoded, 1.45 s
    stats = core.stats()
    assert stats.step_s == pytest.approx(RECENT * 4.56 + (1 - RECENT) * 1.45)
    rate = stats.prefill_tokens_per_s
    assert rate == pytest.approx((RECENT * 356 + 44) / (RECENT * 4.56 + 1.45))
    core.step_plain()
    assert core.stats().prefill_tokens_per_s == rate, "a step without a prompt"
    while core.has_work():
        core.step_plain()
    stats = core.stats()
    assert (stats.computed_tokens, stats.recomputed_tokens) == (300 + 4 + 100 + 2, 0)
    assert stats.sequence_steps == (2 + 4) + (1 + 2)
    assert stats.kv_block_s > 0
    assert stats.waiting_tokens == 0


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_step_is_predicted_once_enough_were_seen(overlapped: bool) -> None:
    core, runner = make_core()
    step = core.step_overlapped if overlapped else core.step_plain
    for number in range(12):
        core.submit(submit(number, 40 + 30 * number, max_tokens=4 + number))
    while core.has_work():
        step()
    assert runner.seen_s[0] == 0.0
    assert runner.seen_s[-1] > 0.0
    core.submit(submit(100, 200, max_tokens=2))
    predicted = []
    while core.has_work():
        step()
        predicted.append(core.predicted_s)
    assert predicted[0] == pytest.approx(1.0 + 2.0, rel=0.2)


def test_steps_in_flight_together_are_timed_one_by_one() -> None:
    """The second is launched while the first runs, and takes from the end of that."""
    found = []
    for overlapped in (False, True):
        core, _ = make_core()
        step = core.step_overlapped if overlapped else core.step_plain
        core.submit(submit(1, 100, max_tokens=6))
        while core.has_work():
            step()
        found.append(core.stats().step_s)
    assert found[1] == pytest.approx(found[0])


def test_a_learned_price_cuts_chunks_to_the_target() -> None:
    """A row is a hundredth of a second: of the 1.5 s of a target half a second is left for 50 rows."""
    core, runner = make_core(max_step_s=1.5)
    core.submit(submit(1, 60, max_tokens=30))
    core.submit(submit(2, 1, max_tokens=20))
    for number in range(SEEN_ENOUGH):
        core.submit(submit(10 + number, 5 + 7 * number, max_tokens=1))
        core.step_plain()
    core.submit(submit(100, 3000, max_tokens=1))
    took: list[float] = []
    while core.stats().waiting_tokens > 600:
        before = runner.clock.now
        core.step_plain()
        took.append(runner.clock.now - before)
    assert len(took) > 20, "tokens alone would be cut by 256"
    assert max(took[2:]) < 1.3 * 1.5
    assert sorted(took)[len(took) // 2] == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_first_chunks_after_a_start_keep_to_the_target(overlapped: bool) -> None:
    """Of the 3 s of a target 2 are left for 200 rows; by tokens alone chunks had 256."""
    core, runner = make_core(max_step_s=3.0)
    core.submit(submit(1, 20, max_tokens=100))
    core.submit(submit(2, 2000, max_tokens=1))
    step = core.step_overlapped if overlapped else core.step_plain
    while core.stats().waiting_tokens > 300:
        step()
    took = [after - before for before, after in itertools.pairwise([0.0, *runner.ready_s])]
    assert max(took) < 3.0 * 1.05
    assert max(took) > 2.8


# --- prices of devices -----------------------------------------------------------------------------------------


def configure(model: str, device: str, **options: object) -> EngineConfig:
    return resolve(EngineOptions(model=model, device=f"simulated:{device}", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "device", "weights", "most"),
    [("small4", "h200", "nvfp4", 1.25), ("small4", "4xh100", "fp8", 1.4), ("small3", "h200", "fp8", 1.3)],
)
def test_a_device_s_price_is_near_to_what_the_step_model_says(
    model: str, device: str, weights: str, most: float
) -> None:
    """Of steps with a chunk that is worth a step beside 32 sequences, which is where it decides."""
    config = configure(model, device, weights=weights)
    steps = StepModel(config, config.card) if config.card is not None else None
    assert steps is not None
    cost = fitted_cost(config, steps)
    assert cost == predicted_cost(config)
    for rows in (256, 512, 1024, 2048, 4096):
        for start in (0, 8000, 60_000, 120_000):
            pairs = rows * (start + (rows + 1) / 2)
            context = 32.0 * 1000
            shape = StepShape(rows, pairs, start + rows, 32.0, context, context, 33.0)
            true_s = float(steps.time(shape, 33.0).total_s)
            found_s = cost.seconds(StepWork(33, int(context), rows, pairs, start + rows))
            assert 1 / most < found_s / true_s < most, (rows, start, found_s, true_s)


@pytest.mark.parametrize("max_model_len", [2, 40, 300, 5000])
def test_a_device_has_a_price_however_short_its_requests(max_model_len: int) -> None:
    config = configure("small4", "h200", weights="nvfp4", max_model_len=max_model_len, max_running=1)
    cost = predicted_cost(config)
    assert cost is not None
    assert 1e-3 < cost.seconds(StepWork(1, 1)) < 0.1


def test_what_a_token_of_context_costs_a_chunk() -> None:
    """Of Small 4: 256 x (64 + 128) products to multiply out a head's key and value, 256 for a pair."""
    assert context_pairs(configure("small4", "h200", weights="nvfp4").model) == 256 * (64 + 128) / (64 + 64 + 128)
    assert context_pairs(configure("small3", "h200", weights="fp8").model) == 0.0


def test_a_device_s_price_does_not_change() -> None:
    times = StepTimes(configure("small4", "h200", weights="nvfp4"))
    before = times.cost
    assert not any(times.took(StepWork(4, 1000, 100 * n, 1e6, 1000), 0.5 * n) for n in range(1, 50))
    assert times.cost is before
    assert times.step_s > 0
