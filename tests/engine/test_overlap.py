"""Overlapped steps give the tokens of steps one by one, whatever comes between: stops, preemptions, aborts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cuts import random_cuts

from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import Abort, Submit, TokenDelta
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import SeqPlan, StepPlan, TokenLogprobs, unpacked_entry

VOCAB = 11  # small, so that stop tokens come early
BLOCK_TOKENS = 4
STEPS = 600


class Deferring(FakeRunner):
    """As a GPU does, it has results when they are collected; how many steps were in flight at once is counted."""

    ends: dict[int, int]  # slot -> tokens at which its sequence ends
    beyond: list[SeqPlan]  # noted, not raised: what a launch raises ends a sequence that has ended anyway
    deepest = 0

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        for seq in plan.seqs:
            if seq.admission is not None:
                ends = len(seq.admission.prompt_token_ids) + seq.admission.sampling.max_tokens
                self.ends[seq.slot] = ends
            # the last token of a sequence is not computed: nobody asks for the one after it
            if seq.start + len(seq.token_ids) >= self.ends[seq.slot]:
                self.beyond.append(seq)
        super().launch(plan, batch)
        self.deepest = max(self.deepest, len(self._results))


def make_core(num_blocks: int) -> tuple[EngineCore, Deferring]:
    limits = SchedulerConfig(budget_tokens=12, max_chunk_tokens=5, max_running=4, max_model_len=40)
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks)
    runner = Deferring(vocab_size=VOCAB, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, max_running=4)
    runner.ends, runner.beyond = {}, []
    return EngineCore(fake_config(limits, cache, vocab_size=VOCAB), runner), runner


def run(
    seed: int, num_blocks: int, *, overlapped: bool, aborts: bool = False
) -> tuple[dict[int, list[int]], dict[int, str], int]:
    """Tokens and end of every request of a random load, and the number of preemptions. Of every third the prompt is
    scored: its log-probabilities stand under a negative number."""
    core, runner = make_core(num_blocks)
    step = core.step_overlapped if overlapped else core.step_plain
    rng = random.Random(seed)
    tokens: dict[int, list[int]] = {}
    scores: dict[int, list[TokenLogprobs]] = {}
    ends: dict[int, str] = {}

    def take(deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert delta.request_id not in ends, "a sequence goes on after its end"
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            scores.setdefault(delta.request_id, []).extend(map(unpacked_entry, delta.prompt_logprobs or ()))
            if delta.finish is not None:
                ends[delta.request_id] = delta.finish.reason
                assert delta.finish.output_tokens == len(tokens[delta.request_id])

    prompts: dict[int, list[int]] = {}
    for number in range(12):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 18),
            seed=number,
            stop_token_ids=(rng.randrange(VOCAB),),
            prompt_logprobs=None if number % 3 else 2,
        )
        prompts[number] = [] if number % 3 else prompt[1:]
        core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=params))
        for _ in range(rng.randrange(4)):
            take(step())
        if aborts and number % 4 == 3:
            core.abort(Abort(request_id=number - 1))
        core.check()
    for _ in range(STEPS):
        if not core.has_work():
            break
        take(step())
        core.check()
    assert not core.has_work()
    assert set(ends) == set(range(12))
    assert runner.deepest == (2 if overlapped else 1)
    assert not runner.beyond
    for number, entries in scores.items():
        scored = [entry.token_id for entry in entries]
        assert scored == prompts[number][: len(scored) if ends[number] == "cancelled" else None]
        tokens[-1 - number] = [int(256 * entry.logprob) for entry in entries]
    return tokens, ends, core.stats().preemptions


@pytest.mark.parametrize("num_blocks", [10, 12, 200])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), cuts=st.one_of(st.none(), st.integers(0, 1 << 30)))
def test_the_same_tokens(num_blocks: int, seed: int, cuts: int | None) -> None:
    plain = run(seed, num_blocks, overlapped=False)
    with random_cuts(cuts):
        overlapped = run(seed, num_blocks, overlapped=True)
    assert overlapped[:2] == plain[:2]


def test_little_memory_makes_it_preempt_in_flight() -> None:
    assert run(7, 10, overlapped=True)[2] > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_who_is_not_aborted_keeps_its_tokens(seed: int) -> None:
    whole = run(seed, 12, overlapped=True)
    tokens, ends, _ = run(seed, 12, overlapped=True, aborts=True)
    for number, reason in ends.items():
        if reason == "cancelled":
            assert tokens.get(number, []) == whole[0][number][: len(tokens.get(number, []))]
        else:
            assert tokens[number] == whole[0][number]
