"""The engine on a GPU's kernels, in Triton's interpreter and on fibers: a model staged, recorded, overlapped.

What it shows is that the parts fit: names, shapes, formats, pages, graphs; and that a request's tokens are the same
alone and in company, plain and overlapped. An MMA's bits are the device's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gpu_engine import CPU, MAX_RUNNING, MODELS, gpu_kernels, load, make_config
from graph_repeater import Repeated

from cierzo.cache.pool import KVPool
from cierzo.engine.config import EngineConfig
from cierzo.engine.messages import Submit
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.graphs import DecodeGraphs
from cierzo.engine.worker.runner import ModelRunner
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.formats.activations import static_scales, takes_fp8
from cierzo.kernels.triton import mla, prefix, split
from cierzo.kernels.triton.split import Splits
from cierzo.scheduler.params import SamplingParams

PROMPTS = ([5, 9, 2, 11, 7], [3] * 9, [8, 1])
NEW_TOKENS = (3, 2, 3)


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_kernels(monkeypatch):
        yield


def run(
    config: EngineConfig,
    model: Decoder,
    chosen: tuple[int, ...],
    *,
    whole: bool,
    experts: ExpertCounter | None = None,
    prompts: tuple[list[int], ...] = PROMPTS,
    new_tokens: tuple[int, ...] = NEW_TOKENS,
) -> dict[int, list[int]]:
    """Tokens of some of the requests. whole: graphs and overlap too."""
    pool = KVPool(config.layout, config.cache.num_blocks + 1, CPU)
    graphs = DecodeGraphs(
        model,
        pool,
        max_running=MAX_RUNNING,
        max_model_len=config.scheduler.max_model_len,
        cached_tokens=config.cache.num_blocks * config.cache.block_tokens,
        device=CPU,
        record=Repeated,
    )
    runner = ModelRunner(
        model,
        pool,
        MAX_RUNNING,
        CPU,
        staged=DeviceRows(CPU),
        graphs=graphs if whole else None,
        overlap=whole,
        experts=experts,
    )
    runner.record(-(-config.scheduler.max_model_len // config.cache.block_tokens))
    core = EngineCore(msgspec.structs.replace(config, overlap=whole), runner)
    for number in chosen:
        params = SamplingParams(max_tokens=new_tokens[number], seed=number, ignore_eos=True)
        core.submit(Submit(request_id=number, prompt_token_ids=prompts[number], sampling=params))
    found: dict[int, list[int]] = {number: [] for number in chosen}
    while core.has_work():
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
            assert delta.finish is None or delta.finish.reason == "length", delta.finish
    return found


@pytest.mark.parametrize(("like", "checkpoint_format", "weights", "activations"), MODELS)
def test_tokens_are_the_same_alone_and_in_company(
    tmp_path: Path, like: str, checkpoint_format: str, weights: str, activations: str
) -> None:
    config = make_config(tmp_path, like, checkpoint_format)
    model = load(config, weights, activations)
    output = model.weights.blocks[0].output  # type: ignore[union-attr]
    assert takes_fp8(output) == (activations == "fp8")
    assert (static_scales(output) is not None) == (activations == "fp8" and checkpoint_format == "hf-fp8")
    counters = [None if config.model.moe is None else ExpertCounter.of(config.model) for _ in range(2)]
    together = run(config, model, (0, 1, 2), whole=True, experts=counters[0])
    assert [len(together[number]) for number in range(3)] == list(NEW_TOKENS)
    assert run(config, model, (1,), whole=False, experts=counters[1])[1] == together[1]
    for counter, least in zip(counters, (sum(map(len, PROMPTS)) + sum(NEW_TOKENS) - 3, 10), strict=True):
        if counter is not None:
            statistics = counter.statistics()
            assert statistics.tokens >= least
            assert {sum(counts) for counts in statistics.expert_tokens} == {statistics.tokens * statistics.top_k}


def test_a_head_in_fp8_gives_the_same_tokens_alone_and_in_company(tmp_path: Path) -> None:
    config = make_config(tmp_path, "small3", "hf")
    model = load(config, "bf16", "bf16", head="fp8")
    together = run(config, model, (0, 1, 2), whole=True)
    assert run(config, model, (1,), whole=False)[1] == together[1]


def test_recorded_steps_read_a_cached_prefix_once_and_give_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "WALKED", Splits(128, 1, 128, walked=(4, 2)))
    shared: list[int] = []

    def seen(*arguments: Any) -> prefix.Prefixes | None:
        mates = prefix.prefixes(*arguments)
        if mates is not None:
            shared.extend(int(row[2]) for index, row in enumerate(mates.mates.tolist()) if row[0] != index)
        return mates

    monkeypatch.setattr(mla, "prefixes", seen)
    config = make_config(tmp_path, "small4", "hf", prefix_caching=True, budget_tokens=40)
    model = load(config, "bf16", "bf16")
    beginning = [number % 7 + 1 for number in range(32)]
    prompts = ([*beginning, 5], [*beginning, 9, 2])
    together = run(config, model, (0, 1), whole=True, prompts=prompts, new_tokens=(4, 3))
    assert 32 in shared
    assert run(config, model, (1,), whole=False, prompts=prompts, new_tokens=(4, 3))[1] == together[1]
