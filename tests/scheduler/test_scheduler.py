"""The scheduler step by step, with tokens put in by hand."""

from __future__ import annotations

from typing import Any

import pytest

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import StepPlan, StepResult, TokenDelta, TokenLogprobs
from cierzo.scheduler.request import DuplicateRequest, NewRequest, QueueFull
from cierzo.scheduler.scheduler import Scheduler

EOS = 99


class Bench:
    """A scheduler over a small cache, a clock moved by hand, and shorthand for the usual calls."""

    def __init__(self, *, num_blocks: int = 64, block_tokens: int = 4, **limits: Any) -> None:
        self.now = 0.0
        self.cache = KVCacheManager(CacheConfig(num_blocks=num_blocks, block_tokens=block_tokens))
        defaults = {"budget_tokens": 16, "max_chunk_tokens": 8, "max_running": 4, "max_model_len": 64}
        self.scheduler = Scheduler(SchedulerConfig(**{**defaults, **limits}), self.cache, lambda: self.now)

    def add(self, request_id: int, prompt: Any, sample: int = 0, **fields: Any) -> None:
        sampling = {name: fields.pop(name) for name in ("max_tokens", "n", "min_tokens") if name in fields}
        self.scheduler.add(
            NewRequest(
                request_id=request_id,
                sample=sample,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(seed=1, **sampling),
                eos_token_ids=(EOS,),
                **fields,
            )
        )

    def commit(self, plan: StepPlan, token: int = 7, failures: dict[int, str] | None = None) -> None:
        tokens = [[token] if seq.samples else [] for seq in plan.seqs]
        self.scheduler.commit(plan, StepResult(tokens, failures=failures or {}))
        self.scheduler.check()

    def step(self, token: int = 7) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        self.commit(plan, token)
        return plan

    def drain(self) -> None:
        """Steps until nothing is left, which takes no more than a hundred here."""
        for _ in range(100):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("work is left, and nothing ends it")

    def shape(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """(request id, start, number of tokens) of each sequence."""
        return [(seq.key[0], seq.start, len(seq.token_ids)) for seq in plan.seqs]

    def ends(self) -> dict[tuple[int, int], str]:
        """Reasons of those that ended since the last look."""
        return {(d.request_id, d.sample): d.finish.reason for d in self.scheduler.take_deltas() if d.finish}


# --- the steps of one request ----------------------------------------------------------------------------------


def test_one_request_from_arrival_to_end() -> None:
    bench = Bench()
    bench.add(5, range(6), max_tokens=3, arrival_s=0.0)
    bench.now = 1.0
    plan = bench.scheduler.schedule()
    (seq,) = plan.seqs
    assert (plan.num_tokens, seq.key, seq.start, seq.token_ids) == (6, (5, 0), 0, [0, 1, 2, 3, 4, 5])
    assert (seq.new_block_ids, seq.num_prompt_tokens, seq.samples) == ([0, 1], 6, True)
    assert seq.admission is not None
    assert (seq.admission.prompt_token_ids, seq.admission.output_token_ids) == ((0, 1, 2, 3, 4, 5), ())
    assert seq.admission.eos_token_ids == (EOS,)
    bench.now = 3.0
    bench.commit(plan)
    for start, new_block_ids in ((6, []), (7, [])):
        plan = bench.scheduler.schedule()
        (seq,) = plan.seqs
        assert (seq.start, seq.token_ids, seq.new_block_ids, seq.admission) == (start, [7], new_block_ids, None)
        bench.now = 7.0
        bench.commit(plan)
    deltas = bench.scheduler.take_deltas()
    assert [delta.token_ids for delta in deltas] == [[7], [7], [7]]
    finish = deltas[-1].finish
    assert finish is not None
    assert (finish.reason, finish.prompt_tokens, finish.output_tokens, finish.cached_tokens) == ("length", 6, 3, 0)
    assert (finish.queue_s, finish.prefill_s, finish.decode_s) == (1.0, 2.0, 4.0)
    assert not bench.scheduler.has_work()
    assert bench.cache.num_free == 64


def test_a_decoding_sequence_gets_a_block_when_it_needs_one() -> None:
    bench = Bench()
    bench.add(1, range(4))
    bench.step()
    assert bench.step().seqs[0].new_block_ids == [1]  # position 4
    assert [bench.step().seqs[0].new_block_ids for _ in range(4)] == [[], [], [], [2]]


def test_eos_ends_and_is_delivered() -> None:
    bench = Bench()
    bench.add(1, range(4))
    bench.step(token=3)
    bench.step(token=EOS)
    last = bench.scheduler.take_deltas()[-1]
    assert last.finish is not None
    assert (last.token_ids, last.finish.reason, last.finish.stop_token_id) == ([EOS], "stop", EOS)


def test_min_tokens_come_before_a_stop() -> None:
    bench = Bench()
    bench.add(1, range(4), min_tokens=3)
    for _ in range(2):
        bench.step(token=EOS)
        assert bench.ends() == {}
    bench.step(token=EOS)
    assert bench.ends() == {(1, 0): "stop"}


def test_what_does_not_fit_the_model_ends_at_its_length() -> None:
    bench = Bench(max_model_len=8)
    bench.add(1, range(6), max_tokens=50)
    bench.step()
    bench.step()
    assert bench.ends() == {(1, 0): "length"}
    bench.add(2, range(8))  # no room for any token
    (delta,) = bench.scheduler.take_deltas()
    assert delta.finish is not None
    assert (delta.token_ids, delta.finish.reason, delta.finish.output_tokens) == ([], "length", 0)


def test_several_tokens_are_cut_at_the_one_that_ends() -> None:
    bench = Bench()
    bench.add(1, range(4))
    logprobs = [TokenLogprobs(token, -1.0, [], []) for token in (3, EOS, 4)]
    plan = bench.scheduler.schedule()
    bench.scheduler.commit(plan, StepResult([[3, EOS, 4]], [logprobs]))
    (delta,) = bench.scheduler.take_deltas()
    assert (delta.token_ids, delta.logprobs) == ([3, EOS], logprobs[:2])
    assert delta.finish is not None
    assert delta.finish.output_tokens == 2
    assert bench.scheduler.stats().output_tokens == 2


def test_a_resumed_request_computes_prompt_and_output_and_delivers_only_what_is_new() -> None:
    bench = Bench()
    bench.add(1, range(4), output_token_ids=(10, 11), max_tokens=3)
    plan = bench.scheduler.schedule()
    (seq,) = plan.seqs
    assert (seq.token_ids, seq.num_prompt_tokens, seq.samples) == ([0, 1, 2, 3, 10, 11], 4, True)
    assert seq.admission is not None
    assert seq.admission.output_token_ids == (10, 11)
    bench.commit(plan)
    (delta,) = bench.scheduler.take_deltas()
    assert delta.finish is not None
    assert (delta.token_ids, delta.finish.reason, delta.finish.output_tokens) == ([7], "length", 3)


@pytest.mark.parametrize(("output", "reason"), [((10, EOS), "stop"), ((10, 11, 12), "length")])
def test_a_resumed_request_that_was_complete_ends_at_once(output: tuple[int, ...], reason: str) -> None:
    bench = Bench()
    bench.add(1, range(4), output_token_ids=output, max_tokens=3)
    (delta,) = bench.scheduler.take_deltas()
    assert delta.finish is not None
    assert (delta.token_ids, delta.finish.reason) == ([], reason)
    assert not bench.scheduler.has_work()


# --- budget and chunks -----------------------------------------------------------------------------------------


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    bench = Bench()
    bench.add(1, range(40))
    assert [bench.shape(bench.step()) for _ in range(3)] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)]]


