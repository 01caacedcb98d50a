"""The core with real scheduler, cache and batches: a request's tokens never depend on what runs beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cuts import random_cuts

from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import Abort, Finish, Submit, TokenDelta
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.step_cost import StepTimes
from cierzo.kernels.fault import DeviceFault
from cierzo.scheduler import policy
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.cost import StepWork
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult, TokenLogprobs, entry_bytes, unpacked_entry
from cierzo.scheduler.request import DuplicateRequest

VOCAB = 50
EOS = (49,)


def make_core(
    *,
    num_blocks: int = 64,
    block_tokens: int = 4,
    runner: Runner | None = None,
    clock: Clock | None = None,
    prefix_caching: bool = True,
    **limits: int,
) -> EngineCore:
    scheduler = SchedulerConfig(
        **{
            "budget_tokens": 16,
            "max_chunk_tokens": 8,
            "max_running": 4,
            "max_waiting": 100,
            "max_model_len": 32,
            **limits,
        }
    )
    cache = CacheConfig(
        block_tokens=block_tokens, num_blocks=num_blocks, prefix_caching=prefix_caching, hash_key="00" * 16
    )
    if runner is None:
        runner = FakeRunner(
            vocab_size=VOCAB, num_blocks=num_blocks, block_tokens=block_tokens, max_running=scheduler.max_running
        )
    return EngineCore(fake_config(scheduler, cache, vocab_size=VOCAB, eos_token_ids=EOS), runner, clock or Clock())


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Outcome:
    tokens: list[int] = field(default_factory=list)
    entries: list[TokenLogprobs] = field(default_factory=list)  # of the prompt
    finish: Finish | None = None


Outcomes = dict[tuple[int, int], Outcome]


def gather(outcomes: Outcomes, deltas: list[TokenDelta]) -> None:
    for delta in deltas:
        outcome = outcomes.setdefault((delta.request_id, delta.sample), Outcome())
        assert outcome.finish is None, f"{delta} after the end"
        outcome.tokens += delta.token_ids
        outcome.entries += [unpacked_entry(raw) for raw in delta.prompt_logprobs or ()]
        outcome.finish = delta.finish


def finish_all(core: EngineCore, outcomes: Outcomes | None = None) -> Outcomes:
    outcomes = {} if outcomes is None else outcomes
    for _ in range(5000):
        if not core.has_work():
            break
        gather(outcomes, core.step_plain())
        core.check()
    assert not core.has_work()
    assert all(outcome.finish is not None for outcome in outcomes.values())
    stats = core.stats()
    assert stats.free_blocks == stats.total_blocks
    return outcomes


def submit(
    request_id: int, prompt: list[int], *, priority: int = 0, output: list[int] | None = None, **sampling: object
) -> Submit:
    params = SamplingParams(**{"max_tokens": 6, "seed": request_id, **sampling})
    return Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=params,
        priority=priority,
        output_token_ids=output or [],
    )


def alone(request: Submit, max_model_len: int = 32) -> Outcomes:
    """In a roomy core of its own, without chunks, hits or neighbours."""
    core = make_core(budget_tokens=64, max_chunk_tokens=64, prefix_caching=False, max_model_len=max_model_len)
    core.submit(request)
    return finish_all(core)


# --- random loads ------------------------------------------------------------------------------------------

PREFIXES = st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9, 2]])


@st.composite
def loads(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, Submit]]]:
    """Limits of a tight core, and requests with the step before which each arrives."""
    block_tokens = draw(st.sampled_from([1, 2, 4]))
    max_model_len = 24
    least = -(-max_model_len // block_tokens)
    max_running = draw(st.integers(1, 5))
    budget = draw(st.integers(max_running, 20))
    limits = {
        "block_tokens": block_tokens,
        "num_blocks": draw(st.integers(least, 2 * least)),
        "max_running": max_running,
        "budget_tokens": budget,
        "max_chunk_tokens": draw(st.integers(1, budget)),
        "max_model_len": max_model_len,
    }
    arrivals = []
    for request_id in range(draw(st.integers(1, 7))):
        prompt = draw(PREFIXES) + draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
        request = submit(
            request_id,
            prompt,
            priority=draw(st.integers(-1, 1)),
            max_tokens=draw(st.integers(1, 12)),
            n=draw(st.integers(1, 3)),
            seed=draw(st.integers(0, 1)),
            prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        )
        arrivals.append((draw(st.integers(0, 10)), request))
    return limits, arrivals


@settings(max_examples=120, deadline=None)
@given(loads(), st.one_of(st.none(), st.integers(0, 1 << 30)))
def test_every_request_gets_the_tokens_of_its_run_alone(
    load: tuple[dict[str, int], list[tuple[int, Submit]]], cuts: int | None
) -> None:
    limits, arrivals = load
    core, outcomes = make_core(**limits), {}
    with random_cuts(cuts):
        for step in range(11):
            for _, request in (pair for pair in arrivals if pair[0] == step):
                core.submit(request)
            gather(outcomes, core.step_plain())
            core.check()
        finish_all(core, outcomes)
    for _, request in arrivals:
        expected = alone(request, limits["max_model_len"])
        for sample in range(request.sampling.n):
            key = (request.request_id, sample)
            assert outcomes[key].tokens == expected[key].tokens, key
            assert outcomes[key].entries == expected[key].entries, key
            is_scored = request.sampling.prompt_logprobs is not None and sample == 0
            assert len(outcomes[key].entries) == (len(request.prompt_token_ids) - 1 if is_scored else 0)
            assert outcomes[key].finish.reason == expected[key].finish.reason
    assert len(outcomes) == sum(request.sampling.n for _, request in arrivals)


def test_a_tight_pool_preempts_and_a_shared_prefix_is_found_again() -> None:
    """The loads above are worth something only if such cores do preempt and do reuse."""
    core = make_core(num_blocks=8, max_model_len=32)
    requests = [submit(i, [1, 2, 3, 4, 5, 6, 7, 8, i], max_tokens=16, ignore_eos=True) for i in range(3)]
    for request in requests:
        core.submit(request)
    outcomes = finish_all(core)
    assert core.stats().preemptions > 0
    assert core.stats().cached_tokens > 0
    for request in requests:
        assert outcomes[request.request_id, 0].tokens == alone(request)[request.request_id, 0].tokens


def test_a_scored_prompt_reads_no_prefix_and_leaves_one_for_others() -> None:
    core = make_core(runner=FakeRunner(vocab_size=VOCAB, num_blocks=64, block_tokens=4, max_running=4))
    prompt = [*range(1, 18)]
    cached = []
    for request_id, count in enumerate((None, 1, None)):
        core.submit(submit(request_id, prompt, seed=0, prompt_logprobs=count))
        outcome = finish_all(core)[request_id, 0]
        cached.append(outcome.finish.cached_tokens)
        assert [entry.token_id for entry in outcome.entries] == ([] if count is None else prompt[1:])
    assert cached == [0, 0, 16]
    assert core.stats().computed_tokens == 3 * 17 - 16 + 3 * 5


def test_a_scored_prompt_that_goes_on_computes_again_only_what_it_must() -> None:
    """As after a pause of its reader: what was delivered need not be scored, so its blocks may be found."""
    whole = alone(submit(1, [*range(1, 30)], max_tokens=2, prompt_logprobs=3))[1, 0]
    core = make_core()
    core.submit(submit(0, [*range(1, 30)], max_tokens=2))
    finish_all(core)
    request = submit(1, [*range(1, 30)], max_tokens=2, prompt_logprobs=3)
    core.submit(msgspec.structs.replace(request, num_scored=9))
    outcome = finish_all(core)[1, 0]
    assert outcome.finish.cached_tokens == 8
    assert outcome.entries == whole.entries[9:]
    assert outcome.tokens == whole.tokens


def test_a_step_scores_so_many_tokens_as_their_entries_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SCORED_BYTES", 4 * entry_bytes(2))
    core = make_core(max_chunk_tokens=64, budget_tokens=64)
    core.submit(submit(1, [*range(1, 12)], max_tokens=1, prompt_logprobs=2))
    counts = [sum(len(delta.prompt_logprobs or ()) for delta in core.step_plain()) for _ in range(3)]
    assert counts == [4, 4, 2]
    assert not core.has_work()


def test_steps_that_score_teach_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than their rows tell."""
    works: list[StepWork | None] = []
    monkeypatch.setattr(StepTimes, "took", lambda self, work, seconds: bool(works.append(work)))
    for count in (None, 0):
        core = make_core()
        core.submit(submit(1, [1, 2, 3], max_tokens=1, prompt_logprobs=count))
        finish_all(core)
    assert [work is None for work in works] == [False, True]


