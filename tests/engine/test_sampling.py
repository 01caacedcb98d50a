"""Sampling through the engine, from fixed logits, against a direct and slow computation of the same tokens."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from sampling_twin import EOS, TABLE, VOCAB, directly, row_of, variety
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit, TokenLogprobs
from cierzo.engine.worker import sampling
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.edits import TokenHistory
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.masks import NOTHING_LEFT
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.sampling import NOT_FINITE, Sampler
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.ref import sampling as ref
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, Finish

MODES = ("plain", "overlapped", "staged")
BROKEN = 13  # a token after which one of the model's logits is what a test wants


@pytest.fixture(autouse=True)
def _bind() -> None:
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.ref.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})

    def draw(logits: Tensor, *parameters: Tensor) -> Tensor:
        assert logits.max(dim=1).values.isfinite().all(), "the CPU must not draw from rows that mean nothing"
        return ref.draw(logits, *parameters)

    vars(bound)["draw"] = draw


class TableModel:
    """Logits are a function of the last token and its position. Counts the rows that reach `logits`."""

    def __init__(self, breaks: float | None = None) -> None:
        self.breaks = breaks
        self.num_rows = 0

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        chosen = slice(None) if logit_rows is None else logit_rows
        token_ids, positions = inputs.token_ids[chosen], inputs.positions[chosen]
        self.num_rows += len(token_ids)
        rows = TABLE[(token_ids * 31 + positions) % len(TABLE)]
        if self.breaks is not None:
            rows[token_ids == BROKEN, 3] = self.breaks
        return rows


def make_core(model: TableModel | None = None, mode: str = "plain", **limits: int) -> EngineCore:
    """mode: "plain"; "overlapped": tokens are chosen before the step before is collected; "staged": and copied."""
    scheduler = SchedulerConfig(
        **{"budget_tokens": 16, "max_chunk_tokens": 8, "max_running": 8, "max_model_len": 64, **limits}
    )
    cache = CacheConfig(block_tokens=4, num_blocks=24, hash_key="00" * 16)
    config = fake_config(scheduler, cache, vocab_size=VOCAB, eos_token_ids=(EOS,))
    runner = ModelRunner(
        model or TableModel(),
        cast(KVPool, None),
        scheduler.max_running,
        staged=DeviceRows(torch.device("cpu")) if mode == "staged" else None,
        overlap=mode != "plain",
    )
    return EngineCore(config, runner)


def run(
    requests: list[Submit], model: TableModel | None = None, mode: str = "plain", **limits: int
) -> dict[tuple[int, int], Answer]:
    return finish(make_core(model, mode, **limits), requests, mode)


def finish(core: EngineCore, requests: list[Submit], mode: str) -> dict[tuple[int, int], Answer]:
    for request in requests:
        core.submit(request)
    answers: dict[tuple[int, int], Answer] = {}
    while core.has_work():
        for delta in core.step_plain() if mode == "plain" else core.step_overlapped():
            answer = answers.setdefault((delta.request_id, delta.sample), Answer())
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.finish = delta.finish
        core.check()
    answers[-1, 0] = Answer()
    answers[-1, 0].tokens = [core.stats().preemptions]
    return answers


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish: Finish | None = None


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_running": 16, "budget_tokens": 40}, {"max_running": 1}, {"budget_tokens": 8, "max_chunk_tokens": 1}],
)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_logprobs_are_those_of_direct_sampling_whatever_the_batch(
    mode: str, limits: dict[str, int]
) -> None:
    answers = run(variety(), mode=mode, **limits)
    for request in variety():
        for sample in range(request.sampling.n):
            answer = answers[request.request_id, sample]
            expected = directly(request, sample)
            assert answer.tokens == expected[0], request
            assert answer.logprobs == expected[1], request  # bit for bit
    assert answers[2, 0].tokens != answers[3, 0].tokens


@pytest.mark.parametrize("mode", MODES)
def test_penalties_survive_a_preemption(mode: str) -> None:
    params = SamplingParams(
        max_tokens=40, temperature=0.0, frequency_penalty=0.8, repetition_penalty=1.2, ignore_eos=True
    )
    requests = [Submit(request_id=i, prompt_token_ids=[i, 3, 3], sampling=_seeded(params, i)) for i in range(4)]
    answers = run(requests, mode=mode)
    assert answers[-1, 0].tokens[0] > 0  # preemptions
    for request in requests:
        assert answers[request.request_id, 0].tokens == directly(request, 0)[0]


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, "seed": seed})


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_request_alone(logit: float, mode: str) -> None:
    greedy = SamplingParams(max_tokens=5, temperature=0.0, seed=1)
    alone = run([Submit(request_id=0, prompt_token_ids=[BROKEN], sampling=greedy)], TableModel(logit), mode)
    assert alone[0, 0].finish is not None
    assert alone[0, 0].finish.message == NOT_FINITE
    good = SamplingParams(max_tokens=5, temperature=0.7, seed=1, logprobs=1)
    bias = SamplingParams(max_tokens=5, temperature=0.7, seed=1, logit_bias={3: 1.0})
    requests = [
        Submit(request_id=0, prompt_token_ids=[4], sampling=good),
        Submit(request_id=1, prompt_token_ids=[BROKEN], sampling=good),
        Submit(request_id=2, prompt_token_ids=[BROKEN], sampling=bias),
    ]
    answers = run(requests, TableModel(logit), mode)
    for request_id in (1, 2):
        finish = answers[request_id, 0].finish
        assert finish is not None
        assert (finish.reason, finish.message) == ("failed", NOT_FINITE)
    if BROKEN not in answers[0, 0].tokens[:-1]:
        assert answers[0, 0].tokens == directly(requests[0], 0)[0]


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_itself_no_token_fails_alone(temperature: float, mode: str) -> None:
    """Every token stops, and none may before min_tokens; possible with a small vocabulary."""
    base = {"max_tokens": 5, "temperature": temperature, "seed": 1, "logprobs": 1}
    nothing = SamplingParams(**base, stop_token_ids=tuple(range(VOCAB)), min_tokens=3)
    requests = [
        Submit(request_id=0, prompt_token_ids=[4], sampling=SamplingParams(**base)),
        Submit(request_id=1, prompt_token_ids=[4], sampling=nothing),
    ]
    answers = run(requests, mode=mode)
    assert (answers[1, 0].finish.reason, answers[1, 0].finish.message) == ("failed", NOTHING_LEFT)
    assert answers[0, 0].tokens == directly(requests[0], 0)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_core_that_was_reset_in_the_midst_of_steps_begins_anew(mode: str) -> None:
    core = make_core(mode=mode)
    for request in variety()[:5]:
        core.submit(request)
    for _ in range(4):
        core.step_plain() if mode == "plain" else core.step_overlapped()
    core.reset()
    answers = finish(core, variety(), mode)
    for request in variety():
        assert answers[request.request_id, 0].tokens == directly(request, 0)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_beyond_the_vocabulary_harms_nobody_else(mode: str) -> None:
    """Validation refuses it; past that, masking it until min_tokens is an index out of range for the whole step."""
    params = SamplingParams(max_tokens=9, min_tokens=3, seed=1, stop_token_ids=(VOCAB + 300,))
    answers = run([*variety(), Submit(request_id=99, prompt_token_ids=[4], sampling=params)], mode=mode)
    finish = answers[99, 0].finish
    assert finish is not None
    assert (finish.reason, answers[99, 0].tokens) == ("failed", [])
    assert "index" in finish.message
    for request in variety():
        for sample in range(request.sampling.n):
            answer = answers[request.request_id, sample]
            assert (answer.tokens, answer.logprobs) == directly(request, sample), request


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_run_again_counts_its_tokens_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports fail now and then, when the tokens of the step are chosen already; penalties see those once."""
    calls = 0

    def report(*values: Any) -> TokenLogprobs:
        nonlocal calls
        calls += 1
        if calls in (5, 19, 33):
            raise RuntimeError("broken")
        return TokenLogprobs(*values)

    monkeypatch.setattr(sampling, "TokenLogprobs", report)
    answers = run(variety(), mode=mode)
    assert calls > 33
    for request in variety():
        for sample in range(request.sampling.n):
            answer = answers[request.request_id, sample]
            assert (answer.tokens, answer.logprobs) == directly(request, sample), request