def test_short_prompts_and_decodes_go_on_beside_a_long_prefill() -> None:
    bench = Bench()
    bench.add(1, range(3))
    bench.step()
    bench.add(2, range(40))
    bench.add(3, range(50, 54))
    assert bench.shape(bench.step()) == [(1, 3, 1), (2, 0, 8), (3, 0, 4)]
    assert bench.shape(bench.step()) == [(1, 4, 1), (3, 4, 1), (2, 8, 7)]


def test_two_long_prompts_leave_room_for_a_short_one() -> None:
    bench = Bench()
    for request_id in (1, 2, 3):
        bench.add(request_id, range(request_id, request_id + (40 if request_id < 3 else 4)))
    assert bench.shape(bench.step()) == [(1, 0, 8), (2, 0, 4), (3, 0, 4)]


def test_slots_limit_who_runs_and_come_back() -> None:
    bench = Bench(max_running=2)
    for request_id in (1, 2, 3):
        bench.add(request_id, [request_id] * 2, max_tokens=2)
    first = bench.step()
    assert sorted(seq.slot for seq in first.seqs) == [0, 1]
    assert [seq.key[0] for seq in bench.step().seqs] == [1, 2]
    assert [seq.key[0] for seq in bench.step().seqs] == [3]


# --- order -----------------------------------------------------------------------------------------------------


