"""Masks of tokens: by parts against the definitions, and through the engine against direct sampling, whatever
happens to a request: overlapped steps, random chunks, preemptions, resumed answers, steps that are run again."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cuts import random_cuts
from sampling_twin import EOS, TABLE, VOCAB, directly, must_close, permitted, request_of
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit, ThinkingBudget
from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.masks import NOTHING_LEFT, Masks
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.plan import StepPlan, StepResult

MODES = ("plain", "overlapped", "staged")
FEW = [3, 4, 5, 6]  # tokens that answers are made of, so that words come up
BIAS = dict.fromkeys(FEW, 12.0)
BLOCK_TOKENS = 4
STEPS = 2000

tokens = st.sampled_from(FEW)
words = st.lists(st.lists(tokens, min_size=1, max_size=4), max_size=6)
budgets = st.one_of(
    st.none(), st.builds(ThinkingBudget, st.integers(0, 4), st.just(3), st.sampled_from([4, EOS]), st.booleans())
)


@pytest.fixture(autouse=True)
def _bind() -> None:
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.ref.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})


# --- one sequence ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(banned=words, thinking=budgets, output=st.lists(tokens, max_size=12), known=st.integers(0, 12))
def test_what_may_come_next_follows_from_the_output(
    banned: list[list[int]], thinking: ThinkingBudget | None, output: list[int], known: int
) -> None:
    """However much of it was known at the beginning, and whether its last token is known or a condition."""
    request = request_of(1, [3, 3, 3], {"banned": banned, "thinking": thinking})
    masks = Masks((), [tuple(word) for word in banned], thinking, output[:known])
    for token in output[known:]:
        masks.append(token)
    single, no_pairs = masks.banned(pending=False)
    assert not len(no_pairs)
    forced = masks.forced(pending=False)
    assert (forced is not None) == must_close(thinking, output)
    if forced is None:
        assert {*range(VOCAB)} - {*single.tolist()} == {*permitted(request, output)}
    for last in range(VOCAB):
        single, pairs = masks.banned(pending=True)
        forced = masks.forced(pending=True)
        holds = forced is not None and (last == forced.last) == forced.is_last
        if must_close(thinking, output) and last != thinking.close_id:
            continue  # it was forced: no other token can be the pending one
        assert holds == must_close(thinking, [*output, last])
        if not holds:
            banned_now = {*single.tolist(), *(token for before, token in pairs.tolist() if before == last)}
            assert {*range(VOCAB)} - banned_now == {*permitted(request, [*output, last])}


def test_a_word_that_begins_in_the_prompt_is_none_of_the_answer_s() -> None:
    masks = Masks((), [(3, 4)], None)
    assert masks.banned(pending=False)[0].tolist() == []
    masks.append(3)
    assert masks.banned(pending=False)[0].tolist() == [4]


def test_each_thought_has_the_budget_and_an_opening_within_one_is_part_of_it() -> None:
    thinking = ThinkingBudget(2, 8, 9)
    output: list[int] = []
    chosen = iter([8, 8, 1, 5, 8, 9, 8, 1, 1])
    while len(output) < 10:
        masks = Masks((), (), thinking, output)
        forced = masks.forced(pending=False)
        output.append(next(chosen) if forced is None else forced.token_id)
    assert output == [8, 8, 1, 9, 5, 8, 9, 8, 1, 1]
    forced = Masks((), (), thinking, output).forced(pending=False)
    assert forced is not None
    assert forced.token_id == 9


# --- through the engine ------------------------------------------------------------------------------------


class TableModel:
    """Logits are a function of the last token and its position."""

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        chosen = slice(None) if logit_rows is None else logit_rows
        return TABLE[(inputs.token_ids[chosen] * 31 + inputs.positions[chosen]) % len(TABLE)]


def make_core(mode: str, num_blocks: int, runner: Runner | None = None) -> EngineCore:
    limits = SchedulerConfig(budget_tokens=12, max_chunk_tokens=5, max_running=5, max_model_len=48)
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, hash_key="00" * 16)
    config = fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=(EOS,))
    staged = DeviceRows(torch.device("cpu")) if mode == "staged" else None
    model = ModelRunner(
        TableModel(), cast(KVPool, None), limits.max_running, staged=staged, overlap=mode != "plain"
    )
    return EngineCore(config, runner or model)


Answers = dict[tuple[int, int], tuple[list[int], str, str]]  # tokens, reason, message


def run(core: EngineCore, requests: list[Submit], mode: str, seed: int = 0) -> Answers:
    """Tokens and ends of requests that arrive at random."""
    draw, waiting = random.Random(seed), [*requests]
    answers: dict[tuple[int, int], list[int]] = {}
    ended: Answers = {}
    for _ in range(STEPS):
        while waiting and draw.random() < 0.5:
            core.submit(waiting.pop(0))
        for delta in core.step_plain() if mode == "plain" else core.step_overlapped():
            key = (delta.request_id, delta.sample)
            answers.setdefault(key, []).extend(delta.token_ids)
            if delta.finish is not None:
                ended[key] = (answers[key], delta.finish.reason, delta.finish.message)
        core.check()
        if not waiting and not core.has_work():
            break
    assert len(ended) == sum(request.sampling.n for request in requests)
    return ended


@st.composite
def requests_with_masks(draw: st.DrawFn) -> dict[str, Any]:
    allowed = draw(st.one_of(st.just(()), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9, unique=True)))
    return {
        "prompt": draw(st.lists(tokens, min_size=1, max_size=9)),
        "max_tokens": draw(st.integers(1, 24)),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "logit_bias": draw(st.sampled_from([{}, BIAS])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "stop_token_ids": draw(st.sampled_from([(), (6,)])),
        "min_tokens": draw(st.sampled_from([0, 5])),
        "logprobs": draw(st.sampled_from([None, 2])),
        "n": draw(st.sampled_from([1, 2])),
        "allowed_token_ids": (*allowed, *([draw(tokens)] if allowed else [])),
        "banned": draw(words),
        "thinking": draw(budgets),
        "is_resumed": draw(st.booleans()),
    }


def submits(asked: list[dict[str, Any]]) -> list[Submit]:
    """The requests; those that go on in the middle have what came before from direct sampling."""
    made = []
    for number, ask in enumerate(asked):
        params = {name: value for name, value in ask.items() if name not in ("prompt", "is_resumed")}
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        request = request_of(number, ask["prompt"], params)
        if ask["is_resumed"] and request.sampling.n == 1 and (known := len(directly(request, 0)[0]) // 2):
            request = request_of(number, ask["prompt"], {**params, "output": directly(request, 0)[0][:known]})
        made.append(request)
    return made


def expected(request: Submit, sample: int) -> tuple[list[int], str, str]:
    """Tokens and end of a sample, of direct sampling."""
    found = directly(request, sample)[0]
    whole, params = [*request.output_token_ids, *found], request.sampling
    stops = {*params.stop_token_ids, EOS}
    if whole and whole[-1] in stops and len(whole) >= params.min_tokens:
        return found, "stop", ""
    return (found, "length", "") if len(whole) == params.max_tokens else (found, "failed", NOTHING_LEFT)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(requests_with_masks(), min_size=1, max_size=6),
    num_blocks=st.sampled_from([13, 60]),
    seed=st.integers(0, 1 << 30),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
)
def test_answers_are_those_of_direct_sampling_whatever_happens_around_them(
    mode: str, asked: list[dict[str, Any]], num_blocks: int, seed: int, cuts: int | None
) -> None:
    requests = submits(asked)
    with random_cuts(cuts):
        answers = run(make_core(mode, num_blocks), requests, mode, seed)
    for request in requests:
        for sample in range(request.sampling.n):
            assert answers[request.request_id, sample] == expected(request, sample), request


THREES = {"logit_bias": {3: 90.0, 4: 60.0}, "temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
MANY = [
    {**THREES, "banned": [[3, 3, 3], [4, 4]]},
    {**THREES, "allowed_token_ids": (5, 6, 7)},
    {**THREES, "thinking": ThinkingBudget(5, 3, 4)},
    {**THREES, "thinking": ThinkingBudget(3, 3, 9, True), "banned": [[4, 3]]},
    {**THREES, "thinking": ThinkingBudget(0, 3, 9)},
]


@pytest.mark.parametrize("mode", MODES)
def test_masks_survive_preemptions(mode: str) -> None:
    requests = [request_of(number, [3, number], params) for number, params in enumerate(MANY)]
    core = make_core(mode, 13)
    answers = run(core, requests, mode)
    assert core.stats().preemptions > 0
    for request in requests:
        assert answers[request.request_id, 0] == expected(request, 0)
    assert answers[0, 0][0][:8] == [3, 3, 4, 3, 3, 4, 3, 3]
    assert answers[2, 0][0][:9] == [3, 3, 3, 3, 3, 3, 4, 3, 3]
    assert answers[3, 0][0][:7] == [3, 3, 3, 9, 3, 3, 3]
    assert answers[4, 0][0][:4] == [3, 9, 3, 9]


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_are_those_of_the_raw_logits(mode: str) -> None:
    params = {"temperature": 0.0, "logprobs": 3, "allowed_token_ids": (7,), "thinking": ThinkingBudget(1, 7, 9)}
    request = request_of(0, [3], {**params, "max_tokens": 4})
    core = make_core(mode, 60)
    core.submit(request)
    found = []
    while core.has_work():
        for delta in core.step_plain() if mode == "plain" else core.step_overlapped():
            found += delta.logprobs or []
    assert [entry.token_id for entry in found] == [7, 7, 9, 7]
    assert found == directly(request, 0)[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_has_nothing_left_fails_alone_and_says_why(mode: str, temperature: float) -> None:
    base = {"temperature": temperature, "max_tokens": 6}
    requests = [
        request_of(0, [3], base),
        request_of(1, [3], {**base, "allowed_token_ids": (3, 4), "banned": [[4], [3, 3]]}),
        request_of(2, [3], {**base, "banned": [[token] for token in range(VOCAB)]}),
    ]
    answers = run(make_core(mode, 60), requests, mode)
    assert answers[0, 0] == expected(requests[0], 0)
    assert answers[1, 0] == ([3], "failed", NOTHING_LEFT)
    assert answers[2, 0] == ([], "failed", NOTHING_LEFT)


# --- the fake runner ---------------------------------------------------------------------------------------


class Failing(FakeRunner):
    """Raises in some steps once their results are chosen."""

    def __init__(self, num_blocks: int, fails: set[int]) -> None:
        super().__init__(vocab_size=VOCAB, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, max_running=5)
        self._fails = fails
        self._count = 0

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        self._count += 1
        super().launch(plan, batch)
        if self._count in self._fails:
            self._results.pop()
            raise RuntimeError("broken")

    def collect(self) -> StepResult:
        result = super().collect()
        if -self._count in self._fails:
            self._fails.discard(-self._count)
            raise RuntimeError("broken")
        return result


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(requests_with_masks(), min_size=1, max_size=6),
    num_blocks=st.sampled_from([13, 60]),
    seed=st.integers(0, 1 << 30),
    fails=st.sets(st.integers(-20, 20), max_size=4),
)
def test_a_model_that_is_made_up_keeps_to_the_masks_too(
    asked: list[dict[str, Any]], num_blocks: int, seed: int, fails: set[int]
) -> None:
    """With steps one by one or overlapped, and with some that are run again."""
    requests = [request_of(number, ask["prompt"], _plain(ask)) for number, ask in enumerate(asked)]
    found = [
        run(make_core(mode, num_blocks, Failing(num_blocks, failing)), requests, mode, seed)
        for mode, failing in (("plain", set()), ("plain", {*fails}), ("overlapped", {*fails}))
    ]
    broken = [key for answers in found for key, end in answers.items() if "broken" in end[2]]
    for request in requests:
        for sample in range(request.sampling.n):
            key = request.request_id, sample
            answer = found[0][key][0]
            for at, token in enumerate(answer):
                assert token in permitted(request, answer[:at])
            if found[0][key][1] == "failed":
                assert found[0][key][2] == NOTHING_LEFT
                assert not permitted(request, answer)
            if key not in broken:
                assert found[0][key] == found[1][key] == found[2][key]


def _plain(ask: dict[str, Any]) -> dict[str, Any]:
    """A request's parameters, without what the fake runner does not know."""
    names = ("max_tokens", "temperature", "n", "allowed_token_ids", "banned", "thinking")
    return {name: ask[name] for name in names}
