"""State of the server as the page at / shows it: one JSON object, made when somebody asks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import msgspec

from cierzo.engine.frontend.core_side import added
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.observe.tallies import BOUNDS_S, TenantTally
from cierzo.engine.messages import CoreStats, Health, ModelInfo, Stats


class Latency(msgspec.Struct, frozen=True):
    """Percentiles of a duration since the start, in seconds, None before there was one; and how many durations fell
    into each bucket, of which the page makes percentiles of late."""

    p50: float | None
    p90: float | None
    p99: float | None
    counts: list[int]


class TenantSums(msgspec.Struct, frozen=True):
    """Requests of a tenant that have ended, refused ones included, and their tokens."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int


class PageState(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges, counters since the start, and what the chat box must know of the model.

    model_id: the name by which requests ask for the model. kv_used_share, kv_cached_share: parts of the KV cache
    that sequences hold, and that hold prefixes which may be found. prompt_tokens, output_tokens, preemptions: of
    the core, so they fall when one dies, unless the front end is here to add up. latency_bounds_s: upper bounds of
    the buckets of both latencies. All that has a default is None where only a client of the server asks.
    """

    model: str
    model_id: str
    version: str
    device: str
    dtype: str
    max_model_len: int
    state: str
    notes: list[str]
    uptime_s: float
    running: int
    waiting: int
    streams: int
    connections: int
    kv_used_share: float
    kv_cached_share: float
    prompt_tokens: int
    output_tokens: int
    accepted: int
    refused: int
    finished: int
    preemptions: int
    restarts: int
    efforts: list[str]
    marks_thinking: bool
    marks_calls: bool
    sees: bool
    latency_bounds_s: list[float] | None = None
    first_token_s: Latency | None = None
    inter_token_s: Latency | None = None
    tenants: list[TenantSums] | None = None


def state_of(
    health: Health,
    stats: Stats,
    model: ModelInfo,
    *,
    version: str,
    model_id: str = "",
    frontend: Frontend | None = None,
) -> PageState:
    """The state, of what any client is told (with the right "stats"); and of the front end itself, where that is in
    this process. model_id: the name in requests, where it is not the model's own."""
    core = stats.core
    more: dict[str, Any] = {}
    if frontend is not None:
        core = _with_counters(core, added(frontend.core.past, frontend.core.stats))
        more = _of_frontend(frontend)
    num_blocks = max(1, core.total_blocks)
    return PageState(
        model=model.name,
        model_id=model_id or model.name,
        version=version,
        device=model.device,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        state=health.state,
        notes=health.notes,
        uptime_s=health.uptime_s,
        running=core.running,
        waiting=core.waiting,
        streams=stats.streams,
        connections=stats.connections,
        kv_used_share=(core.total_blocks - core.free_blocks) / num_blocks,
        kv_cached_share=core.cached_blocks / num_blocks,
        prompt_tokens=core.prompt_tokens,
        output_tokens=core.output_tokens,
        accepted=stats.accepted,
        refused=stats.refused,
        finished=stats.finished,
        preemptions=core.preemptions,
        restarts=stats.core_restarts,
        efforts=model.reasoning_efforts,
        marks_thinking=model.marks_thinking,
        marks_calls=model.marks_calls,
        sees=model.vision is not None,
        **more,
    )


def percentile(counts: Sequence[int], share: float) -> float | None:
    """The duration that `share` of all stay below, in seconds: the place in its bucket is taken as even. Durations
    beyond all bounds count as the last bound. None if there is none."""
    total = sum(counts)
    if not total:
        return None
    rank, below_s, before = share * total, 0.0, 0
    for count, bound_s, upto in zip(counts, BOUNDS_S, accumulate(counts), strict=False):
        if upto >= rank and count:
            return below_s + (bound_s - below_s) * (rank - before) / count
        below_s, before = bound_s, upto
    return BOUNDS_S[-1]


def _of_frontend(frontend: Frontend) -> dict[str, Any]:
    frontend.core.pace.enter()  # the gaps of the last step count too
    tenants = frontend.observer.tenants
    return {
        "latency_bounds_s": [*BOUNDS_S],
        "first_token_s": _latency(tally.first_tokens.counts for tally in tenants.values()),
        "inter_token_s": _latency([frontend.core.pace.gaps.counts]),
        "tenants": [_sums(name, tally) for name, tally in tenants.items()],
    }


def _latency(columns: Iterable[Sequence[int]]) -> Latency:
    counts = [sum(bucket) for bucket in zip(*columns, strict=True)]
    return Latency(percentile(counts, 0.5), percentile(counts, 0.9), percentile(counts, 0.99), counts)


def _sums(name: str, tally: TenantTally) -> TenantSums:
    return TenantSums(name, sum(tally.ends.values()), tally.prompt_tokens, tally.output_tokens)


def _with_counters(core: CoreStats, counters: CoreStats) -> CoreStats:
    """The gauges of `core`, with the counters of all cores."""
    names = ("prompt_tokens", "output_tokens", "preemptions")
    return msgspec.structs.replace(core, **{name: getattr(counters, name) for name in names})