def test_priority_then_arrival() -> None:
    bench = Bench(max_running=1, priority_aging_s=30.0)
    bench.add(1, [1], max_tokens=1, priority=1, arrival_s=0.0)
    bench.add(2, [2], max_tokens=1, arrival_s=20.0)
    bench.add(3, [3], max_tokens=1, arrival_s=10.0)
    bench.add(4, [4], max_tokens=1, arrival_s=31.0)
    bench.now = 40.0
    assert [bench.step().seqs[0].key[0] for _ in range(4)] == [3, 2, 1, 4]


def test_no_one_overtakes_a_head_that_does_not_fit() -> None:
    bench = Bench(num_blocks=8, max_model_len=32)
    bench.add(1, range(10), max_tokens=4)  # 3 blocks, growing into a 4th
    bench.step()
    bench.add(2, range(20, 40))  # 5 blocks, and one in reserve
    bench.add(3, [50])
    for _ in range(3):
        assert [seq.key[0] for seq in bench.step().seqs] == [1]
    assert [seq.key[0] for seq in bench.step().seqs] == [2, 3]


# --- preemption ------------------------------------------------------------------------------------------------


def test_the_last_in_order_is_preempted_if_need_be_itself_and_resumes_with_its_tokens() -> None:
    bench = Bench(num_blocks=4, max_model_len=16)
    bench.add(1, range(7), max_tokens=4)
    bench.add(2, [8, 9], max_tokens=5)
    first = bench.step()
    assert [seq.new_block_ids for seq in first.seqs] == [[0, 1], [2]]
    bench.step()
    assert [seq.new_block_ids for seq in bench.step().seqs] == [[3], []]
    assert bench.shape(bench.step()) == [(1, 9, 1)]  # 2 wants a second block, and is the last itself
    assert bench.ends() == {(1, 0): "length"}
    (seq,) = bench.step().seqs
    assert seq.admission is not None
    assert (seq.start, seq.token_ids, seq.num_prompt_tokens) == (4, [7], 2)  # its first block is found again
    assert (seq.new_block_ids[0], seq.admission.output_token_ids) == (2, (7, 7, 7))
    assert seq.epoch > max(seq.epoch for seq in first.seqs)
    bench.step()
    finish = bench.scheduler.take_deltas()[-1].finish
    assert finish is not None
    assert (finish.output_tokens, finish.preemptions, finish.cached_tokens) == (5, 1, 0)


def test_a_victim_that_was_planned_already_leaves_the_plan() -> None:
    """2 came first but is less urgent: 1 runs behind it, and needs a block when 2 is planned already."""
    bench = Bench(num_blocks=4, max_model_len=16)
    bench.add(2, [8, 9], priority=1)
    bench.step()
    bench.add(1, range(7))
    bench.step()
    assert bench.shape(bench.step()) == [(2, 3, 1), (1, 7, 1)]
    plan = bench.step()
    assert bench.shape(plan) == [(1, 8, 1)]
    assert (plan.num_tokens, plan.seqs[0].new_block_ids) == (1, [3])
    assert bench.scheduler.stats().preemptions == 1


def test_a_preempted_request_finds_its_blocks_again_prompt_and_output() -> None:
    bench = Bench(num_blocks=8, max_model_len=32)
    bench.add(1, range(6), max_tokens=20)
    for _ in range(8):
        bench.step()
    request = bench.scheduler._live[1][0]
    bench.scheduler._preempt(request)
    plan = bench.step()
    assert bench.shape(plan) == [(1, 12, 2)]  # 13 computed before, three whole blocks found
    assert plan.seqs[0].new_block_ids[:3] == [0, 1, 2]
    assert plan.seqs[0].admission is not None
    assert plan.seqs[0].admission.output_token_ids == (7,) * 8


