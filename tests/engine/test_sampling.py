"""Sampling through the engine, from fixed logits, against a direct and slow computation of the same tokens."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit, TokenLogprobs
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.sampling import NOT_FINITE, Sampler, TokenHistory
from cierzo.kernels.ref import sampling as ref
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, Finish

VOCAB = 40
EOS = 39
TABLE = torch.randn(211, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
BROKEN = 13  # a token after which one of the model's logits is what a test wants


@pytest.fixture(autouse=True)
def _bind() -> None:
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.ref.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})


def row_of(token_id: int, position: int) -> Tensor:
    return TABLE[(token_id * 31 + position) % len(TABLE)]


class TableModel:
    """Logits are a function of the last token and its position. Counts the rows that reach `logits`."""

    def __init__(self, breaks: float | None = None) -> None:
        self.breaks = breaks
        self.num_rows = 0

    def logits(self, inputs: ModelInputs, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        chosen = slice(None) if logit_rows is None else logit_rows
        token_ids, positions = inputs.token_ids[chosen], inputs.positions[chosen]
        self.num_rows += len(token_ids)
        rows = TABLE[(token_ids * 31 + positions) % len(TABLE)]
        if self.breaks is not None:
            rows[token_ids == BROKEN, 3] = self.breaks
        return rows


def run(requests: list[Submit], model: TableModel | None = None, **limits: int) -> dict[tuple[int, int], Answer]:
    scheduler = SchedulerConfig(
        **{"budget_tokens": 16, "max_chunk_tokens": 8, "max_running": 8, "max_model_len": 64, **limits}
    )
    cache = CacheConfig(block_tokens=4, num_blocks=24, hash_key="00" * 16)
    config = fake_config(scheduler, cache, vocab_size=VOCAB, eos_token_ids=(EOS,))
    core = EngineCore(config, ModelRunner(model or TableModel(), cast(KVPool, None), scheduler.max_running))
    for request in requests:
        core.submit(request)
    answers: dict[tuple[int, int], Answer] = {}
    while core.has_work():
        for delta in core.step_plain():
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


def edited(raw: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    """Bias, penalties, mask, in this order, one value at a time in fp32."""
    logits = raw.clone()
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += torch.tensor(bias)
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    repetition, presence, frequency = (torch.tensor(value) for value in penalties)
    if penalties != (1.0, 0.0, 0.0):
        for token_id in {*prompt, *output}:
            value = logits[token_id]
            value = value / repetition if value > 0 else value * repetition
            value = value - frequency * output.count(token_id)
            logits[token_id] = value - presence * (token_id in output)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    if len(output) + 1 < params.min_tokens:
        for token_id in stops:
            logits[token_id] = -math.inf
    return logits


def directly(request: Submit, sample: int) -> tuple[list[int], list[TokenLogprobs]]:
    """One request, token by token, without an engine."""
    params, prompt = request.sampling, request.prompt_token_ids
    output: list[int] = []
    logprobs: list[TokenLogprobs] = []
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while len(output) < params.max_tokens:
        position = len(prompt) + len(output)
        raw = row_of([*prompt, *output][-1], position - 1)
        logits = edited(raw, params, prompt, output)
        if params.temperature == 0:
            token = logits.tolist().index(float(logits.max()))
        else:
            whole = [torch.tensor([value]) for value in (params.top_k, params.seed, sample, position)]
            real = [
                torch.tensor([v], dtype=torch.float64) for v in (params.temperature, params.top_p, params.min_p)
            ]
            token = int(ref.draw(logits[None], real[0], whole[0], real[1], real[2], *whole[1:]))
        output.append(token)
        if params.logprobs is not None:
            scores = torch.log_softmax(raw, dim=0).tolist()
            top = sorted(range(VOCAB), key=lambda i, scores=scores: (-scores[i], i))[: params.logprobs]
            logprobs.append(TokenLogprobs(token, scores[token], top, [scores[i] for i in top]))
        if token in stops and len(output) >= params.min_tokens:
            break
    return output, logprobs


VARIETY = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "logprobs": 4},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.7, "logprobs": 2},
    {"temperature": 1.0, "min_p": 0.1, "n": 3},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 1},
    {"temperature": 0.0, "frequency_penalty": 0.9, "repetition_penalty": 0.8},
    {"temperature": 0.9, "logit_bias": {3: 4.0, 8: -50.0}},
    {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "min_tokens": 6},
    {"temperature": 1.0, "logit_bias": {EOS: 3.0, 5: 2.0}, "stop_token_ids": (5, 6), "min_tokens": 4, "n": 2},
    {"temperature": 0.0, "logit_bias": {EOS: 100.0}, "min_tokens": 6, "ignore_eos": True},
    {
        "temperature": 0.8,
        "frequency_penalty": 1.0,
        "presence_penalty": -0.5,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
    },
]


def variety() -> list[Submit]:
    return [
        Submit(
            request_id=number,
            prompt_token_ids=[1 + number % 3, 2, 7, 7][: 1 + number % 4],
            sampling=SamplingParams(**{"max_tokens": 12, "seed": 100 + number, **params}),
        )
        for number, params in enumerate(VARIETY)
    ]


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_running": 16, "budget_tokens": 40}, {"max_running": 1}, {"budget_tokens": 8, "max_chunk_tokens": 1}],
)
def test_tokens_and_logprobs_are_those_of_direct_sampling_whatever_the_batch(limits: dict[str, int]) -> None:
    answers = run(variety(), **limits)
    for request in variety():
        for sample in range(request.sampling.n):
            answer = answers[request.request_id, sample]
            expected = directly(request, sample)
            assert answer.tokens == expected[0], request
            assert answer.logprobs == expected[1], request  # bit for bit
    assert answers[2, 0].tokens != answers[3, 0].tokens


def test_penalties_survive_a_preemption() -> None:
    params = SamplingParams(
        max_tokens=40, temperature=0.0, frequency_penalty=0.8, repetition_penalty=1.2, ignore_eos=True
    )
    requests = [Submit(request_id=i, prompt_token_ids=[i, 3, 3], sampling=_seeded(params, i)) for i in range(4)]
    answers = run(requests)
    assert answers[-1, 0].tokens[0] > 0  # preemptions
    for request in requests:
        assert answers[request.request_id, 0].tokens == directly(request, 0)[0]


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, "seed": seed})


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_request_alone(logit: float) -> None:
    greedy = SamplingParams(max_tokens=5, temperature=0.0, seed=1)
    alone = run([Submit(request_id=0, prompt_token_ids=[BROKEN], sampling=greedy)], TableModel(logit))
    assert alone[0, 0].finish is not None
    assert alone[0, 0].finish.message == NOT_FINITE
    good = SamplingParams(max_tokens=5, temperature=0.7, seed=1, logprobs=1)
    bias = SamplingParams(max_tokens=5, temperature=0.7, seed=1, logit_bias={3: 1.0})
    requests = [
        Submit(request_id=0, prompt_token_ids=[4], sampling=good),
        Submit(request_id=1, prompt_token_ids=[BROKEN], sampling=good),
        Submit(request_id=2, prompt_token_ids=[BROKEN], sampling=bias),
    ]
    answers = run(requests, TableModel(logit))
    for request_id in (1, 2):
        finish = answers[request_id, 0].finish
        assert finish is not None
        assert (finish.reason, finish.message) == ("failed", NOT_FINITE)
    if BROKEN not in answers[0, 0].tokens[:-1]:
        assert answers[0, 0].tokens == directly(requests[0], 0)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_itself_no_token_fails_alone(temperature: float) -> None:
    """Every token stops, and none may before min_tokens; possible with a small vocabulary."""
    base = {"max_tokens": 5, "temperature": temperature, "seed": 1, "logprobs": 1}
    nothing = SamplingParams(**base, stop_token_ids=tuple(range(VOCAB)), min_tokens=3)
    requests = [
        Submit(request_id=0, prompt_token_ids=[4], sampling=SamplingParams(**base)),
        Submit(request_id=1, prompt_token_ids=[4], sampling=nothing),
    ]
    answers = run(requests)
    assert (answers[1, 0].finish.reason, answers[1, 0].finish.message) == ("failed", NOT_FINITE)
    assert answers[0, 0].tokens == directly(requests[0], 0)[0]


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
