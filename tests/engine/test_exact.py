"""Promise 1, with real arithmetic: whatever happens to a request, its tokens and log-probabilities stay the same.

Random loads go through the engine on the native kernels: other requests beside it, prompts cut into chunks, few
blocks (so that requests are preempted and computed again), prefixes shared through the cache, answers resumed after
some of their tokens, one or two threads; in some worlds every chunk has a size drawn by chance. Each answer is
compared with that of the same request alone, in one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_only import needs_native
from random_cuts import random_cuts

from cierzo.bench.grammars import made_up_vocabulary
from cierzo.cache.layout import GIB
from cierzo.cache.pool import GqaPages
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import SamplingParams, Submit, ThinkingBudget, Vocabulary
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner, load_runner
from cierzo.scheduler.plan import unpacked_entry

pytestmark = needs_native  # the reference is not exact, and its start-up table says so

FAMILIES, PREFIX_TOKENS = 2, 320  # prompts begin with one of two texts, long enough for several splits of attention
MAX_LEN = 400
ALLOWED = tuple(range(9))  # few, so that words and thoughts come up
BANNED = [[5], *([first, second] for first in ALLOWED for second in (0, 1) if first > 5), [0, 1, 2], [1, 0, 2]]
GRAMMAR = '%llguidance {"no_forcing": true}\nstart: /([A-Za-z ]|[0-9]{3}){200,}/'
CASES: dict[str, dict[str, Any]] = {
    "small4-bf16": {},
    "small4-float32": {"dtype": "float32"},
    "small4-int8": {"weights": "int8", "kv_dtype": "int8"},
    "small4-int4": {"weights": "int4"},
    "small3-bf16": {},
    "small3-int8": {"weights": "int8", "kv_dtype": "int8"},
}


@dataclass(frozen=True)
class Ask:
    """A request: a family's text up to `shared` tokens, then `own` tokens of its own."""

    family: int
    shared: int
    own: int
    max_tokens: int
    temperature: float
    seed: int
    masked: bool
    scored: bool
    held: bool  # to a grammar

    def prompt(self, vocab_size: int) -> list[int]:
        random = torch.Generator().manual_seed(self.family)
        text = torch.randint(vocab_size, (PREFIX_TOKENS,), generator=random)[: self.shared]
        own = torch.randint(vocab_size, (self.own,), generator=random.manual_seed(1000 + self.seed))
        return [*text.tolist(), *own.tolist()]

    def submit(self, request_id: int, vocab_size: int, output: tuple[int, ...] = (), num_scored: int = 0) -> Submit:
        masks: dict[str, Any] = {}
        if self.masked:
            masks = {"banned_token_ids": BANNED, "thinking": ThinkingBudget(2, 3, 4, is_open=self.seed == 1)}
        sampling = SamplingParams(
            allowed_token_ids=ALLOWED if self.masked else (),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=0.9,
            seed=self.seed,
            logprobs=2,
            prompt_logprobs=self.seed if self.scored else None,
            ignore_eos=True,
        )
        return Submit(
            request_id=request_id,
            prompt_token_ids=self.prompt(vocab_size),
            output_token_ids=list(output),
            sampling=sampling,
            num_scored=num_scored,
            grammar=GRAMMAR if self.held and not self.masked else "",
            **masks,
        )


@dataclass(frozen=True)
class World:
    """How the engine is set up, and how many steps pass before each request arrives."""

    block_tokens: int
    spare_blocks: int
    budget_tokens: int
    chunk_tokens: int
    prefix_caching: bool
    threads: int
    arrivals: tuple[int, ...]
    resumed: tuple[bool, ...]
    cuts: int | None  # seed of random chunks


asks = st.builds(
    Ask,
    family=st.integers(0, FAMILIES - 1),
    shared=st.one_of(st.integers(0, 40), st.integers(120, PREFIX_TOKENS)),
    own=st.integers(1, 30),
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 3),
    masked=st.booleans(),
    scored=st.booleans(),
    held=st.booleans(),
)
worlds = st.builds(
    World,
    block_tokens=st.sampled_from([4, 16, 32]),
    spare_blocks=st.integers(0, 40),
    budget_tokens=st.sampled_from([16, 48, 200, 512]),
    chunk_tokens=st.sampled_from([8, 33, 512]),
    prefix_caching=st.booleans(),
    threads=st.sampled_from([1, 2]),
    arrivals=st.tuples(*[st.integers(0, 5)] * 5),
    resumed=st.tuples(*[st.booleans()] * 5),
    cuts=st.one_of(st.none(), st.integers(0, 1 << 30)),
)

Answer = list[tuple[int, float, tuple[int, ...], tuple[float, ...]]]