# --- prefix cache ----------------------------------------------------------------------------------------------


def test_cached_tokens_are_counted_once_and_only_the_prompts() -> None:
    bench = Bench()
    bench.add(1, range(10), max_tokens=1)
    bench.step()
    bench.add(2, range(10), max_tokens=1)
    assert bench.shape(bench.step()) == [(2, 8, 2)]
    finish = bench.scheduler.take_deltas()[-1].finish
    assert finish is not None
    assert finish.cached_tokens == 8
    stats = bench.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.finished) == (20, 8, 2)


def test_samples_wait_for_the_first_and_share_its_prompt() -> None:
    """The others stay out of the way meanwhile, and keep their place before those who came later."""
    bench = Bench()
    for sample in range(3):
        bench.add(1, range(21), sample=sample, n=3)
    bench.add(2, [50, 51])
    assert bench.shape(bench.step()) == [(1, 0, 8), (2, 0, 2)]
    bench.add(3, [60])
    assert bench.shape(bench.step()) == [(2, 2, 1), (1, 8, 8), (3, 0, 1)]
    assert bench.shape(bench.step()) == [(2, 3, 1), (3, 1, 1), (1, 16, 5)]
    bench.add(4, [70])
    assert bench.shape(bench.step()) == [(1, 21, 1), (2, 4, 1), (3, 2, 1), (1, 20, 1)]
    assert bench.cache.num_free == 64 - 6 - 2 - 1 - 1  # the sample took one block beside the shared five


def test_a_prefix_of_two_requests_is_computed_once() -> None:
    """The second waits for what the first computes, is overtaken meanwhile, and starts with the first own token."""
    bench = Bench()
    bench.add(1, range(20))
    bench.add(2, [*range(12), *range(30, 35)])
    bench.add(3, [50, 51])
    assert bench.shape(bench.step()) == [(1, 0, 8), (3, 0, 2)]
    assert bench.shape(bench.step()) == [(3, 2, 1), (1, 8, 8)]
    assert bench.shape(bench.step()) == [(3, 3, 1), (1, 16, 4), (2, 12, 5)]


def test_who_waits_for_a_prefix_computes_it_when_the_first_is_gone() -> None:
    bench = Bench()
    bench.add(1, range(20))
    bench.add(2, range(20))
    assert bench.shape(bench.step()) == [(1, 0, 8)]
    bench.scheduler.abort(1)
    assert bench.shape(bench.step()) == [(2, 8, 12)]


@pytest.mark.parametrize("when", ["queued", "running"])
def test_the_samples_go_on_when_the_first_is_gone(when: str) -> None:
    bench = Bench()
    for sample in range(3):
        bench.add(1, range(20), sample=sample, n=3, max_tokens=2)
    if when == "running":
        bench.step()
    assert bench.scheduler.abort(1, sample=0) == 1
    bench.drain()
    assert bench.ends() == {(1, 0): "cancelled", (1, 1): "length", (1, 2): "length"}


# --- ends ------------------------------------------------------------------------------------------------------


def test_abort_ends_wherever_the_request_is() -> None:
    bench = Bench(max_running=1)
    bench.add(1, [1])
    bench.add(2, [2])
    for sample in (0, 1):
        bench.add(3, [3], sample=sample, n=2)
    bench.step()
    assert [bench.scheduler.abort(request_id) for request_id in (1, 2, 3, 4)] == [1, 1, 2, 0]
    assert bench.ends() == dict.fromkeys([(1, 0), (2, 0), (3, 0), (3, 1)], "cancelled")
    assert bench.scheduler.abort(1) == 0
    assert not bench.scheduler.has_work()
    assert bench.scheduler.schedule().seqs == []


def test_abort_of_one_sample_with_a_reason() -> None:
    bench = Bench()
    for sample in (0, 1):
        bench.add(3, [3], sample=sample, n=2)
    assert bench.scheduler.abort(3, sample=1, reason="failed") == 1
    assert bench.scheduler.abort(3, sample=1) == 0
    assert bench.ends() == {(3, 1): "failed"}


