"""Simulated cards: what a batch is counted as, and what a card's memory holds."""

from __future__ import annotations

from typing import Any

import pytest
from grammar_twin import FREE, VOCABULARY, spelled
from image_prompts import submit

from cierzo.bench.virtual import VirtualClock
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.cost.work import StepShape
from cierzo.engine.device_memory import StepLimits, workspace_bytes
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import SamplingParams, Submit
from cierzo.engine.worker.batch import BatchBuilder
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.simulated import SimulatedRunner, shape_of
from cierzo.engine.worker.step_cost import predicted_cost
from cierzo.scheduler.plan import SeqPlan, StepPlan


def configure(model: str = "small4", card: str = "h200", **options: Any) -> EngineConfig:
    return resolve(EngineOptions(model=model, device=f"simulated:{card}", **{"profile": "throughput", **options}))


def test_a_batch_is_counted_row_by_row() -> None:
    """Prompt rows at 3..7 of one sequence and 0..1 of another, a generated row at 40."""
    builder = BatchBuilder(max_tokens=32, max_running=4, max_blocks=16, block_tokens=4)
    rows = [((1, 0), 3, 5, 9), ((2, 0), 0, 2, 2), ((3, 0), 40, 1, 30)]
    seqs = [
        SeqPlan(key, slot, slot, start, [0] * count, prompt, [*range(-(-(start + count) // 4))], True, None)
        for slot, (key, start, count, prompt) in enumerate(rows)
    ]
    found = shape_of(builder.build(StepPlan(1, seqs, 8)))
    pairs = [sum(range(start + 1, start + count + 1)) for _, start, count, _ in rows]
    assert found == StepShape(7.0, float(pairs[0] + pairs[1]), 8.0 + 2.0, 1.0, float(pairs[2]), 41.0, 3.0)


def test_the_cache_of_several_cards_is_what_weights_and_workspaces_leave() -> None:
    config = configure(card="4xh100", kv_dtype="bf16")
    left = 4 * 80e9 * 0.95 - weight_bytes(config.model, NumberFormats(weights="nvfp4"))
    limits = StepLimits(8192, 2048, 512, config.scheduler.max_model_len, config.scheduler.image_cache_tokens)
    left -= 4 * workspace_bytes(config.model, limits, int(left) // config.layout.bytes_per_token)
    assert config.cache.num_blocks * config.layout.bytes_per_block == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "small4", "card": "h100", "weights": "fp8"}, "workspaces"),
        ({"card": "h100", "weights": "bf16", "text_only": True}, "KV cache; weights in nvfp4 would leave some"),
        ({"model": "small4", "card": "b300"}, "b300"),
        ({"model": "small4", "max_model_len": 2_000_000}, "max_position_embeddings"),
        ({"model": "small3", "max_model_len": 131_072, "kv_cache_gib": 1.0}, "131072 tokens need"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(**options)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_tokens_that_are_made_up_keep_to_grammars(overlap: str) -> None:
    core = EngineCore(configure(overlap=overlap, max_model_len=1024))
    core.vocabulary(VOCABULARY)
    texts = ['start: "yes" | "no"', "start: /b{3}/", "start: /[x-y]{5,}/"]
    for number, text in enumerate(texts):
        sampling = SamplingParams(max_tokens=6, seed=1)
        core.submit(Submit(request_id=number, prompt_token_ids=[1, 2], sampling=sampling, grammar=FREE + text))
    tokens: dict[int, list[int]] = {number: [] for number in range(3)}
    ends = {}
    while core.has_work():
        for delta in core.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish is not None:
                ends[delta.request_id] = delta.finish.reason, delta.finish.incomplete
    assert [spelled(own) for own in tokens.values()] == ["no", "bbb", "xxxxxx"]
    assert ends == {0: ("stop", False), 1: ("stop", False), 2: ("length", False)}


def test_an_image_takes_a_simulated_card_the_tower_s_time_once() -> None:
    """A prompt with an image of 400 tokens, the same again, and the same words without an image."""
    config = configure(kv_cache_gib=1.0, overlap="off", max_running=4, max_model_len=1024)
    clock, cost = VirtualClock(0.0), predicted_cost(config)
    assert cost is not None
    core, times = EngineCore(config, SimulatedRunner(config, clock), clock), list[float]()
    for number, parts in enumerate(([1, (0, 20, 20)], [2, (0, 20, 20)], [3, *[5] * 420])):
        begin_s = clock()
        core.submit(submit(number, parts, max_tokens=1))
        while core.has_work():
            core.step_plain()
        times.append(clock() - begin_s)
    assert times[0] - times[2] == pytest.approx(cost.image_s(400), rel=1e-6)
    assert times[1] == pytest.approx(times[2], rel=1e-6)