def test_a_resumed_request_goes_on_as_if_never_broken() -> None:
    whole = alone(submit(1, [3, 1, 2], max_tokens=12, ignore_eos=True))[1, 0].tokens
    core = make_core(max_chunk_tokens=2)
    core.submit(submit(1, [3, 1, 2], output=whole[:5], max_tokens=12, ignore_eos=True))
    outcome = finish_all(core)[1, 0]
    assert outcome.tokens == whole[5:]
    assert outcome.finish.output_tokens == 12


def test_samples_are_numbered_from_first_sample_and_differ() -> None:
    three = alone(submit(1, [1, 2], n=3, ignore_eos=True))
    assert len({tuple(outcome.tokens) for outcome in three.values()}) == 3
    core = make_core()
    core.submit(
        Submit(
            request_id=1,
            prompt_token_ids=[1, 2],
            sampling=SamplingParams(max_tokens=6, seed=1, ignore_eos=True),
            first_sample=2,
        )
    )
    again = finish_all(core)
    assert list(again) == [(1, 2)]
    assert again[1, 2].tokens == three[1, 2].tokens


# --- endings -----------------------------------------------------------------------------------------------


def scripted(tokens: list[int]) -> FakeRunner:
    return FakeRunner(
        vocab_size=VOCAB, num_blocks=64, block_tokens=4, max_running=4, script=lambda _, index: tokens[index]
    )


