"""Grammars through the engine, against direct sampling with llguidance asked anew for each token, whatever happens to
a request: overlapped and recorded steps, random chunks, preemptions, resumed answers, masks that come late."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from grammar_twin import EOS, FREE, VOCAB, VOCABULARY, has_ended, may_end, spelled
from graph_repeater import Repeated
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cuts import random_cuts
from sampling_twin import TABLE, directly, request_of
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Abort, Submit
from cierzo.engine.worker import choosing, grammars
from cierzo.engine.worker.core import EngineCore, Runner
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import IMPLEMENTATIONS, bound
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.plan import Finish

MODES = ("plain", "overlapped", "staged", "recorded")
BLOCK_TOKENS, MAX_RUNNING, MAX_LEN = 4, 5, 48
STEPS = 20_000
LETTERS = "[a-z]"
GRAMMARS = [
    "",
    r"start: /a{1,3}b+/",
    r"start: /(foo|bar)[0-9]{3,5}/",
    'start: "yes" | "no"',
    r'start: "\"" /[a-z]*/ "\""',
    'start: item (" " item)*\nitem: /[ab]+/',
    'start: <[38]> /[a-f]{0,4}/ <[38]> /[0-9]+/',
]


@pytest.fixture(autouse=True)
def _bind() -> None:
    rows = [row for row in IMPLEMENTATIONS if row.target.startswith("cierzo.kernels.ref.sampling")]
    vars(bound).update({row.operation: row.load() for row in rows})


class TableModel:
    """Logits are a function of the last token and its position."""

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        chosen = slice(None) if logit_rows is None else logit_rows
        return TABLE[(inputs.token_ids[chosen] * 31 + inputs.positions[chosen]) % len(TABLE)]


def make_core(mode: str, num_blocks: int = 60, runner: Runner | None = None) -> EngineCore:
    limits = SchedulerConfig(budget_tokens=12, max_chunk_tokens=5, max_running=MAX_RUNNING, max_model_len=MAX_LEN)
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, hash_key="00" * 16)
    config = fake_config(limits, cache, vocab_size=VOCAB, eos_token_ids=(EOS,))
    device, model, pool = torch.device("cpu"), TableModel(), cast(KVPool, None)
    graphs = None
    if mode == "recorded":
        graphs = DecodeGraphs(
            model,
            pool,
            max_running=MAX_RUNNING,
            max_model_len=MAX_LEN,
            cached_tokens=num_blocks * BLOCK_TOKENS,
            device=device,
            record=Repeated,
        )
    staged = DeviceRows(device) if mode in ("staged", "recorded") else None
    made = ModelRunner(model, pool, MAX_RUNNING, staged=staged, graphs=graphs, overlap=mode != "plain")
    made.record(-(-MAX_LEN // BLOCK_TOKENS))
    core = EngineCore(config, runner or made)
    core.vocabulary(VOCABULARY)
    return core


Answers = dict[tuple[int, int], tuple[list[int], Finish]]


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
                ended[key] = (answers[key], delta.finish)
        core.check()
        if not waiting and not core.has_work():
            break
    assert len(ended) == sum(request.sampling.n for request in requests)
    return ended


def expected(request: Submit, sample: int) -> tuple[list[int], str, bool, int | None]:
    """Tokens, reason, whether the grammar had not ended, and the token that ended it, of direct sampling."""
    found = directly(request, sample)[0]
    whole, params, grammar = [*request.output_token_ids, *found], request.sampling, request.grammar
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    incomplete = bool(grammar) and not may_end(grammar, whole)
    if whole and whole[-1] in stops and len(whole) >= params.min_tokens:
        return found, "stop", incomplete, whole[-1]
    if grammar and has_ended(grammar, whole):
        return found, "stop", False, None
    return found, "length" if len(whole) == params.max_tokens else "failed", incomplete, None


def told(answer: tuple[list[int], Finish]) -> tuple[list[int], str, bool, int | None]:
    tokens, finish = answer
    return tokens, finish.reason, finish.incomplete, finish.stop_token_id


@st.composite
def asks(draw: st.DrawFn) -> dict[str, Any]:
    grammar = draw(st.sampled_from(GRAMMARS))
    return {
        "prompt": draw(st.lists(st.integers(0, 25), min_size=1, max_size=9)),
        "max_tokens": draw(st.integers(1, 24)),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
        "logit_bias": draw(st.sampled_from([{}, {EOS: 3.0, 0: 2.0}])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "stop_token_ids": draw(st.sampled_from([(), (6,)])),
        "min_tokens": draw(st.sampled_from([0, 5])),
        "ignore_eos": draw(st.booleans()),
        "logprobs": draw(st.sampled_from([None, 2])),
        "n": draw(st.sampled_from([1, 2])),
        "banned": draw(st.sampled_from([[], [[0, 0]], [[1], [26, 27]]])),
        "grammar": FREE + grammar if grammar else "",
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


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(asks(), min_size=1, max_size=6),
    num_blocks=st.sampled_from([13, 60]),
    seed=st.integers(0, 1 << 30),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
    patience_s=st.sampled_from([grammars.MASK_WAIT_S, 0.0]),
)
def test_answers_are_those_of_direct_sampling_whatever_happens_around_them(
    mode: str, asked: list[dict[str, Any]], num_blocks: int, seed: int, cuts: int | None, patience_s: float
) -> None:
    requests = submits(asked)
    with random_cuts(cuts), patch.object(grammars, "MASK_WAIT_S", patience_s):
        answers = run(make_core(mode, num_blocks), requests, mode, seed)
    for request in requests:
        for sample in range(request.sampling.n):
            assert told(answers[request.request_id, sample]) == expected(request, sample), request
