"""State that the page shows: the front end's numbers, all of them, or as many as any client is told."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
import uvloop
from observe_cost import CORE_STATS, front_end, opened, step

from cierzo.engine.frontend.observe.tallies import BOUNDS_S, Histogram
from cierzo.engine.gateway.state import PageState, percentile, state_of
from cierzo.engine.messages import CoreStats, Health, Stats, StepOutput
from cierzo.engine.testing.words import fake_model

EFFORTS = ["none", "high"]
MODEL = fake_model(name="small-4", dtype="bfloat16", reasoning_efforts=EFFORTS, marks_thinking=True)


def told(core: CoreStats = CORE_STATS, frontend=None, model_id: str = "mine") -> PageState:
    health = Health(stream=0, state="ready", uptime_s=12.5, notes=["the certificate ends soon"])
    stats = Stats(
        stream=0,
        device="cpu",
        connections=1,
        streams=2,
        accepted=9,
        refused=4,
        finished=7,
        core_restarts=1,
        core=core,
    )
    return state_of(health, stats, MODEL, version="1.2", model_id=model_id, frontend=frontend)


def on_a_loop(body):
    async def looped():
        return body()

    return uvloop.run(looped())


def test_what_any_client_is_told_is_there_and_the_rest_is_none() -> None:
    state = msgspec.to_builtins(told())
    kept = {"model_id": "mine", "version": "1.2", "kv_used_share": 0.4, "kv_cached_share": 0.4, "restarts": 1}
    own = {"efforts": EFFORTS, "state": "ready", "notes": ["the certificate ends soon"], "uptime_s": 12.5}
    unknown = dict.fromkeys(("latency_bounds_s", "first_token_s", "inter_token_s", "tenants"))
    names = ("running", "waiting", "prompt_tokens", "output_tokens", "preemptions")
    of_core = {name: getattr(CORE_STATS, name) for name in names}
    of_stats = {"streams": 2, "connections": 1, "accepted": 9, "refused": 4, "finished": 7}
    names = ("dtype", "device", "max_model_len", "marks_thinking", "marks_calls")
    of_model = {"model": "small-4", "sees": False} | {name: getattr(MODEL, name) for name in names}
    assert state == kept | own | unknown | of_core | of_stats | of_model


def test_a_server_that_loads_has_no_blocks_yet() -> None:
    state = told(CoreStats())
    assert (state.kv_used_share, state.kv_cached_share) == (0.0, 0.0)


def test_the_name_of_the_model_is_that_of_requests_unless_another_is_given() -> None:
    assert told().model_id == "mine"
    assert told(model_id="").model_id == "small-4"


def test_counters_of_cores_that_died_are_added_where_the_front_end_is_here() -> None:
    def body() -> PageState:
        frontend = front_end()
        for _ in range(2):
            frontend.core.step(StepOutput(deltas=[], stats=CORE_STATS))
            frontend.core._recovery.died()  # so that nothing of a search is asked of the core that is not there
            frontend.core.lost(committed=True)
            frontend.core.ready()
        frontend.core.step(StepOutput(deltas=[], stats=CORE_STATS))
        return told(frontend.core.stats, frontend)

    state = on_a_loop(body)
    assert (state.prompt_tokens, state.output_tokens, state.preemptions) == (300, 90, 15)
    assert (state.running, state.waiting) == (3, 2), "gauges are of the core that runs"


def test_latencies_and_tenants_are_the_front_ends() -> None:
    def body() -> PageState:
        frontend = front_end()
        tallies = frontend.observer.tenants
        frontend.observer.expect(["search"])
        for tenant, seconds in (("default", 0.3), ("default", 0.4), ("search", 0.6)):
            tallies[tenant].first_tokens.add(seconds)
        tallies["search"].count("stop")
        tallies["search"].count("overloaded")
        tallies["search"].prompt_tokens, tallies["search"].output_tokens = 7, 5
        frontend.core.pace.gaps.add(0.015, times=4)
        return told(frontend=frontend)

    state = on_a_loop(body)
    assert state.latency_bounds_s == [*BOUNDS_S]
    assert state.first_token_s is not None
    assert state.inter_token_s is not None
    counts = dict(zip(BOUNDS_S, state.first_token_s.counts, strict=False))
    assert (counts[0.5], counts[1.0], sum(state.first_token_s.counts)) == (2, 1, 3), "of all tenants together"
    assert state.first_token_s.p50 == pytest.approx(0.2 + 0.3 * 0.75)
    assert state.inter_token_s.p50 == pytest.approx(0.015)
    assert msgspec.to_builtins(state.tenants) == [
        {"name": "default", "requests": 0, "prompt_tokens": 0, "output_tokens": 0},
        {"name": "search", "requests": 2, "prompt_tokens": 7, "output_tokens": 5},
    ]


def test_gaps_of_the_last_step_count_too() -> None:
    def body() -> list[int]:
        now = [0.0]
        frontend = front_end(clock=lambda: now[0])
        streams = opened(frontend, 2)
        for _ in range(2):
            now[0] += 0.015
            step(frontend, streams)
        state = told(frontend=frontend)
        assert state.inter_token_s is not None
        return state.inter_token_s.counts

    assert sum(on_a_loop(body)) == 2


def test_percentiles_lie_in_the_bucket_where_they_belong() -> None:
    """Of random durations the estimate is in the bucket of the true percentile, and grows with the share."""
    source = random.Random(7)
    for _ in range(200):
        durations = sorted(source.lognormvariate(-4, 2) for _ in range(source.randint(1, 60)))
        histogram = Histogram()
        for duration in durations:
            histogram.add(duration)
        before = 0.0
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            true = durations[math.ceil(share * len(durations)) - 1]
            found = percentile(histogram.counts, share)
            assert found is not None
            bucket = [bound for bound in BOUNDS_S if bound >= true][:1]
            below = max((bound for bound in BOUNDS_S if bound < true), default=0.0)
            upper = bucket[0] if bucket else BOUNDS_S[-1]
            assert min(below, BOUNDS_S[-1]) <= found <= upper, (share, true)
            assert found >= before
            before = found


def test_of_no_durations_there_is_no_percentile() -> None:
    assert percentile(Histogram().counts, 0.5) is None