def test_deadlines_pass_while_running_and_while_waiting() -> None:
    bench = Bench(max_running=1)
    bench.add(1, [1], deadline_at_s=5.0, arrival_s=0.0)
    bench.add(2, [2], deadline_at_s=4.0, arrival_s=1.0)
    bench.add(3, [3], deadline_at_s=4.5, arrival_s=1.5)
    bench.now = 3.99
    bench.step()
    assert bench.ends() == {}
    bench.now = 4.0
    bench.step()
    assert bench.ends() == {(2, 0): "deadline"}
    bench.now = 5.0
    assert [seq.key[0] for seq in bench.step().seqs] == []
    assert set(bench.ends().values()) == {"deadline"}


def test_a_failed_sequence_ends_with_its_message_and_no_token() -> None:
    bench = Bench()
    bench.add(1, [1])
    bench.add(2, [2])
    plan = bench.scheduler.schedule()
    bench.commit(plan, failures={0: "logits are not finite"})
    failed, other = bench.scheduler.take_deltas()
    assert failed.finish is not None
    assert (failed.request_id, failed.token_ids, failed.finish.reason) == (1, [], "failed")
    assert failed.finish.message == "logits are not finite"
    assert (other.request_id, other.token_ids) == (2, [7])


# --- late results ----------------------------------------------------------------------------------------------


def test_a_result_that_comes_after_the_end_is_dropped() -> None:
    bench = Bench()
    bench.add(1, [1, 2])
    plan = bench.scheduler.schedule()
    bench.scheduler.abort(1)
    bench.add(1, [3, 4])  # the same key again
    bench.commit(plan)
    assert bench.ends() == {(1, 0): "cancelled"}
    again = bench.scheduler.schedule()
    bench.commit(plan)  # now the key runs, in another epoch
    assert bench.scheduler.take_deltas() == []
    bench.commit(again)
    assert bench.scheduler.take_deltas() == [TokenDelta(1, 0, [7], None, None)]


def test_a_result_that_comes_after_a_preemption_is_dropped() -> None:
    bench = Bench()
    bench.add(1, [1, 2])
    plan = bench.scheduler.schedule()
    bench.scheduler._preempt(bench.scheduler._live[1][0])
    bench.commit(plan)
    again = bench.scheduler.schedule()
    bench.commit(plan)
    assert bench.scheduler.take_deltas() == []
    bench.commit(again)
    bench.commit(again)  # the same result twice
    assert [delta.token_ids for delta in bench.scheduler.take_deltas()] == [[7]]


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_held_siblings_included() -> None:
    bench = Bench(max_waiting=3)
    for sample in (0, 1):
        bench.add(1, [1], sample=sample, n=2)
    bench.add(2, [1])
    with pytest.raises(QueueFull, match="max_waiting"):
        bench.add(3, [1])
    bench.step()
    bench.add(3, [1])


def test_the_same_key_twice_is_refused_while_it_lives() -> None:
    bench = Bench()
    bench.add(1, [1], max_tokens=1)
    with pytest.raises(DuplicateRequest):
        bench.add(1, [1])
    bench.step()
    bench.add(1, [1])


@pytest.mark.parametrize("prompt", [[], range(65)])
def test_prompts_without_tokens_or_with_too_many(prompt: Any) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        Bench().add(1, prompt)


def test_a_request_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        Bench().scheduler.add(NewRequest(request_id=1, prompt_token_ids=(1,), sampling=SamplingParams()))


@pytest.mark.parametrize(
    "limits",
    [
        {"max_running": 17},
        {"max_running": 0},
        {"max_chunk_tokens": 0},
        {"max_model_len": 257},
        {"max_model_len": 0},
    ],
)
def test_limits_that_could_stall_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Bench(**limits)


def test_a_result_of_another_size_is_refused() -> None:
    bench = Bench()
    bench.add(1, [1])
    with pytest.raises(ValueError, match="0 results"):
        bench.scheduler.commit(bench.scheduler.schedule(), StepResult([]))