@pytest.mark.parametrize(
    ("sampling", "expected", "reason"),
    [
        ({"max_tokens": 3}, [7, 8, 9], "length"),
        ({"max_tokens": 9}, [7, 8, 9, 49], "stop"),
        ({"max_tokens": 9, "ignore_eos": True}, [7, 8, 9, 49, 7, 8, 3, 3, 3], "length"),
        ({"max_tokens": 9, "stop_token_ids": (8,)}, [7, 8], "stop"),
        ({"max_tokens": 9, "stop_token_ids": (8,), "min_tokens": 3}, [7, 8, 9, 49], "stop"),
        ({"max_tokens": 9, "stop_token_ids": (8,), "min_tokens": 5}, [7, 8, 9, 49, 7, 8], "stop"),
    ],
)
def test_stops(sampling: dict[str, object], expected: list[int], reason: str) -> None:
    core = make_core(runner=scripted([7, 8, 9, 49, 7, 8, 3, 3, 3]))
    core.submit(submit(1, [1, 2], **sampling))
    outcome = finish_all(core)[1, 0]
    assert (outcome.tokens, outcome.finish.reason) == (expected, reason)
    assert outcome.finish.stop_token_id == (expected[-1] if reason == "stop" else None)


def test_abort_and_deadline_end_a_request_at_once() -> None:
    clock = Clock()
    core = make_core(clock=clock)
    core.submit(submit(1, [1, 2], max_tokens=20, n=2, ignore_eos=True))
    core.submit(
        Submit(
            request_id=2,
            prompt_token_ids=[5],
            sampling=SamplingParams(max_tokens=20, seed=0),
            deadline_at_s=clock() + 3.0,
        )
    )
    outcomes: Outcomes = {}
    for _ in range(3):
        gather(outcomes, core.step_plain())
    core.abort(Abort(request_id=1, sample=1))
    clock.now = 3.0
    gather(outcomes, core.step_plain())
    assert outcomes[1, 1].finish.reason == "cancelled"
    assert outcomes[2, 0].finish.reason == "deadline"
    core.abort(Abort(request_id=1, reason="failed"))
    core.abort(Abort(request_id=77))
    gather(outcomes, core.take_deltas())
    assert outcomes[1, 0].finish.reason == "failed"
    assert not core.has_work()
    core.check()


