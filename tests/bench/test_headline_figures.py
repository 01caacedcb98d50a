"""The headline's arithmetic: steady time, the search for a concurrency, ratios and goals."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.headline.cells import CPU_PLAN, GPU_PLAN, LIMIT_S, Cell, Plan, Subject
from cierzo.bench.headline.measurement import (
    Measurement,
    Point,
    Steps,
    best,
    bound,
    closed_loop,
    confirm,
    engine_settings,
    kv_room,
    measured,
    resolved,
    search,
)
from cierzo.bench.headline.outcome import outcome_of
from cierzo.bench.latency import RequestSample, steady_load, summarise_load
from cierzo.bench.stats import Summary
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.errors import ConfigError

SMALL4 = Subject(model="small4", weights="nvfp4", kv_dtype="fp8")
SMALL3 = Subject(model="small3", weights="bf16", kv_dtype="fp8")
THROUGHPUT, LATENCY = Cell("throughput", 8, 4), Cell("latency", 8, 4, 1)
IDENTITY = {"commit": "abc", "device": "a card", "small4": "one", "small3": "other"}


def _sample(start_s: float, first_s: float, end_s: float, tokens: int = 5) -> RequestSample:
    step_s = (end_s - first_s) / (tokens - 1)
    return RequestSample(start_s, start_s, [first_s + step_s * i for i in range(tokens)], [1] * tokens, end_s)


SAMPLES = [
    _sample(0, 5, 9),  # ends last of the first two
    _sample(0, 2, 4),
    _sample(4, 5, 13),
    _sample(9, 10, 19),
    _sample(13, 14, 100),
    _sample(19, 20, 200),
]


def test_the_steady_rate_leaves_ramp_and_tail_out() -> None:
    """C = 2: from the 2nd completion at 9 s to the 4th at 19 s, two requests."""
    found = steady_load(summarise_load(SAMPLES[::-1], 200.0), 2)
    assert found.requests_per_s == pytest.approx(2 / 10)
    assert found.output_tokens_per_s == pytest.approx(10 / 10)
    assert sorted(one.end_s for one in found.samples) == [13, 19]


def test_too_few_requests_have_no_steady_time() -> None:
    with pytest.raises(ValueError, match="4 answers, and 2 are left out"):
        steady_load(summarise_load(SAMPLES[:4], 19.0), 2)
    assert [closed_loop(LATENCY, n, 0).requests for n in (1, 2, 100)] == [4, 6, 300]


def test_a_figure() -> None:
    totals = StepTotals(steps=4, rows=8.0, distinct_experts=40.0, num_bytes=400.0, operations=20.0, limit_s=2.5)
    found = measured(THROUGHPUT, summarise_load(SAMPLES, 200.0), 2, 3, totals)
    assert found.replicas == 3
    assert (found.concurrency, found.requests) == (6, 18)
    assert found.requests_per_s == pytest.approx(0.6)
    assert found.plain_requests_per_s == pytest.approx(3 * 6 / 200)
    assert found.time_to_first_token_s.p50 == 1.0
    assert found.completion_s.max == 10
    assert found.time_per_output_token_s.p50 == pytest.approx((8 / 4 + 9 / 4) / 2)
    assert found.steps == Steps(
        running=2.0, distinct_experts=10.0, num_bytes=100.0, operations=5.0, limit_requests_per_s=3 * 2 / 2.5
    )
    latency = measured(LATENCY, summarise_load(SAMPLES, 200.0), 2)
    assert latency.completion_s.max == 181
    assert latency.requests_per_s == pytest.approx(0.2)
    assert latency.steps is None


def test_requests_are_kept_without_single_tokens() -> None:
    kept = measured(LATENCY, summarise_load(SAMPLES, 200.0), 2).samples
    assert kept[2] == (4, 5, 13, 5)
    assert len(kept) == len(SAMPLES)
    refused = RequestSample(0.0, 0.0, [], [], 1.0, error="overloaded")
    assert len(measured(LATENCY, summarise_load([*SAMPLES, refused], 200.0), 2).samples) == len(SAMPLES)


def _curve(slope_s: float, base_s: float, peak: int) -> tuple[dict[int, Point], list[int]]:
    asked: list[int] = []
    table = {
        n: Point(
            concurrency=n,
            requests_per_s=n / (1 + n / 50) if n <= peak else peak / (1 + peak / 50) - 0.01 * (n - peak),
            time_per_output_token_s=base_s + slope_s * n,
            measured=True,
        )
        for n in range(1, 3000)
    }
    return table, asked


def test_the_search_finds_what_trying_all_would() -> None:
    chance = random.Random(3)
    for _ in range(200):
        table, asked = _curve(10 ** chance.uniform(-6, -2), chance.uniform(0, LIMIT_S), 10**6)
        most = chance.choice([1, 2, 7, 100, 513, 2048])
        if table[1].time_per_output_token_s > LIMIT_S:
            with pytest.raises(ConfigError, match="none of 1 loads keeps 50 ms"):
                best(search(lambda n, table=table: table[n], most))
            continue

        def look(n: int, table: dict[int, Point] = table, asked: list[int] = asked) -> Point:
            asked.append(n)
            return table[n]

        found = best(search(look, most))
        exact = max(n for n in range(1, most + 1) if table[n].time_per_output_token_s <= LIMIT_S)
        assert exact * 0.97 - 1 <= found <= exact
        assert max(asked) <= most
        assert len(asked) == len(set(asked)) < 20


def test_estimates_are_confirmed() -> None:
    """Too high a start comes down until the limit is kept; one that keeps it goes up while that gives more."""
    table, _ = _curve(0.001, 0.0, 10**6)  # 50 clients keep 50 ms
    down = confirm(table.__getitem__, 70, 2048)
    assert list(down)[:2] == [70, 50]
    assert best(down) == 50
    assert list(confirm(table.__getitem__, 47, 2048)) == [47, 48, 49, 50]
    assert list(confirm(table.__getitem__, 40, 40)) == [40]
    peaked, _ = _curve(0.0001, 0.0, 40)
    beside = confirm(peaked.__getitem__, 40, 2048)
    assert list(beside) == [40, 41]
    assert bound(beside, 40) == "more clients are answered no quicker"
    assert bound(down, 50) == "50 ms per output token"
    assert bound({40: peaked[40]}, 40) == "not looked further"
    with pytest.raises(ConfigError, match=r"none of 1 loads keeps 50 ms .*, the quickest takes 70\.0"):
        best({70: down[70]})


def _measured(requests_per_s: float, completion_s: float, limit: float) -> Measurement:
    seconds = Summary(1, *[completion_s] * 5)
    return Measurement(
        concurrency=1,
        requests=3,
        requests_per_s=requests_per_s,
        plain_requests_per_s=requests_per_s,
        output_tokens_per_s=1.0,
        time_to_first_token_s=seconds,
        time_per_output_token_s=seconds,
        inter_token_s=seconds,
        completion_s=seconds,
        steps=Steps(running=1.0, distinct_experts=0.0, num_bytes=1.0, operations=1.0, limit_requests_per_s=limit),
        samples=[(4, 5, 13, 5)],
    )


def test_ratios_are_of_paired_rounds_and_goals_of_ratios(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl", IDENTITY)
    plan = Plan(
        cells=(THROUGHPUT, LATENCY),
        subjects=(SMALL4, SMALL3),
        pairs=((SMALL4, SMALL3), (SMALL3, SMALL4)),
        goals={
            ("8/4", SMALL4, SMALL3): 3.0,
            ("8/4@1", SMALL4, SMALL3): 0.49,
            ("elsewhere", SMALL4, SMALL3): 0.5,
        },
        goals_are_for="a test",
    )
    rounds = {
        SMALL4: [(6.0, 1.0, 20.0), (9.0, 2.0, 20.0), (2.0, 5.0, 20.0)],
        SMALL3: [(2.0, 2.0, 5.0), (3.0, 4.0, 5.0)],
    }
    for subject, figures in rounds.items():
        for number, values in enumerate(figures):
            for cell in plan.cells:
                result = msgspec.to_builtins(_measured(*values))
                where = {"cell": str(cell), "subject": str(subject), "round": number}
                store.add(Sample(**where, started="", took_s=0.0, result=result))
    found = outcome_of(plan, store)
    assert [(one.cell.name, one.ratio, one.rounds, one.limit, one.met) for one in found.ratios[::2]] == [
        ("8/4", 3.0, 2, 4.0, True),
        ("8/4@1", 0.5, 2, 0.25, False),
    ]
    assert [one.goal for one in found.ratios] == [3.0, None, 0.49, None]
    row = found.rows[0]
    assert row.values == [6.0, 9.0, 2.0]
    assert row.result is not None
    assert (row.result.requests_per_s, row.result.samples) == (6.0, [])


def test_a_goal_that_was_not_measured_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl", IDENTITY)
    plan = msgspec.structs.replace(CPU_PLAN, cells=CPU_PLAN.cells[:1])
    assert [(one.goal, one.ratio, one.met) for one in outcome_of(plan, store).ratios] == [(2.2, None, None)]


def test_plans_hold_together() -> None:
    for plan in (GPU_PLAN, CPU_PLAN):
        cells = {cell.name: cell for cell in plan.cells}
        assert len(cells) == len(plan.cells)
        assert all((one.model, other.model) == ("small4", "small3") for one, other in plan.pairs)
        assert {subject for pair in plan.pairs for subject in pair} == set(plan.subjects)
        for (name, *pair), goal in plan.goals.items():
            assert tuple(pair) in plan.pairs
            assert (goal > 1) == cells[name].is_throughput
    assert len(GPU_PLAN.goals) == 24


def test_an_engine_has_room_for_as_many_as_a_cell_has() -> None:
    """The engine's own plan of a latency profile would hold 7 requests of 33,792 tokens."""
    cell = Cell("latency", 32_768, 1024, 16)
    config = resolved(engine_settings("small4", "simulated:h200", SMALL4, [cell]))
    assert kv_room(config, cell) >= 16
    short = Cell("latency", 1024, 1024, 8)
    few = engine_settings("small4", "simulated:h200", SMALL4, [short])
    assert "max_running" not in few
    many = Cell("latency", 1024, 1024, 50)
    assert resolved(engine_settings("small4", "simulated:h200", SMALL4, [short, many])).scheduler.max_running == 50
    crowd = Cell("latency", 1024, 1024, 5000)
    limits = resolved(engine_settings("small4", "simulated:h200", SMALL4, [crowd])).scheduler
    assert limits.max_running == limits.budget_tokens == 2048  # more than a step has tokens cannot run at once
    fp8 = Subject(model="small4", weights="fp8", kv_dtype="fp8")
    with pytest.raises(ConfigError, match="nothing is left for the KV cache"):
        engine_settings("small4", "simulated:h100", fp8, [short])
