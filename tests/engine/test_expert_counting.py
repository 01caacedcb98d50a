"""Experts counted in real steps, against every choice of the router written down one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from native_only import needs_native
from torch import Tensor

from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.engine.messages import SamplingParams, Submit
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.experts import PHASES, ExpertCounter
from cierzo.engine.worker.runner import ModelRunner, load_runner
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.registry import bind, bound

BLOCKS = dict.fromkeys(("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block"), "composed")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {like: make_checkpoint(folder / like, like=like, scale="tiny") for like in ("small4", "small3")}


@pytest.fixture(autouse=True)
def _bound() -> Iterator[None]:
    yield
    bind(KernelsConfig(), "cpu")


def make_config(checkpoint: Path, **settings: object) -> EngineConfig:
    """Prompts are cut into chunks, and few blocks make it preempt."""
    options = {"budget_tokens": 24, "max_chunk_tokens": 9, "max_running": 5, "block_tokens": 4, "max_model_len": 76}
    options |= {"expert_statistics": True, "prefix_caching": False, "threads": 1}
    config = resolve(EngineOptions(model=str(checkpoint), **{**options, **settings}))
    return msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, num_blocks=20))


@dataclass
class Ledger:
    """Every choice of `bound.route`, called once per MoE layer and step, in order: one row per layer."""

    layers: int
    calls: list[list[list[int]]] = field(default_factory=list)
    prefills: list[bool] = field(default_factory=list)

    def listen(self, runner: ModelRunner) -> None:
        route, launch = bound.route, runner.launch

        def spied(*arguments: object) -> tuple[Tensor, Tensor]:
            ids, weights = route(*arguments)
            self.calls.append(ids.tolist())
            return ids, weights

        def launched(plan: object, batch: object) -> None:
            self.prefills.append(batch.num_expanded > 0)
            launch(plan, batch)

        vars(bound)["route"] = spied
        runner.launch = launched

    def buckets(self, prefill: bool) -> dict[int, tuple[int, int, list[int]]]:
        """most_tokens -> steps, tokens, distinct by layer."""
        found: dict[int, tuple[int, int, list[int]]] = {}
        for step in (step for step, is_prefill in enumerate(self.prefills) if is_prefill == prefill):
            choices = self.calls[step * self.layers : (step + 1) * self.layers]
            tokens = len(choices[0])
            most = next(1 << power for power in range(20) if tokens <= 1 << power)
            steps, total, distinct = found.get(most, (0, 0, [0] * self.layers))
            for layer, rows in enumerate(choices):
                distinct[layer] += len({e for row in rows for e in row})
            found[most] = (steps + 1, total + tokens, distinct)
        return found

    def expert_tokens(self, experts: int) -> list[list[int]]:
        counts = [Counter[int]() for _ in range(self.layers)]
        for call, rows in enumerate(self.calls):
            counts[call % self.layers].update(e for row in rows for e in row)
        return [[count[e] for e in range(experts)] for count in counts]


Tokens = dict[int, list[object]]


def serve(config: EngineConfig, ledger: Ledger | None = None) -> tuple[Tokens, EngineCore]:
    """A load of prompts that come and grow -> tokens and log-probabilities, and the core."""
    runner = load_runner(config)
    if ledger is not None:
        ledger.listen(runner)
    core = EngineCore(config, runner)
    found: Tokens = {}
    for number in range(9):
        params = SamplingParams(
            max_tokens=3 + 3 * number, seed=number, temperature=0.9, logprobs=1, ignore_eos=True
        )
        core.submit(Submit(request_id=number, prompt_token_ids=[*range(4, 9 + 5 * number)], sampling=params))
        for delta in core.step():
            found.setdefault(delta.request_id, []).append((delta.token_ids, msgspec.to_builtins(delta.logprobs)))
    while core.has_work():
        for delta in core.step():
            found.setdefault(delta.request_id, []).append((delta.token_ids, msgspec.to_builtins(delta.logprobs)))
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
    return found, core


def assert_is(statistics: ExpertStatistics | None, ledger: Ledger) -> None:
    assert statistics is not None
    assert len(ledger.calls) == ledger.layers * len(ledger.prefills)
    assert statistics.expert_tokens == ledger.expert_tokens(statistics.num_experts)
    for phase, buckets in (("decode", statistics.decode), ("prefill", statistics.prefill)):
        counted = {bucket.most_tokens: (bucket.steps, bucket.tokens, bucket.distinct) for bucket in buckets}
        assert counted == ledger.buckets(phase == "prefill")
        assert [*counted] == sorted(counted)
    assert {sum(counts) for counts in statistics.expert_tokens} == {statistics.tokens * statistics.top_k}


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("instruction_set", [pytest.param("auto", marks=needs_native), "reference"])
def test_counts_are_those_of_every_choice_written_down(
    checkpoints: dict[str, Path], instruction_set: str, overlap: str
) -> None:
    """The fused decoder's choices against those of its operations one by one, which are the same bits."""
    config = make_config(checkpoints["small4"], instruction_set=instruction_set, overlap=overlap)
    ledger = Ledger(config.model.num_layers)
    apart = msgspec.structs.replace(config.kernels, implementations=BLOCKS)
    expected, core = serve(msgspec.structs.replace(config, kernels=apart), ledger)
    assert core.stats().preemptions > 0
    assert_is(core.stats().experts, ledger)
    assert {True, False} == {*ledger.prefills}
    assert len(ledger.buckets(True)) > 2
    tokens, fused = serve(config)
    assert tokens == expected
    assert fused.stats().experts == core.stats().experts


