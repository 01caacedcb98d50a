"""Recorded decode steps: the same tokens and log-probabilities as steps that are launched one by one."""

from __future__ import annotations

from types import SimpleNamespace as Inputs
from typing import Any, cast

import msgspec
import pytest
import torch
from graph_repeater import Repeated
from native_only import needs_native

from cierzo.cache.pool import KVPool
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.graph_sizes import bounds, buckets, pairs
from cierzo.engine.messages import Submit, TokenDelta
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.graphs import DecodeGraphs, Recording
from cierzo.engine.worker.runner import ModelRunner, load_model
from cierzo.engine.worker.step_rows import DeviceRows
from cierzo.kernels.ops.block import StepRows
from cierzo.scheduler.params import SamplingParams

MAX_RUNNING = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("graphs") / "model", like="small4", scale="tiny")
    options = EngineOptions(
        model=str(checkpoint), max_running=MAX_RUNNING, budget_tokens=32, block_tokens=4, kv_cache_gib=0.001
    )
    return resolve(options)


def run(
    config: EngineConfig, *, graphs: bool, overlap: bool = False, experts: ExpertCounter | None = None
) -> list[list[tuple[int, list[int], object]]]:
    """Tokens and log-probabilities of a load in which sequences come, grow past blocks, and go."""
    model, kv, _ = load_model(config)
    spacious = KVPool(config.layout, kv.num_blocks + 1, CPU)
    for pages in spacious.layers:
        pages.latents.fill_(torch.nan)  # what is never written may hold anything
    recorded = DecodeGraphs(
        model,
        spacious,
        max_running=MAX_RUNNING,
        max_model_len=config.scheduler.max_model_len,
        cached_tokens=kv.num_blocks * config.cache.block_tokens,
        device=CPU,
        record=Repeated,
    )
    runner = ModelRunner(
        model,
        spacious,
        MAX_RUNNING,
        CPU,
        staged=DeviceRows(CPU),
        graphs=recorded if graphs else None,
        overlap=overlap,
        experts=experts,
    )
    runner.record(-(-config.scheduler.max_model_len // config.cache.block_tokens))
    Repeated.replays = 0
    core = EngineCore(msgspec.structs.replace(config, overlap=overlap), runner)
    found: dict[int, list[TokenDelta]] = {}
    for number in range(10):
        temperature, logprobs = (0.0, 0.9)[number % 2], (None, 2)[number % 3 == 1]
        params = SamplingParams(
            max_tokens=3 + 4 * number, seed=number, temperature=temperature, logprobs=logprobs, ignore_eos=True
        )
        core.submit(Submit(request_id=number, prompt_token_ids=[*range(5, 8 + 5 * number)], sampling=params))
    for _ in range(400):
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
    assert all(deltas[-1].finish is not None for deltas in found.values())
    assert [deltas[-1].finish.reason for deltas in found.values() if deltas[-1].finish] == 10 * ["length"]
    return [
        [(delta.sample, delta.token_ids, msgspec.to_builtins(delta.logprobs)) for delta in found[number]]
        for number in range(10)
    ]


@needs_native  # the reference reads the host's lists, which are bounds here
def test_tokens_are_equal_with_graphs_on_and_off(config: EngineConfig) -> None:
    plain = run(config, graphs=False)
    assert run(config, graphs=False, overlap=True) == plain
    for overlap in (False, True):
        Repeated.recordings = 0
        assert run(config, graphs=True, overlap=overlap) == plain
        assert Repeated.recordings == len(buckets(MAX_RUNNING))  # all before the first step
        assert Repeated.replays > 40


@needs_native
@pytest.mark.parametrize("overlap", [False, True])
def test_experts_of_recorded_steps_are_counted_without_their_padding(config: EngineConfig, overlap: bool) -> None:
    """Overlapped, a step's choices are read after the next one was launched: each has its own."""
    launched, recorded = ExpertCounter.of(config.model), ExpertCounter.of(config.model)
    tokens = run(config, graphs=False, overlap=overlap, experts=launched)
    assert run(config, graphs=True, overlap=overlap, experts=recorded) == tokens
    statistics = recorded.statistics()
    assert statistics == launched.statistics()
    assert {bucket.most_tokens for bucket in statistics.decode} == {1, 2, 4, 8}
    assert statistics.decode[-1].tokens % MAX_RUNNING  # steps of five, in the graph of six
    assert {sum(counts) for counts in statistics.expert_tokens} == {statistics.tokens * statistics.top_k}


@needs_native
def test_all_recordings_write_their_logits_to_one_buffer(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, found = DecodeGraphs.logits, set()

    def noted(self: DecodeGraphs, rows: StepRows) -> torch.Tensor:
        logits = read(self, rows)
        assert logits.shape == (len(rows.token_ids), config.model.vocab_size)
        found.add((logits.data_ptr(), logits.untyped_storage().nbytes(), len(self._graphs)))
        return logits

    monkeypatch.setattr(DecodeGraphs, "logits", noted)
    run(config, graphs=True)
    assert Repeated.replays > 40
    assert {size for _, size, _ in found} == {MAX_RUNNING * config.model.vocab_size * 4}
    assert len({address for address, _, _ in found}) == 1
    assert max(graphs for _, _, graphs in found) > 1


def test_buckets_and_bounds_end_where_the_limits_do() -> None:
    assert buckets(1) == [1]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(70) == [1, 2, 4, 8, 16, 32, 48, 64, 70]


def test_bounds_go_from_what_sequences_have_usually_to_what_they_or_the_cache_can_hold() -> None:
    assert bounds(1, 262_144, 1_000_000) == [8192, 32_768, 131_072, 262_144]
    assert bounds(16, 262_144, 1_000_000) == [32_768, 131_072, 524_288, 1_000_000]
    assert bounds(256, 1024, 1_000_000) == [262_144]
    assert bounds(8, 1024, 1_000_000) == bounds(2, 64, 0) == [8192]
    assert pairs(2, 20_000, 30_000) == [(2, 30_000), (2, 8192), (1, 20_000), (1, 8192)]
    assert len(pairs(256, 262_144, 5_000_000)) <= 80  # at 0.15 s each, 12 s
    assert len(pairs(512, 262_144, 5_000_000)) <= 130


@pytest.mark.parametrize(("contexts", "recorded"), [([1], True), ([2_000_000], True), ([2_000_001], False)])
def test_every_step_that_the_cache_can_hold_has_a_graph(contexts: list[int], recorded: bool) -> None:
    """And one with more tokens than that, whose sequences share prefixes, is launched."""
    graphs = recorded_graphs(max_running=3, max_model_len=2**30, cached_tokens=2_000_000)
    for size in (1, 2, 3):
        assert graphs.fits(inputs(size, 0, [*contexts, *[0] * (size - 1)])) == recorded


def test_a_recording_is_no_step_of_a_prompt() -> None:
    graphs = recorded_graphs(max_running=2, max_model_len=64, cached_tokens=64)
    assert graphs.fits(inputs(2, 0, [1, 1]))
    for rows, expanded, sequences in ((2, 1, 1), (3, 0, 3), (0, 0, 0), (2, 0, 1)):
        assert not graphs.fits(inputs(rows, expanded, [1] * sequences))


def recorded_graphs(**limits: int) -> DecodeGraphs:
    """Graphs in which there is nothing."""

    class Never(Recording):
        def replay(self) -> None: ...

    model, kv = cast(Any, None), cast(KVPool, None)
    graphs = DecodeGraphs(model, kv, **limits, device=CPU, record=lambda work: Never())
    graphs.record_all(torch.zeros(3, 1, dtype=torch.int32), None)
    return graphs


def inputs(rows: int, expanded: int, contexts: list[int]) -> Any:
    """As much of StepRows as is asked."""
    return Inputs(token_ids=torch.zeros(rows), num_expanded=expanded, absorbed=Inputs(contexts=contexts))
