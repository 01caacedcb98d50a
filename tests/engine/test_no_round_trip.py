"""From one step's logits to the next step's tokens the host waits for nothing, whatever the requests ask for.

The device is a stand-in that refuses what would wait (tests/support/card.py); kernels are a GPU's, on fibers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import cuda_on_cpu
import numpy as np
import pytest
import torch
from card import CUDA, Card, CardBackend, OnCard, Waits
from grammar_twin import FREE, VOCABULARY
from graph_repeater import Repeated
from sampling_twin import EOS, TABLE, VOCAB, directly, request_of, variety
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.sampling import NOT_FINITE, Sampler
from cierzo.engine.worker.staging import Staging
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, TokenLogprobs, unpacked_entry

MAX_RUNNING = 8
GRAMMARS = [
    {"grammar": f"{FREE}start: /[a-f]{{12}}/", "temperature": 0.0, "logprobs": 2},
    {"grammar": f"{FREE}start: /(foo|bar)[0-9]+/", "temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.3},
    {"grammar": f'{FREE}start: "yes" | "no"', "temperature": 0.7, "n": 2, "banned": [[39]]},
]


class TableModel:
    """Logits are a function of the last token and its position, computed on the card."""

    def __init__(self) -> None:
        self._table = TABLE.clone().as_subclass(OnCard)

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        token_ids, positions = inputs.token_ids, inputs.positions
        if logit_rows is not None:
            token_ids, positions = token_ids[logit_rows], positions[logit_rows]
        return self._table[(token_ids * 31 + positions) % len(TABLE)]

    def head(self, inputs: StepRows, kv: KVPool) -> Callable[[Tensor], Tensor]:
        return partial(self.logits, inputs, kv)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    if not cuda_on_cpu.available():
        pytest.skip("no g++ on Linux")
    found = Card()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    before = dict(vars(bound))
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.cuda.launch.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})
    with running_on(CardBackend()), found:
        yield found
    vars(bound).clear()
    vars(bound).update(before)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("max_running", [3, MAX_RUNNING])
def test_tokens_reach_the_next_step_and_nobody_waits(card: Card, recorded: bool, max_running: int) -> None:
    limits = SchedulerConfig(budget_tokens=16, max_chunk_tokens=8, max_running=max_running, max_model_len=64)
    cache = CacheConfig(block_tokens=4, num_blocks=24, hash_key="00" * 16)
    model, nothing = TableModel(), cast(KVPool, None)
    graphs = DecodeGraphs(
        model, nothing, max_running=max_running, max_model_len=64, cached_tokens=96, device=CUDA, record=Repeated
    )
    runner = ModelRunner(
        model,
        nothing,
        max_running,
        CUDA,
        staged=DeviceRows(CUDA),
        graphs=graphs if recorded else None,
        overlap=True,
    )
    runner.record(16)
    core = EngineCore(fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=(EOS,)), runner)
    requests = [
        *variety(),
        Submit(request_id=99, prompt_token_ids=[3] * 50, sampling=SamplingParams(max_tokens=5, seed=1)),
    ]
    scored = [[token % VOCAB for token in range(3, 3 + size)] for size in (2, 9, 50)]
    for request_id, prompt in enumerate(scored, start=100):
        params = SamplingParams(max_tokens=3, seed=1, prompt_logprobs=request_id - 99)
        requests.append(Submit(request_id=request_id, prompt_token_ids=prompt, sampling=params))
    core.vocabulary(VOCABULARY)
    for number, params in enumerate(GRAMMARS, start=200):
        requests.append(request_of(number, [3, 1], params))
    for request in requests:
        core.submit(request)
    tokens: dict[tuple[int, int], list[int]] = {}
    logprobs: dict[tuple[int, int], list[object]] = {}
    scores: dict[int, list[TokenLogprobs]] = {}
    while core.has_work():
        for delta in core.step_overlapped():
            key = (delta.request_id, delta.sample)
            tokens.setdefault(key, []).extend(delta.token_ids)
            logprobs.setdefault(key, []).extend(delta.logprobs or [])
            scores.setdefault(delta.request_id, []).extend(map(unpacked_entry, delta.prompt_logprobs or ()))
            assert delta.finish is None or delta.finish.reason in ("stop", "length"), delta.finish
    for request in requests:
        for sample in range(request.sampling.n):
            expected = directly(request, sample)
            assert tokens[request.request_id, sample] == expected[0], request
            found = logprobs[request.request_id, sample]
            assert [entry.top_token_ids for entry in found] == [entry.top_token_ids for entry in expected[1]]
            assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected[1]])
    for request_id, prompt in enumerate(scored, start=100):
        assert [entry.token_id for entry in scores[request_id]] == prompt[1:]
        for place, entry in enumerate(scores[request_id]):
            right = TABLE[(prompt[place] * 31 + place) % len(TABLE)].log_softmax(-1)
            assert entry.logprob == pytest.approx(right[entry.token_id].item(), abs=1e-5)
            assert entry.top_token_ids == right.topk(request_id - 99).indices.tolist()


def test_a_row_that_is_not_finite_is_told_when_it_is_collected(card: Card) -> None:
    """On a device nobody knows it earlier; the rows beside it are as they were."""
    wild = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "logprobs": 2, "repetition_penalty": 1.2}
    sampler = Sampler(4, CUDA, Staging(CUDA))
    for slot in range(4):
        sampler.admit(slot, 0, Admission(SamplingParams(seed=slot, **wild), (1, 2), (), ()))
    logits = TABLE[:4].clone()
    expected = sampler.launch(logits.clone().as_subclass(OnCard), [0, 1, 2, 3], [3] * 4)()
    logits[1, 7], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    sampler.admit(0, 0, Admission(SamplingParams(seed=0, **wild), (1, 2), (), ()))
    found = sampler.launch(logits.as_subclass(OnCard), [0, 1, 2, 3], [3] * 4)()
    assert found.failures == dict.fromkeys((1, 2, 3), NOT_FINITE)
    assert found.token_ids[0] == expected.token_ids[0]
    assert found.logprobs[0] == expected.logprobs[0]
    assert found.logprobs[1:] == [None] * 3
    assert all(0 <= token_id < VOCAB for token_id in found.token_ids)  # the next step looks them up


@pytest.mark.parametrize(
    "wait",
    [
        lambda there: there[0].item(),
        lambda there: there.tolist(),
        lambda there: there.cpu(),
        lambda there: there.to("cpu"),
        lambda there: there.numpy(),
        lambda there: bool(there[0]),
        lambda there: int(there[0]),
        lambda there: there[there > 1],
        lambda there: there.nonzero(),
        lambda there: torch.tensor([1]).to(CUDA),
        lambda there: torch.tensor([1]).to(CUDA, non_blocking=True),
        lambda there: there[torch.tensor([1])],
        lambda there: there + torch.tensor([1, 2, 3]),
        lambda there: torch.empty(3, dtype=torch.int64).copy_(there, non_blocking=True),
        lambda there: there.copy_(torch.tensor([1, 2, 3])),
    ],
)
def test_the_stand_in_sees_whoever_waits(card: Card, wait: object) -> None:
    there = torch.zeros(3, dtype=torch.int64, device=CUDA)
    assert there.device == CUDA
    with pytest.raises((Waits, TypeError)):
        wait(there)


def test_the_stand_in_keeps_what_has_not_arrived_yet(card: Card) -> None:
    there = torch.full((2,), 4, dtype=torch.int64, device=CUDA)
    arrived = torch.empty(2, dtype=torch.int64, pin_memory=True)
    arrived.copy_(there, non_blocking=True)
    assert arrived.tolist() == [-1, -1]
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert arrived.tolist() == [4, 4]
    there.copy_(arrived, non_blocking=True)
    arrived[0] = 5
    event.record()
    with pytest.raises(Waits, match="while a copy from it could still run"):
        event.synchronize()


def test_memory_is_not_written_to_before_it_was_copied(card: Card) -> None:
    """Chunks of a long prompt have no results that anybody waits for, so the host could run ahead of the device."""
    staging = Staging(CUDA)
    for step in range(9):
        (there,) = staging.to_device([np.array([6, step])])
        assert there.device == CUDA
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