def test_only_rows_that_sample_reach_the_logits() -> None:
    model = TableModel()
    request = Submit(
        request_id=1,
        prompt_token_ids=list(range(30)),
        sampling=SamplingParams(max_tokens=4, temperature=0.0, seed=0, ignore_eos=True),
    )
    run([request], model)
    assert model.num_rows == 4


def test_an_admission_forgets_what_the_slot_held_before() -> None:
    sampler = Sampler(max_running=1)
    logits = row_of(1, 2)[None]
    heavy = SamplingParams(seed=1, logit_bias={7: 100.0}, temperature=0.0, logprobs=1)
    sampler.admit(0, 0, Admission(heavy, (1,), (), ()))
    sampled = sampler.sample(logits.clone(), [0], [1])
    assert sampled.token_ids == [7]
    assert sampled.logprobs is not None
    sampler.admit(0, 0, Admission(SamplingParams(seed=1, temperature=0.0), (1,), (), ()))
    plain = sampler.sample(logits.clone(), [0], [1])
    assert plain.token_ids == [int(logits.argmax())]
    assert plain.logprobs is None


def test_a_history_counts_like_a_dictionary() -> None:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, 500, (900,), generator=generator).tolist()
    history = TokenHistory(stream[:100], stream[100:200])
    for token_id in stream[200:]:
        history.append(token_id)
    counts = dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True))
    assert counts == {token_id: stream[100:].count(token_id) for token_id in stream}
