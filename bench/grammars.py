"""`cierzo bench step --grammars CHECKPOINT`: what grammars cost a decode step.

The same sequences decode in turns without a grammar, with one each, and with one in every other sequence. Rounds of
the three stand side by side, so that they share the machine's mood; figures are medians of their ratios. Sequences
without a grammar must get the same tokens whoever stands beside them.

The vocabulary is made up, of as many tokens as the model has, for a checkpoint of random weights has none.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Sequence

import msgspec

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.stats import median
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Abort, Submit, Vocabulary
from cierzo.engine.server_process import prepare_memory
from cierzo.engine.worker.core import EngineCore
from cierzo.scheduler.params import SamplingParams

PROMPT_TOKENS = 128
ROUNDS, STEPS, WARM_UP = 7, 24, 8
MOST_TOKENS = 256  # of an answer: some come while others' prompts are computed
KINDS = {"none": 0, "all": 1, "every other": 2}  # every how manyth sequence has a grammar
SCHEMA = (
    '{"type":"object","properties":{"name":{"type":"string","maxLength":24},"age":{"type":"integer"},'
    '"tags":{"type":"array","items":{"type":"string","maxLength":8},"maxItems":3},"active":{"type":"boolean"}},'
    '"required":["name","age","tags","active"],"additionalProperties":false}'
)
GRAMMAR = f'%llguidance {{"no_forcing": true}}\nstart: item{{200}}\nitem: %json {SCHEMA}\n'


class GrammarRow(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of step: its median, and the median over rounds of its time by that of one without grammars."""

    sequences: int
    with_grammar: int
    step_ms: float
    ratio: float


class GrammarCost(msgspec.Struct, frozen=True, kw_only=True):
    """Rows, and whether sequences without a grammar had the same tokens in all of them."""

    rows: list[GrammarRow]
    same_tokens: bool


def measure(checkpoint: str, running: int, temperature: float, *, rounds: int = 0, **options: str) -> GrammarCost:
    """Decode steps of `running` sequences."""
    longest = PROMPT_TOKENS + MOST_TOKENS
    config = resolve(
        EngineOptions(
            model=checkpoint,
            max_running=running,
            max_model_len=longest,
            budget_tokens=max(2048, running),
            max_step_ms=0,
            **options,  # type: ignore[arg-type]
        )
    )
    bench = _Bench(config, running, temperature)
    for every in KINDS.values():
        bench.round(every)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds or ROUNDS):
        order = [*KINDS][number % len(KINDS) :] + [*KINDS][: number % len(KINDS)]
        for kind in order:
            times[kind].append(bench.round(KINDS[kind]))
    rows = [
        GrammarRow(
            sequences=running,
            with_grammar=0 if not every else -(-running // every),
            step_ms=median(times[kind]),
            ratio=median([ours / theirs for ours, theirs in zip(times[kind], times["none"], strict=True)]),
        )
        for kind, every in KINDS.items()
    ]
    return GrammarCost(rows=rows, same_tokens=bench.same_tokens)


class _Bench:
    def __init__(self, config: EngineConfig, running: int, temperature: float) -> None:
        self._core = EngineCore(config)
        self._core.vocabulary(made_up_vocabulary(config.model.vocab_size, config.model.eos_token_ids))
        prepare_memory()
        self._running, self._temperature, self._vocab_size = running, temperature, config.model.vocab_size
        self._plain: dict[int, list[int]] = {}  # by sequence: its tokens without a grammar
        self._num_requests = 0
        self.same_tokens = True

    def round(self, every: int) -> float:
        """Median milliseconds of a step, of which every so manyth sequence has a grammar."""
        first, draw = self._num_requests, random.Random(0)
        for number in range(self._running):
            self._core.submit(
                Submit(
                    request_id=first + number,
                    prompt_token_ids=[draw.randrange(self._vocab_size) for _ in range(PROMPT_TOKENS)],
                    sampling=SamplingParams(
                        max_tokens=MOST_TOKENS, seed=number, temperature=self._temperature, ignore_eos=True
                    ),
                    grammar=GRAMMAR if every and number % every == 0 else "",
                )
            )
        self._num_requests += self._running
        tokens: dict[int, list[int]] = {number: [] for number in range(self._running)}
        while not all(tokens.values()):
            self._step(tokens, first)
        for _ in range(WARM_UP):
            self._step(tokens, first)
        took = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self._step(tokens, first)
            took.append((time.perf_counter() - start) * 1e3)
        for number in range(self._running):
            self._core.abort(Abort(request_id=first + number))
        while self._core.has_work():  # a step may be in flight
            self._core.step()
        self._core.take_deltas()
        self._compare({number: own for number, own in tokens.items() if not every or number % every})
        return median(took)

    def _step(self, tokens: dict[int, list[int]], first: int) -> None:
        for delta in self._core.step():
            tokens[delta.request_id - first] += delta.token_ids
            assert delta.finish is None, delta.finish

    def _compare(self, tokens: dict[int, list[int]]) -> None:
        for number, own in tokens.items():
            known = self._plain.setdefault(number, own)
            shared = min(len(own), len(known))
            self.same_tokens &= own[:shared] == known[:shared]


def made_up_vocabulary(vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """So many tokens: single bytes, then words, with and without a space before them, and signs of JSON."""
    draw, controls = random.Random(1), sorted({0, 1, *eos_token_ids})
    tokens = [bytes([byte]) for byte in range(256)]
    signs = ['{"', '":', '": ', '", "', '"}', "},", "[]", "true", "false", "null", '["', '"]', " {", ", "]
    known = {*tokens, *(sign.encode() for sign in signs)}
    tokens += [sign.encode() for sign in signs]
    while len(tokens) < vocab_size:
        word = "".join(draw.choices(string.ascii_letters, k=draw.randint(2, 9)))
        token = (" " * draw.randint(0, 1) + word).encode()
        if token not in known:
            known.add(token)
            tokens.append(token)
    tokens = [*(b"" for _ in controls), *tokens][:vocab_size]
    return Vocabulary(tokens=tokens, control_ids=controls, eos_token_ids=[*eos_token_ids])


def table(cost: GrammarCost) -> str:
    """Show the rows as text."""
    told = [
        {
            "sequences": str(row.sequences),
            "with a grammar": str(row.with_grammar),
            "step ms": f"{row.step_ms:.2f}",
            "to none": f"{(row.ratio - 1) * 100:+.1f} %",
        }
        for row in cost.rows
    ]
    same = "the same tokens" if cost.same_tokens else "OTHER TOKENS"
    return f"{text(grid_of('', told))}\nsequences without a grammar had {same} in all of them"
