"""A step that raises ends the sequence that makes it raise, and no other: those go on with the tokens of their run
alone."""

from __future__ import annotations

from collections import deque
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.engine.messages import Abort, Submit, TokenDelta
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import RequestKey, StepPlan, StepResult

VOCAB, BLOCK_TOKENS, MAX_RUNNING = 50, 4, 6
Where = Literal["launch", "collect"]
Mode = Literal["plain", "overlapped"]
MODES: tuple[Mode, ...] = ("plain", "overlapped")
PLACES: tuple[Where, ...] = ("launch", "collect")
PREFIX = [1, 2, 3, 4, 5, 6, 7, 8]


class Faulty(FakeRunner):
    """Raises in every step that computes a culprit's token at its position or beyond, and in the steps of
    `unlucky`, once each. Half of such a step has then overwritten cache entries."""

    def __init__(self, num_blocks: int, where: Where, culprits: dict[RequestKey, int], unlucky: set[int]) -> None:
        super().__init__(
            vocab_size=VOCAB, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, max_running=MAX_RUNNING
        )
        self._where = where
        self._culprits = culprits
        self._unlucky = set(unlucky)
        self._raises: deque[bool] = deque()
        self.launches = 0

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        self.launches += 1
        raises = plan.step in self._unlucky or any(
            seq.start + len(seq.token_ids) > self._culprits.get(seq.key, 1 << 30) for seq in plan.seqs
        )
        self._unlucky.discard(plan.step)
        super().launch(plan, batch)
        if raises:
            self._cache[batch.cache_slots[::2]] = np.uint64(666)
        if raises and self._where == "launch":
            self._results.pop()
            raise RuntimeError("broken")
        self._raises.append(raises)

    def collect(self) -> StepResult:
        result = super().collect()
        if self._raises.popleft():
            raise RuntimeError("broken")
        return result

    def reset(self) -> None:
        super().reset()
        self._raises.clear()


class Load:
    """A core with a faulty runner, and what became of its requests."""

    def __init__(
        self,
        mode: Mode,
        where: Where = "launch",
        culprits: dict[RequestKey, int] | None = None,
        unlucky: set[int] | None = None,
        num_blocks: int = 64,
    ) -> None:
        limits = SchedulerConfig(budget_tokens=14, max_chunk_tokens=5, max_running=MAX_RUNNING, max_model_len=40)
        cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, hash_key="00" * 16)
        self.runner = Faulty(num_blocks, where, culprits or {}, unlucky or set())
        self.core = EngineCore(fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=(49,)), self.runner)
        self.tokens: dict[RequestKey, list[int]] = {}
        self.ends: dict[RequestKey, tuple[str, str]] = {}
        self._step = self.core.step_plain if mode == "plain" else self.core.step_overlapped

    def step(self) -> None:
        self.take(self._step())
        self.core.check()

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.sample)
            assert key not in self.ends, f"{key} goes on after its end"
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish is not None:
                self.ends[key] = (delta.finish.reason, delta.finish.message)

    def finish(self) -> None:
        for _ in range(2000):
            if not self.core.has_work():
                break
            self.step()
        assert not self.core.has_work()
        stats = self.core.stats()
        assert stats.free_blocks == stats.total_blocks


def submit(number: int, prompt: list[int], max_tokens: int = 9, n: int = 1) -> Submit:
    params = SamplingParams(max_tokens=max_tokens, seed=number, n=n)
    return Submit(request_id=number, prompt_token_ids=prompt, sampling=params)


def alone(request: Submit) -> Load:
    load = Load("plain")
    load.core.submit(request)
    load.finish()
    return load


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("position", [0, 11, 13])  # in the prompt, its last token, an output token
def test_the_culprit_of_many_ends_alone(mode: Mode, where: Where, position: int) -> None:
    requests = [submit(number, [*PREFIX, 9, number, 3, 3]) for number in range(10)]
    load = Load(mode, where, {(4, 0): position})
    for request in requests:
        load.core.submit(request)
    load.finish()
    for request in requests:
        key, expected = (request.request_id, 0), alone(request)
        if key == (4, 0):
            reason, message = load.ends[key]
            assert reason == "failed"
            assert message.endswith("failed: RuntimeError: broken")
            assert load.tokens[key] == expected.tokens[key][: max(0, position - 11)]
        else:
            assert load.tokens[key] == expected.tokens[key]
            assert load.ends[key] == expected.ends[key]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", PLACES)
