"""Loads in virtual time: the real scheduler at full scale, in time that a roofline tells."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from cierzo.bench.latency import LoadResult, result_table
from cierzo.bench.load import LoadSettings
from cierzo.bench.virtual import SimulatedServer, VirtualClock, VirtualCore, run_simulated_load
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.messages import Finish, Submit
from cierzo.engine.worker.core import EngineCore, make_runner
from cierzo.engine.worker.simulated import SimulatedRunner
from cierzo.scheduler.params import SamplingParams


def configure(model: str = "small4", card: str = "h200", **options: Any) -> EngineConfig:
    return resolve(EngineOptions(model=model, device=f"simulated:{card}", **{"profile": "throughput", **options}))


def load(server: SimulatedServer, **settings: Any) -> LoadResult:
    return run_simulated_load(server, LoadSettings(rpc="", **settings))


def submit(number: int, prompt_tokens: int, new_tokens: int, prompt: list[int] | None = None) -> Submit:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=number)
    ids = random.Random(number).choices(range(100_000), k=prompt_tokens) if prompt is None else prompt
    return Submit(request_id=number, prompt_token_ids=ids, sampling=sampling)


def run_out(core: VirtualCore, most_steps: int = 4096) -> dict[int, float]:
    """Step until nothing is left: when each request ended."""
    ended = {}
    while core.has_work():
        steps = len(core.steady_s(most_steps))
        for delta in core.advance(steps) if steps > 1 else core.step_plain():
            if delta.finish is not None:
                assert delta.finish.reason == "length", delta
                ended[delta.request_id] = core.virtual_clock()
    core.check()
    return ended


@pytest.mark.parametrize(
    "settings",
    [
        {"requests": 40, "concurrency": 7, "input_tokens": 700, "output_tokens": 90},
        {"requests": 60, "rate": 9.0, "input_tokens": 900, "shared_tokens": 600, "output_tokens": 70, "seed": 3},
        {"requests": 30, "concurrency": 30, "input_tokens": 200, "output_tokens": 300, "seed": 5},
    ],
)
@pytest.mark.parametrize("kv_cache_gib", [2.0, 0.07])
def test_steps_taken_together_change_nothing(settings: dict[str, Any], kv_cache_gib: float) -> None:
    """The second size preempts."""
    config = configure(kv_cache_gib=kv_cache_gib, max_model_len=2048)
    results, totals, stats, served = [], [], [], []
    for one_at_a_time in (False, True):
        server = SimulatedServer(config, step_at_a_time=one_at_a_time)
        result = load(server, **settings)
        server.core.check()
        assert result.answered == settings["requests"], result.errors
        results.append(sorted((s.due_s, s.delta_s[0], s.end_s, sum(s.delta_tokens)) for s in result.samples))
        totals.append(server.totals)
        stats.append(server.core.stats())
        served.append(server.core._scheduler._tenants.virtual_time())
    assert served[0] == served[1] > 0
    for together, single in zip(*results, strict=True):
        assert together == pytest.approx(single, rel=1e-9)
    for name in ("preemptions", "computed_tokens", "recomputed_tokens", "sequence_steps", "steps", "output_tokens"):
        assert getattr(stats[0], name) == getattr(stats[1], name), name
    assert stats[0].computed_tokens > 0
    assert stats[0].kv_block_s == pytest.approx(stats[1].kv_block_s, rel=1e-4)
    assert (totals[0].steps, totals[0].rows) == (totals[1].steps, totals[1].rows)
    assert totals[0].total_s == pytest.approx(totals[1].total_s)
    assert totals[0].distinct_experts == pytest.approx(totals[1].distinct_experts)
    if kv_cache_gib < 1 and settings.get("concurrency") == 30:
        assert stats[0].preemptions > 0
        assert stats[0].recomputed_tokens > 0


def test_what_a_request_has_cost_is_the_same_with_steps_taken_together() -> None:
    """Some of them on blocks that others had, after preemptions."""
    config = configure(kv_cache_gib=0.05, max_model_len=2048)
    found: list[dict[int, Finish]] = []
    for most_steps in (4096, 1):
        core, finishes = VirtualCore(config, VirtualClock()), {}
        for number in range(1, 13):
            core.submit(submit(number, 100 + 7 * number, 300 + 40 * (number % 5)))
        while core.has_work():
            steps = len(core.steady_s(most_steps))
            for delta in core.advance(steps) if steps > 1 else core.step_plain():
                if delta.finish is not None:
                    finishes[delta.request_id] = delta.finish
        found.append(finishes)
        assert core.stats().kv_block_s == sum(one.kv_block_s for one in finishes.values())
    together, single = found
    assert together.keys() == single.keys()
    assert any(one.recomputed_tokens for one in single.values())
    for number, one in together.items():
        other = single[number]
        for name in ("computed_tokens", "recomputed_tokens", "steps", "preemptions"):
            assert getattr(one, name) == getattr(other, name), (number, name)
        assert one.kv_block_s == pytest.approx(other.kv_block_s, abs=1e-2)


def test_time_passes_as_the_roofline_says() -> None:
    config = configure()
    core = VirtualCore(config, VirtualClock())
    core.submit(submit(1, 1000, 101))
    ended = run_out(core)
    totals = core.simulated.totals
    assert ended[1] == pytest.approx(totals.total_s)
    assert totals.steps == 101
    assert totals.memory_s + totals.arithmetic_s + totals.overhead_s == pytest.approx(totals.total_s)
    assert totals.limit_s < totals.total_s
    assert totals.distinct_experts / totals.steps == pytest.approx(4 + (128 - 4) / 101, rel=0.02)


def test_a_quarter_of_an_hour_of_load_passes_in_15_seconds() -> None:
    config = configure()
    server = SimulatedServer(config)
    begin = time.process_time()  # others may use the processor meanwhile
    result = load(server, requests=450, rate=0.5, input_tokens=1024, output_tokens=512)
    assert result.answered == 450
    assert result.elapsed_s > 800
    assert time.process_time() - begin < 15


def test_thousands_of_sequences_run_at_once_on_the_blocks_of_four_cards() -> None:
    config = configure(card="4xh100", budget_tokens=16_384)
    server = SimulatedServer(config)
    assert config.cache.num_blocks * config.cache.block_tokens > 10_000_000
    result = load(server, requests=2048, concurrency=2048, input_tokens=256, output_tokens=128)
    assert result.answered == 2048
    assert server.core.stats().preemptions == 0
    assert server.totals.rows / server.totals.steps > 1000  # running, on average


def test_totals_at_a_request_s_end_are_those_of_the_steps_until_then() -> None:
    """A closed loop keeps the engine busy, so that the time until an end is that of the steps."""
    server = SimulatedServer(configure(profile="latency"))
    result = load(server, requests=12, concurrency=4, input_tokens=1024, output_tokens=16)
    assert [one.total_s for one in server.ends] == pytest.approx(sorted(one.end_s for one in result.samples))


def test_short_requests_do_not_starve_beside_longest_ones() -> None:
    """Two prompts of 262,100 tokens, which take half a minute each, and short ones that come meanwhile."""
    core = VirtualCore(configure(), VirtualClock())
    for number in (1, 2):
        core.submit(submit(number, 262_100, 20))
    ended: dict[int, float] = {}
    first: dict[int, float] = {}
    sent: dict[int, float] = {}
    number = 100
    while core.has_work():
        if number < 150 and core.virtual_clock() > (number - 100) * 0.5:
            sent[number] = core.virtual_clock()
            core.submit(submit(number, 300, 20))
            number += 1
        for delta in core.step_plain():
            first.setdefault(delta.request_id, core.virtual_clock())
            if delta.finish is not None:
                assert delta.finish.reason == "length"
                ended[delta.request_id] = core.virtual_clock()
    longest_s = min(ended[1], ended[2])
    beside = [short for short in sent if sent[short] < longest_s]
    assert longest_s > 20
    assert len(beside) > 30
    assert max(first[short] - sent[short] for short in beside) < 2.0
    assert max(ended[short] - sent[short] for short in beside) < longest_s / 2


def test_a_preemption_storm_ends() -> None:
    """Four times as many tokens as the cache holds, all growing: everyone finishes, the oldest first."""
    config = configure(kv_cache_gib=0.2, max_model_len=4096, budget_tokens=4096)
    core = VirtualCore(config, VirtualClock())
    for number in range(1, 41):
        core.submit(submit(number, 100, 1500))
    ended = run_out(core)
    assert len(ended) == 40
    assert core.stats().preemptions > 10
    assert ended[1] == min(ended.values())
    assert core.stats().free_blocks == core.stats().total_blocks


def test_a_cache_that_is_full_to_99_percent_serves_on() -> None:
    config = configure(kv_cache_gib=0.2, max_model_len=16_384)
    tokens = config.cache.num_blocks * config.cache.block_tokens
    held = int(tokens * 0.99) // 32 * 32 - 2048
    core = VirtualCore(config, VirtualClock())
    for number, prompt_tokens in ((1, held // 2), (2, held - held // 2)):
        core.submit(submit(number, prompt_tokens, 1000))
    while core.stats().free_blocks * 32 > 0.13 * tokens and core.has_work():
        core.step_plain()
    for number in range(3, 13):
        core.submit(submit(number, 120, 10))
    ended = run_out(core)
    assert len(ended) == 12
    assert max(ended[number] for number in range(3, 13)) < min(ended[1], ended[2])


def test_prefixes_that_are_shared_are_computed_once() -> None:
    server = SimulatedServer(configure())
    settings = {"requests": 64, "concurrency": 16, "input_tokens": 4096, "output_tokens": 32}
    shared = load(server, shared_tokens=4000, **settings)
    stats = server.core.stats()
    assert stats.cached_tokens > 0.9 * (stats.prompt_tokens - 4096)
    assert shared.requests_per_s > 3 * load(SimulatedServer(configure()), **settings).requests_per_s


def test_everything_says_that_it_is_a_simulation() -> None:
    config = configure(card="2xh200")
    assert "SIMULATION" in make_runner(config).describe()
    assert "nothing is computed" in config.describe()
    server = SimulatedServer(config)
    result = load(server, requests=2, concurrency=1, input_tokens=8, output_tokens=2)
    assert result.device == "simulated:2xh200"
    assert result_table(result).startswith("SIMULATION of 2xh200\n")


def test_log_probabilities_are_made_up_where_they_are_asked_for() -> None:
    core = VirtualCore(configure(), VirtualClock())
    sampling = SamplingParams(max_tokens=3, logprobs=2, seed=0)
    core.submit(Submit(request_id=1, prompt_token_ids=[1, 2], sampling=sampling))
    core.submit(submit(2, 5, 3))
    logprobs: dict[int, list[Any]] = {1: [], 2: []}
    while core.has_work():
        for delta in core.step_plain():
            logprobs[delta.request_id] += delta.logprobs or []
    assert [len(found) for found in logprobs.values()] == [3, 0]


def test_made_up_tokens_end_no_answer() -> None:
    core = VirtualCore(configure(), VirtualClock())
    sampling = SamplingParams(max_tokens=50, seed=0, stop_token_ids=(0, 1))
    core.submit(Submit(request_id=1, prompt_token_ids=[7], sampling=sampling))
    run_out(core)
    assert core.stats().output_tokens == 50


def test_a_server_waits_for_real() -> None:
    config = configure(overlap="off")
    runner = make_runner(config)
    assert isinstance(runner, SimulatedRunner)
    clock = VirtualClock()
    twin = VirtualCore(config, clock)
    twin.submit(submit(1, 2000, 3))
    begin = time.perf_counter()
    core = EngineCore(config, runner)
    core.submit(submit(1, 2000, 3))
    while core.has_work():
        core.step()
    took = time.perf_counter() - begin
    run_out(twin)
    assert clock() <= took < clock() + 2.0