def test_counting_changes_no_bit(checkpoints: dict[str, Path]) -> None:
    counted, core = serve(make_config(checkpoints["small4"]))
    plain, without = serve(make_config(checkpoints["small4"], expert_statistics=False))
    assert counted == plain
    assert without.stats().experts is None
    assert core.stats().experts is not None


def test_counts_outlive_a_reset(checkpoints: dict[str, Path]) -> None:
    _, core = serve(make_config(checkpoints["small4"]))
    before = core.stats().experts
    core.reset()
    assert core.stats().experts == before
    assert before is not None
    assert before.steps() > 0


def test_the_counter_adds_up_what_loops_do() -> None:
    random = np.random.default_rng(5)
    counter = ExpertCounter([3, 4, 7], 11, 2)
    assert counter.statistics().decode == counter.statistics().prefill == []
    per_layer = [Counter[int]() for _ in range(3)]
    distinct = steps = 0
    for tokens in (1, 1, 2, 3, 4, 5, 130):
        ids = np.argsort(random.random((3, tokens, 11)), axis=-1)[..., :2].astype(np.int64)
        counter.add(ids, PHASES[tokens % 2])
        steps += 1
        for layer in range(3):
            per_layer[layer].update(ids[layer].ravel().tolist())
            distinct += len({*ids[layer].ravel().tolist()})
    statistics = counter.statistics()
    assert statistics.layers == [3, 4, 7]
    assert statistics.expert_tokens == [[count[e] for e in range(11)] for count in per_layer]
    assert [(b.most_tokens, b.steps, b.tokens) for b in statistics.prefill] == [(1, 2, 2), (4, 1, 3), (8, 1, 5)]
    assert [(b.most_tokens, b.steps, b.tokens) for b in statistics.decode] == [(2, 1, 2), (4, 1, 4), (256, 1, 130)]
    assert sum(statistics.distinct_per_step(layer) for layer in range(3)) == pytest.approx(distinct / steps)


@pytest.mark.parametrize(
    ("like", "settings", "named"),
    [
        ("small3", {}, "small3 (mistral)"),
        ("small4", {"runner": "fake"}, "the fake runner"),
        ("small4", {"device": "simulated:h200"}, "a simulated card"),
    ],
)
def test_nothing_to_count_is_refused_by_name(
    checkpoints: dict[str, Path], like: str, settings: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(checkpoints[like], **settings)
    assert str(caught.value) == f"expert_statistics must be False ({named} has no experts), got True"
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("expert_statistics", "False", "True")