def test_a_step_that_fails_once_ends_nobody(mode: Mode, where: Where) -> None:
    requests = [submit(number, [number, 2]) for number in range(3)]
    load = Load(mode, where, unlucky={1, 3, 4})
    for request in requests:
        load.core.submit(request)
    load.finish()
    for request in requests:
        assert load.tokens[request.request_id, 0] == alone(request).tokens[request.request_id, 0]
        assert load.ends[request.request_id, 0] == alone(request).ends[request.request_id, 0]


def test_a_culprit_is_found_in_few_launches() -> None:
    """Six sequences, two halves of three, and of the half that fails the one and the other two."""
    load = Load("plain", culprits={(3, 0): 2})
    for number in range(MAX_RUNNING):
        load.core.submit(submit(number, [number, 2]))
    load.step()
    before = load.runner.launches
    load.step()
    assert load.runner.launches - before == 1 + 2 + 2
    assert load.ends[3, 0][0] == "failed"


def test_a_failed_sequence_among_samples_hands_the_prompt_on() -> None:
    """Samples that wait for the first one's prompt are not left waiting when that one ends."""
    load = Load("plain", culprits={(1, 0): 3})
    request = submit(1, [*PREFIX, 9], n=3)
    load.core.submit(request)
    load.finish()
    assert load.ends[1, 0][0] == "failed"
    expected = alone(request)
    for sample in (1, 2):
        assert load.tokens[1, sample] == expected.tokens[1, sample]


def test_who_was_ended_since_is_not_run_again() -> None:
    """An aborted sequence's slot and blocks are another's by the time when its step is found to have failed."""
    load = Load("overlapped", "collect", unlucky={3}, num_blocks=10)
    first, second = submit(1, [*PREFIX, 9], 20), submit(2, [*PREFIX, 30, 31, 32], 20)
    load.core.submit(first)
    for _ in range(3):
        load.step()  # step 3 is in flight
    load.core.abort(Abort(request_id=1))
    load.core.submit(second)
    load.finish()
    assert load.ends[1, 0][0] == "cancelled"
    assert load.tokens[2, 0] == alone(second).tokens[2, 0]


@st.composite
def loads(draw: st.DrawFn) -> tuple[dict[RequestKey, int], set[int], int, list[tuple[int, Submit]], set[int]]:
    """Culprits, unlucky steps, blocks, (turn of its arrival, request), and turns at which a request is aborted."""
    arrivals: list[tuple[int, Submit]] = []
    culprits: dict[RequestKey, int] = {}
    for number in range(draw(st.integers(2, 9))):
        prompt = draw(st.sampled_from([[], PREFIX[:4], PREFIX])) + draw(st.lists(st.integers(0, 9), min_size=1))[:8]
        request = submit(number, prompt, draw(st.integers(1, 12)), draw(st.integers(1, 2)))
        arrivals.append((draw(st.integers(0, 9)), request))
        if draw(st.booleans()):
            culprits[number, 0] = draw(st.integers(0, len(prompt) + 8))
    unlucky = draw(st.sets(st.integers(1, 25), max_size=6))
    return culprits, unlucky, draw(st.integers(10, 24)), arrivals, draw(st.sets(st.integers(0, 8), max_size=2))


@settings(max_examples=120, deadline=None)
@given(loads(), st.sampled_from(MODES), st.sampled_from(PLACES))
def test_failures_of_some_change_no_token_of_others(
    given: tuple[dict[RequestKey, int], set[int], int, list[tuple[int, Submit]], set[int]], mode: Mode, where: Where
) -> None:
    culprits, unlucky, num_blocks, arrivals, aborted = given
    load = Load(mode, where, culprits, unlucky, num_blocks)
    for turn in range(10):
        for _, request in (pair for pair in arrivals if pair[0] == turn):
            load.core.submit(request)
        load.step()
        if turn in aborted:
            load.core.abort(Abort(request_id=turn))
    load.finish()
    for _, request in arrivals:
        expected = alone(request)
        for sample in range(request.sampling.n):
            key = (request.request_id, sample)
            reason, tokens = load.ends[key][0], load.tokens[key]
            if reason in ("failed", "cancelled"):
                assert key in culprits or request.request_id in aborted or unlucky
                assert tokens == expected.tokens[key][: len(tokens)]
            else:
                assert (tokens, reason) == (expected.tokens[key], expected.ends[key][0])
            if key in culprits and reason != "cancelled":
                last_computed = len(request.prompt_token_ids) + len(expected.tokens[key]) - 1
                assert (reason == "failed") == (culprits[key] < last_computed) or unlucky