@dataclass
class Engine:
    """One model, loaded once; a core on it per world, its pages full of NaN."""

    folder: Path
    options: dict[str, Any]
    alone: dict[Ask, tuple[Answer, Answer]] = field(default_factory=dict)

    def config(self, world: World | None = None) -> EngineConfig:
        block_tokens = 32 if world is None else world.block_tokens
        layout = read_model_config(self.folder).cache_layout(block_tokens, self.options.get("kv_dtype", "bfloat16"))
        num_blocks = -(-MAX_LEN // block_tokens) + (2 if world is None else world.spare_blocks)
        settings = (
            {}
            if world is None
            else {
                "budget_tokens": world.budget_tokens,
                "max_chunk_tokens": world.chunk_tokens,
                "max_running": min(4, world.budget_tokens),
                "prefix_caching": world.prefix_caching,
            }
        )
        width = 2 if self.options.get("dtype") == "float32" else 1
        return resolve(
            EngineOptions(
                model=str(self.folder),
                block_tokens=block_tokens,
                max_model_len=MAX_LEN,
                threads=1 if world is None else world.threads,
                kv_cache_gib=(num_blocks + 0.5) * layout.bytes_per_block * width / GIB,
                **self.options,
                **settings,
            )
        )

    def core(self, world: World | None = None) -> EngineCore:
        config = self.config(world)
        runner = load_runner(config)
        poison(runner)
        core = EngineCore(config, runner)
        core.vocabulary(vocabulary(config.model.vocab_size))
        return core

    def answer_alone(self, ask: Ask) -> tuple[Answer, Answer]:
        """The answer, and the entries of the prompt."""
        if ask not in self.alone:
            core = self.core()
            core.submit(ask.submit(1, core_vocab(self.folder)))
            answers = drain(core)
            self.alone[ask] = answers[1], answers.get(of_prompt(1), [])
        return self.alone[ask]


def poison(runner: ModelRunner) -> None:
    for layer in runner._kv.layers:
        for pages in (layer.keys, layer.values) if isinstance(layer, GqaPages) else (layer.latents,):
            pages.fill_(255 if pages.dtype == torch.uint8 else float("nan"))


@cache
def vocabulary(vocab_size: int) -> Vocabulary:
    return made_up_vocabulary(vocab_size, (2,))


@cache
def core_vocab(folder: Path) -> int:
    return read_model_config(folder).vocab_size


def of_prompt(request_id: int) -> int:
    """The key of a prompt's entries, among answers."""
    return -1 - request_id


def drain(core: EngineCore, arrivals: dict[int, list[Submit]] | None = None) -> dict[int, Answer]:
    """Step until nothing is left; requests arrive before the step of their number."""
    answers: dict[int, Answer] = {}
    step = 0
    waiting = dict(arrivals or {})
    while core.has_work() or waiting:
        for submit in waiting.pop(step, []):
            core.submit(submit)
        for delta in core.step_plain():
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
            scored = [unpacked_entry(raw) for raw in delta.prompt_logprobs or ()]
            for key, entries in ((delta.request_id, delta.logprobs), (of_prompt(delta.request_id), scored)):
                answers.setdefault(key, []).extend(
                    (entry.token_id, entry.logprob, tuple(entry.top_token_ids), tuple(entry.top_logprobs))
                    for entry in entries or ()
                )
        core.check()
        step += 1
    return answers


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    like = request.param.partition("-")[0]
    folder = make_checkpoint(tmp_path_factory.mktemp("exact") / like, like=like, scale="tiny")
    return Engine(folder, CASES[request.param])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(asks, min_size=2, max_size=5), world=worlds)
def test_a_request_is_the_same_whatever_happens_around_it(
    engine: Engine, requests: list[Ask], world: World
) -> None:
    vocab_size = core_vocab(engine.folder)
    expected, scored = zip(*(engine.answer_alone(ask) for ask in requests), strict=True)
    arrivals: dict[int, list[Submit]] = {}
    skipped = []
    for index, ask in enumerate(requests):
        known = len(expected[index]) // 2 if world.resumed[index] else 0
        output = tuple(entry[0] for entry in expected[index][:known])
        num_scored = len(scored[index]) // 2 if world.resumed[index] else 0
        again = ask.submit(index, vocab_size, output, num_scored)
        arrivals.setdefault(world.arrivals[index], []).append(again)
        skipped.append((known, num_scored))
    with random_cuts(world.cuts):
        answers = drain(engine.core(world), arrivals)
    for index in range(len(requests)):
        known, num_scored = skipped[index]
        assert answers[index] == expected[index][known:], (index, requests[index])
        assert answers[of_prompt(index)] == scored[index][num_scored:], (index, requests[index])
        assert len(scored[index]) == (len(requests[index].prompt(vocab_size)) - 1 if requests[index].scored else 0)
