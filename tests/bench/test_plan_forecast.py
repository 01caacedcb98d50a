"""The forecast against the engine itself, the real scheduler and the real load client in virtual time; and against
steps that are priced by hand.

`python tests/bench/test_plan_forecast.py` compares longer loads too, and prints both.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec
import pytest
from stated_cards import stated
from steps_by_hand import Chunk, Step, take

from cierzo.bench.latency import LoadResult, steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.plan.forecast import Forecast, forecast, left_out
from cierzo.bench.virtual import SimulatedServer, run_simulated_load
from cierzo.bench.workload import TracedRequest, Workload, parse_workload, poisson_arrivals
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.errors import ConfigError

TOLERANCE = 0.05  # what is promised; the steps are the same to the last one, see the test below
NVFP4: dict[str, Any] = {"profile": "throughput"}
FP8: dict[str, Any] = {"weights": "fp8"}
CASES = [  # model, device, workload, options, preemptions are expected
    ("small4", "h200", "512/64@16", NVFP4, False),
    ("small4", "h200", "1024/64@48", FP8, False),
    ("small4", "4xh100", "1024/96@64", {"weights": "fp8", "profile": "latency"}, False),
    ("small4", "h200", "10000/40@4", FP8, False),  # prompts in many chunks
    ("small4", "h200", "5000/1@3", FP8, False),  # prompts alone
    ("small4", "h200", "40000/8@2", FP8, False),  # chunks that are cut to the time of a step
    ("small4", "h200", "30000:20000/8@4", {"profile": "latency"}, False),
    ("small4", "h200", "20000/8@4", NVFP4 | {"max_step_ms": 60.0}, False),  # too little: the least chunks
    ("small4", "h200", "1024/200@100", NVFP4 | {"max_step_ms": 100.0, "kv_cache_gib": 1.0}, True),
    ("small3", "h100", "256/300@40", FP8 | {"max_step_ms": 30.0, "kv_cache_gib": 2.0}, True),
    ("small4", "h200", "9000/64@2/s", FP8 | {"max_step_ms": 90.0}, False),
    ("small4", "h200", "20000/64@1/s", FP8 | {"max_step_ms": 0.0}, False),
    ("small4", "h200", "33/32@1", FP8, False),
    ("small4", "h200", "1152:1024/64@32", NVFP4, False),
    ("small4", "h200", "3000:2999/20@90", NVFP4, False),  # more wait for a prefix than a step looks past
    ("small4", "h200", "4000:3000/200@60", NVFP4 | {"kv_cache_gib": 0.5}, True),
    ("small4", "h200", "1024/200@100", NVFP4 | {"kv_cache_gib": 1.0}, True),
    ("small4", "h200", "300/40@80", FP8 | {"budget_tokens": 64, "max_running": 64}, False),
    ("small3", "h100", "256/300@40", FP8 | {"kv_cache_gib": 2.0}, True),
    ("small3", "h100", "256/300@40", FP8 | {"kv_cache_gib": 2.0, "prefix_caching": False}, True),
    ("small3", "4xh100", "1024/100@60", {"kv_cache_gib": 4.0}, True),
    ("small3", "h200", "2048/64@100", NVFP4 | FP8, False),
    ("small3", "h200", "16/1500@64", FP8, False),  # contexts that grow in one long stretch
    ("small4", "h200", "512/64@8/s", NVFP4, False),
    ("small4", "h200", "512:300/64@60/s", NVFP4, False),
    ("small3", "h100", "256/200@30/s", FP8 | {"kv_cache_gib": 1.0}, True),
    ("small4", "4xh100", "1000/100@12/s", {"weights": "nvfp4", "profile": "latency"}, False),
]
LONG_CASES = [
    ("small4", "h200", "2048/2048@300", NVFP4, False),
    ("small4", "h200", "2048:512/700@150", NVFP4 | {"kv_cache_gib": 2.0, "prefix_caching": False}, True),
    ("small4", "h200", "20000:18000/200@90", NVFP4 | {"kv_cache_gib": 2.0}, True),
    ("small4", "4xh100", "8192/256@200", {"weights": "fp8"}, False),
    ("small3", "h200", "1024/1024@256", FP8, True),
    ("small3", "4xh100", "2048/512@6/s", FP8, False),
]


def _config(model: str, device: str, options: dict[str, Any]) -> EngineConfig:
    return resolve(EngineOptions(model=model, device=f"simulated:{device}", **options))


def _measured(config: EngineConfig, workload: Workload, requests: int) -> tuple[LoadResult, SimulatedServer]:
    server = SimulatedServer(config)
    settings = LoadSettings(
        rpc="",
        requests=requests,
        concurrency=workload.concurrency,
        rate=workload.rate,
        input_tokens=workload.input_tokens,
        shared_tokens=workload.shared_tokens,
        output_tokens=workload.output_tokens,
        seed=workload.seed,
    )
    result = run_simulated_load(server, settings)
    assert not result.errors
    return steady_load(result, left_out(requests, workload.concurrency)), server


def _figures(found: Forecast | LoadResult) -> list[float]:
    completion_s = found.completion_s if isinstance(found, Forecast) else found.end_to_end_s
    latencies = (found.time_to_first_token_s, found.inter_token_s, completion_s)
    return [found.requests_per_s, *(one.p50 for one in latencies)]


@pytest.mark.parametrize(("model", "device", "text", "options", "preempts"), CASES)
def test_forecast_is_what_the_simulated_engine_does(
    model: str, device: str, text: str, options: dict[str, Any], preempts: bool
) -> None:
    config, workload = _config(model, device, options), parse_workload(text)
    if workload.rate is not None:
        workload = msgspec.structs.replace(workload, requests=60)
    planned = forecast(config, workload)
    measured, server = _measured(config, workload, planned.requests)
    assert _figures(planned) == pytest.approx(_figures(measured), rel=TOLERANCE)
    stats = server.core.stats()
    assert (planned.preemptions, planned.steps) == (stats.preemptions, server.totals.steps)
    assert planned.tokens == server.totals.tokens
    assert (planned.preemptions > 0) == preempts
    assert planned.kv_room_reached or not preempts


@pytest.mark.parametrize(
    ("model", "device", "options", "text", "prompts"),
    [
        ("small3", "h200", {"weights": "bf16"}, "100/11@1", [Chunk(0, 100)]),
        ("small4", "4xh100", FP8, "700/24@1", [Chunk(0, 700)]),
        ("small4", "h200", NVFP4, "9000/11@1", [Chunk(0, 8192), Chunk(8192, 808)]),  # in two steps of 8,192 tokens
        ("small4", "h200", NVFP4, "300/40@5", [Chunk(0, 300)]),  # five in step with one another
    ],
)
def test_the_figures_of_a_closed_loop_are_sums_of_steps_priced_by_hand(
    model: str, device: str, options: dict[str, Any], text: str, prompts: list[Chunk]
) -> None:
    """All requests begin and end together: a prompt's steps, then a step for each further token."""
    config, workload = _config(model, device, options), parse_workload(text)
    clients, made = workload.concurrency or 0, workload.output_tokens
    page_bytes = 1 if config.layout.dtype == "fp8" else 2
    last = len(prompts) - 1
    steps = [
        *(Step(prompts=(one,) * clients, sampled=clients * (index == last)) for index, one in enumerate(prompts)),
        *(Step(contexts=(workload.input_tokens + n,) * clients, sampled=clients) for n in range(1, made)),
    ]
    taken = [take(model, device, step, config.weights, page_bytes) for step in steps]
    first_s = sum(step.total_s for step in taken[: len(prompts)])
    gaps_s = [step.total_s for step in taken[len(prompts) :]]
    assert gaps_s == sorted(gaps_s)  # contexts grow
    found = forecast(config, workload, device=stated(device))
    completion_s = first_s + sum(gaps_s)
    assert found.requests_per_s == pytest.approx(clients / completion_s, rel=1e-6)
    assert found.output_tokens_per_s == pytest.approx(clients * made / completion_s, rel=1e-6)
    for percentiles, expected in ((found.time_to_first_token_s, first_s), (found.completion_s, completion_s)):
        figures = (percentiles.mean, percentiles.p50, percentiles.p99)
        assert figures == pytest.approx([expected] * 3, rel=1e-6)
    between = found.inter_token_s
    assert between.mean == pytest.approx(sum(gaps_s) / len(gaps_s), rel=1e-6)
    middle = gaps_s[-(-len(gaps_s) // 2) - 1]  # half of the gaps are no longer
    assert (between.p50, between.p99) == pytest.approx((middle, gaps_s[-1]), rel=1e-6)
    assert found.steps == found.requests // clients * len(steps)
    assert found.running == pytest.approx(clients, rel=1e-6)
    for part in ("memory", "arithmetic", "exchange", "overhead", "limit"):
        share = sum(getattr(step, f"{part}_s") for step in taken) / completion_s
        assert getattr(found, f"{part}_share") == pytest.approx(share, rel=1e-6), part
    assert found.bytes_per_step == pytest.approx(sum(step.num_bytes for step in taken) / len(taken), rel=1e-6)
    assert found.operations_per_step == pytest.approx(sum(step.operations for step in taken) / len(taken), rel=1e-6)


def test_the_figures_of_two_requests_are_sums_of_steps_priced_by_hand() -> None:
    """The second comes while the first one's second token is made: its prompt shares the step of the third."""
    config = _config("small3", "h200", {"weights": "bf16"})

    def seconds(step: Step) -> float:
        return take("small3", "h200", step, "bf16", 2).total_s

    steps_s = [
        seconds(Step(prompts=(Chunk(0, 100),), sampled=1)),
        seconds(Step(contexts=(101,), sampled=1)),
        seconds(Step(contexts=(102,), prompts=(Chunk(0, 300),), sampled=2)),
        seconds(Step(contexts=(103, 301), sampled=2)),
        seconds(Step(contexts=(302,), sampled=1)),
    ]
    came_s = steps_s[0] + 0.3 * steps_s[1]
    trace = (
        TracedRequest(arrival_s=0.0, input_tokens=100, output_tokens=4),
        TracedRequest(arrival_s=came_s, input_tokens=300, output_tokens=3),
    )
    found = forecast(config, Workload(trace=trace), device=stated("h200"))
    first_s = [steps_s[0], sum(steps_s[:3]) - came_s]
    completion_s = [sum(steps_s[:4]), sum(steps_s) - came_s]
    gaps_s = [*steps_s[1:4], *steps_s[3:5]]
    assert found.steps == 5
    assert found.requests_per_s == pytest.approx(2 / sum(steps_s), rel=1e-6)
    assert found.output_tokens_per_s == pytest.approx(7 / sum(steps_s), rel=1e-6)
    assert found.time_to_first_token_s.mean == pytest.approx(sum(first_s) / 2, rel=1e-6)
    assert found.completion_s.mean == pytest.approx(sum(completion_s) / 2, rel=1e-6)
    assert found.inter_token_s.mean == pytest.approx(sum(gaps_s) / 5, rel=1e-6)
    assert found.inter_token_s.p50 == pytest.approx(sorted(gaps_s)[2], rel=1e-6)
    assert found.running == pytest.approx((sum(steps_s[:4]) + sum(steps_s[2:])) / sum(steps_s), rel=1e-6)


def test_a_trace_is_a_load_like_any_other() -> None:
    """Requests that come as an open loop's, told one by one."""
    config = _config("small4", "h200", NVFP4)
    loop = Workload(input_tokens=300, output_tokens=20, shared_tokens=100, rate=20.0, requests=50)
    trace = Workload(
        trace=tuple(
            TracedRequest(arrival_s=at, input_tokens=300, output_tokens=20, shared_tokens=100)
            for at in poisson_arrivals(50, 20.0, 0)
        )
    )
    assert forecast(config, trace) == forecast(config, loop)


def test_images_of_a_trace_take_the_tower_s_time_once_each() -> None:
    """Two requests, one after the other; the second has two images, of which one begins in a later chunk."""
    config = _config("small4", "h200", {**NVFP4, "budget_tokens": 1024, "max_chunk_tokens": 1024})

    def found(*images: int) -> Forecast:
        lengths = {"input_tokens": 2000, "output_tokens": 2}
        first = TracedRequest(arrival_s=0.0, **lengths)
        second = TracedRequest(arrival_s=100.0, image_tokens=images, **lengths)
        return forecast(config, Workload(trace=(first, second)))

    assert config.card is not None
    one_s, pair_s = StepModel(config, config.card).image_prices
    assert one_s > 0
    took_s = 1100 * one_s + (1000**2 + 100**2) * pair_s
    seeing, reading = found(1000, 100), found()
    assert seeing.steps == reading.steps
    assert seeing.completion_s.max - reading.completion_s.max == pytest.approx(took_s, rel=1e-6)
    assert 2 * (seeing.completion_s.mean - reading.completion_s.mean) == pytest.approx(took_s, rel=1e-6)
    text = _config("small4", "h200", {**NVFP4, "text_only": True})
    asked = TracedRequest(arrival_s=0, input_tokens=9, output_tokens=1, image_tokens=(4,))
    with pytest.raises(ConfigError, match="it has images, and the model takes none"):
        forecast(text, Workload(trace=(asked,)))


@pytest.mark.parametrize("late", [0, 3])
def test_requests_that_end_in_one_step_have_a_rate(late: int) -> None:
    """A tenth of them, left out at either end, leaves no time between."""
    config = _config("small4", "h200", NVFP4)
    lengths = {"input_tokens": 100, "output_tokens": 1, "shared_tokens": 99}
    arrivals = [0.0] * (40 - late) + [10.0] * late
    found = forecast(config, Workload(trace=tuple(TracedRequest(arrival_s=at, **lengths) for at in arrivals)))
    ends_s = [at + found.completion_s.max for at in arrivals]
    assert found.requests_per_s == pytest.approx(40 / ends_s[-1], rel=0.01)
    assert found.completion_s.count == 40


def test_what_limits() -> None:
    """Few decode steps on one card wait for memory, long prompts for arithmetic, and slots and blocks run out."""
    config = _config("small4", "h200", NVFP4)
    assert forecast(config, parse_workload("16/200@8"), device=stated("h200")).limit == "memory"
    assert forecast(config, parse_workload("30000/1@8"), device=stated("h200")).limit == "arithmetic"
    assert forecast(config, parse_workload("16/200@8")).roof.startswith("issue of expert_terms nvfp4, ")
    few = _config("small4", "h200", NVFP4 | {"max_running": 4})
    found = forecast(few, parse_workload("100/50@12"))
    assert (found.max_running_reached, found.kv_room_reached, found.most_running) == (True, False, 4)
    assert found.most_waiting == 12
    shares = found.memory_share + found.arithmetic_share + found.exchange_share + found.overhead_share
    assert shares == pytest.approx(1.0)
    assert 0 < found.limit_share < 0.8


def test_an_open_loop_beyond_its_capacity_does_not_keep_up() -> None:
    config = _config("small4", "h200", NVFP4 | {"max_running": 8})
    capacity = forecast(config, parse_workload("512/64@8")).requests_per_s
    half = forecast(config, parse_workload(f"512/64@{0.5 * capacity:.2f}/s"))
    assert half.keeps_up
    assert half.requests_per_s == pytest.approx(0.5 * capacity, rel=0.05)
    over = forecast(config, parse_workload(f"512/64@{1.5 * capacity:.2f}/s"))
    assert not over.keeps_up
    assert over.requests_per_s == pytest.approx(capacity, rel=0.1)


def test_measured_distinct_experts_take_the_place_of_uniform_ones() -> None:
    config, workload = _config("small4", "h200", NVFP4), parse_workload("64/100@32")
    uniform, half = (
        forecast(config, workload),
        forecast(config, workload, distinct=lambda tokens: 0 * tokens + 40.0),
    )
    assert half.distinct_experts == 40.0
    assert 70 < uniform.distinct_experts < 90  # 81.7 of 32 tokens, docs of the model
    assert half.requests_per_s > 1.3 * uniform.requests_per_s


def test_what_cannot_run_is_refused_by_name() -> None:
    config = _config("small4", "h200", NVFP4 | {"max_model_len": 4096, "max_waiting": 100})
    with pytest.raises(ConfigError, match=r"4,097 tokens.*max_model_len is 4,096") as caught:
        forecast(config, parse_workload("4000/97@1"))
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("max_model_len", "4096", "4097")
    forecast(config, parse_workload("4000/96@1"))
    with pytest.raises(ConfigError, match=r"101 requests at once.*100"):
        forecast(config, parse_workload("40/9@101"))
    without_device = msgspec.structs.replace(config, card=None)
    with pytest.raises(ConfigError, match="needs its device"):
        forecast(without_device, parse_workload("40/9@1"))
    assert forecast(without_device, parse_workload("40/9@1"), device=named("h200")).requests == 8


def test_thousands_of_requests_take_seconds() -> None:
    begin = time.perf_counter()
    found = forecast(_config("small4", "h200", NVFP4), parse_workload("2048/2048@1500"))
    assert time.perf_counter() - begin < 10
    assert found.requests == 6000


def main() -> int:
    """Compare every case, the long ones too; exit status 1 if one is farther off than promised."""
    worst = 0.0
    for model, device, text, options, _ in [*CASES, *LONG_CASES]:
        config, workload = _config(model, device, options), parse_workload(text)
        if workload.rate is not None:
            workload = msgspec.structs.replace(workload, requests=300)
        planned = forecast(config, workload)
        measured, _ = _measured(config, workload, planned.requests)
        pairs = list(zip(_figures(planned), _figures(measured), strict=True))
        errors = [abs(ours / theirs - 1) if theirs else abs(ours) for ours, theirs in pairs]
        worst = max(worst, *errors)
        figures = "  ".join(f"{ours:.5g} / {theirs:.5g}" for ours, theirs in pairs)
        print(f"{model} {device} {text} {options}: planned / simulated {figures}; {max(errors):.2%}", flush=True)
    print(f"largest error {worst:.2%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