def test_a_full_queue_refuses_sample_by_sample_and_a_duplicate_is_an_error() -> None:
    core = make_core(max_waiting=2, prefix_caching=False)
    core.submit(submit(1, [1], n=3))
    with pytest.raises(DuplicateRequest):
        core.submit(submit(1, [1]))
    outcomes = finish_all(core)
    assert [outcomes[1, sample].finish.reason for sample in range(3)] == ["length", "length", "failed"]
    assert "overloaded" in outcomes[1, 2].finish.message


def test_what_validation_missed_fails_its_request_and_no_other() -> None:
    core = make_core()
    core.submit(submit(1, [1] * 40))
    core.submit(submit(2, [1], ignore_eos=True))
    outcomes = finish_all(core)
    assert outcomes[1, 0].finish.reason == "failed"
    assert outcomes[1, 0].finish.message.startswith("invalid: ")
    assert outcomes[2, 0].finish.reason == "length"


class Breaking(FakeRunner):
    """Raises in the given step, or reports the given failure of a request."""

    def __init__(self, step: int, error: BaseException | None) -> None:
        super().__init__(vocab_size=VOCAB, num_blocks=64, block_tokens=4, max_running=4)
        self._step = step
        self._error = error

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        self._number = plan.step
        self._plan = plan
        if plan.step == self._step and self._error is not None:
            raise self._error
        super().launch(plan, batch)

    def collect(self) -> StepResult:
        result = super().collect()
        if self._number == self._step and self._error is None:
            bad = next(index for index, seq in enumerate(self._plan.seqs) if seq.key == (1, 0))
            return StepResult(result.token_ids, None, {bad: "logits are not finite"})
        return result


def test_a_failed_step_fails_its_sequences_by_name_and_the_core_lives_on() -> None:
    core = make_core(runner=Breaking(3, RuntimeError("device lost")), max_running=2)
    for request_id in range(3):
        core.submit(submit(request_id, [1, 2, request_id], ignore_eos=True))
    outcomes = finish_all(core)
    for request_id in (0, 1):
        assert outcomes[request_id, 0].finish.reason == "failed"
        assert outcomes[request_id, 0].finish.message == "step 3 failed: RuntimeError: device lost"
    assert outcomes[2, 0].tokens == alone(submit(2, [1, 2, 2], ignore_eos=True))[2, 0].tokens


def test_one_bad_row_fails_one_request() -> None:
    core = make_core(runner=Breaking(2, None))
    for request_id in range(3):
        core.submit(submit(request_id, [1, 2, request_id], ignore_eos=True))
    outcomes = finish_all(core)
    assert outcomes[1, 0].finish.reason == "failed"
    assert outcomes[1, 0].finish.message == "logits are not finite"
    for request_id in (0, 2):
        expected = alone(submit(request_id, [1, 2, request_id], ignore_eos=True))
        assert outcomes[request_id, 0].tokens == expected[request_id, 0].tokens


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), DeviceFault("CUDA error")])
def test_what_is_not_the_steps_fault_passes(
    error: BaseException, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise error

    for step in ("step_plain", "step_overlapped"):
        core = make_core()
        core.submit(submit(1, [1, 2], ignore_eos=True))
        getattr(core, step)()  # overlapped, its result is still to be collected
        monkeypatch.setattr(core._runner, where, breaks)
        with pytest.raises(type(error)):
            getattr(core, step)()
