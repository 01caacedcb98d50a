"""Forecasts: requests a second, latencies, and what limits an engine on a device under a workload. No torch.

`batching.py` says which steps the workload comes to, engine/cost how long they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from cierzo.bench.plan.batching import Batching
from cierzo.bench.plan.course import Course, Load, Steps, expand
from cierzo.bench.workload import Workload, poisson_arrivals
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.device import Device, Number
from cierzo.engine.cost.step_model import FloatArray, StepModel
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import ConfigError

FEWEST_CLOSED, FEWEST_OPEN, MOST_OPEN = 8, 256, 1 << 15  # requests of a forecast
GROWTH = 0.05  # seconds by which requests take longer, each second, from which on an engine does not keep up


class Percentiles(msgspec.Struct, frozen=True):
    """Mean and percentiles of a latency; seconds."""

    mean: float
    p50: float
    p99: float


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests between the S-th completion and the S-th last (S: a closed loop's concurrency, else a
    tenth of the requests), so that the ramp at the start and the tail at the end are left out.

    time_to_first_token_s and completion_s count from arrival. running: sequences, on average over time, and the
    most. most_waiting: sequences that waited at once. keeps_up: whether requests end as fast as they come; a closed
    loop always does. steps, tokens: from the first step to the last. Shares of the time: operations that wait for
    memory, those that wait for arithmetic, exchanges between cards, overhead (launches, host); limit_share: what
    the steps would take at the device's rates. distinct_experts: in a layer of a step, on average.
    """

    requests: int
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Percentiles
    inter_token_s: Percentiles
    completion_s: Percentiles
    running: float
    most_running: int
    most_waiting: int
    preemptions: int
    kv_room_reached: bool
    max_running_reached: bool
    keeps_up: bool
    steps: int
    tokens: int
    memory_share: float
    arithmetic_share: float
    exchange_share: float
    overhead_share: float
    limit_share: float
    distinct_experts: float
    bytes_per_step: float
    operations_per_step: float

    @property
    def limit(self) -> str:
        """The largest share of the time, in a word."""
        shares = {name: getattr(self, f"{name}_share") for name in ("memory", "arithmetic", "exchange", "overhead")}
        return max(shares, key=shares.__getitem__)


def forecast(
    config: EngineConfig, workload: Workload, *, device: Device | None = None, distinct: Distinct | None = None
) -> Forecast:
    """Forecast a workload. device: by default the one that `config` simulates. distinct: experts that so many
    tokens reach, by default as if chosen at random. Raises ConfigError for a workload that cannot run."""
    device = device or config.card
    if device is None:
        raise ConfigError(f"a forecast for {config.device} needs its device", field="device", value=config.device)
    _require(config, workload)
    model = StepModel(config, device, distinct)
    if workload.rate is None or workload.requests is not None:
        return _forecast(config, load_of(workload), workload.concurrency, model)
    requests = FEWEST_OPEN
    while True:  # until the requests that run at once are few beside all
        load = _evened(load_of(msgspec.structs.replace(workload, requests=requests)), requests / workload.rate)
        found = _forecast(config, load, None, model)
        if requests >= MOST_OPEN or requests >= 4 * found.most_running or not found.keeps_up:
            return found
        requests *= 4


def load_of(workload: Workload) -> Load:
    """The workload's requests, one by one."""
    if workload.trace:
        names = ("input_tokens", "output_tokens", "shared_tokens", "arrival_s")
        columns: dict[str, Any] = {name: [getattr(one, name) for one in workload.trace] for name in names}
        return Load(**columns)
    clients, rate = workload.concurrency or 0, workload.rate
    count = workload.requests or max(FEWEST_CLOSED, 4 * clients)
    arrival_s = None if rate is None else poisson_arrivals(count, rate, workload.seed)
    return Load(
        input_tokens=[workload.input_tokens] * count,
        output_tokens=[workload.output_tokens] * count,
        shared_tokens=[workload.shared_tokens] * count,
        arrival_s=arrival_s,
        clients=clients,
    )


def _evened(load: Load, seconds: float) -> Load:
    """Stretch the arrivals to `seconds`, so that they come at the workload's rate, not at one drawn by chance."""
    assert load.arrival_s is not None
    factor = seconds / load.arrival_s[-1]
    return replace(load, arrival_s=[at * factor for at in load.arrival_s])


def left_out(requests: int, concurrency: int | None) -> int:
    """Completions that a steady rate leaves out at either end."""
    return min(requests // 10 if concurrency is None else concurrency, (requests - 1) // 2)


def _require(config: EngineConfig, workload: Workload) -> None:
    """Raise ConfigError, with the numbers, for requests that the engine would refuse."""
    longest, limit = workload.longest_tokens, config.scheduler.max_model_len
    if longest > limit:
        raise ConfigError(
            f"workload {workload}: a request of {longest:,} tokens, and max_model_len is {limit:,}",
            field="max_model_len",
            limit=limit,
            value=longest,
        )
    clients, queue = workload.concurrency or 0, min(config.scheduler.max_waiting, config.frontend.max_open_samples)
    if clients > queue:
        raise ConfigError(
            f"workload {workload}: {clients:,} requests at once, and the queue takes {queue:,} "
            "(max_waiting, max_open_samples)",
            field="max_waiting",
            limit=queue,
            value=clients,
        )


def _forecast(config: EngineConfig, load: Load, concurrency: int | None, model: StepModel) -> Forecast:
    def price(steps: Steps) -> FloatArray:
        return np.atleast_1d(model.time(steps.shape, steps.rows).total_s)

    batching = Batching(config, load, None if load.arrival_s is None else price)
    course = batching.run()
    steps = expand(batching.rows)
    time = model.time(steps.shape, steps.rows)
    seconds = np.atleast_1d(time.total_s)
    idle_s = np.zeros_like(seconds)
    for step, pause_s in course.idle_s.items():
        idle_s[step] = pause_s
    # a step's number plus one is the index of its end; 0 is the start
    ends_s = np.concatenate([[0.0], np.cumsum(seconds + idle_s)])
    arrival_s = ends_s[course.arrival + 1] if load.arrival_s is None else np.array(load.arrival_s)
    first_s, last_s = ends_s[course.first + 1], ends_s[course.last + 1]
    skipped = left_out(len(last_s), concurrency)
    order = np.argsort(last_s, kind="stable")
    steady = order[skipped : len(order) - skipped]
    begin_s, end_s = float(last_s[order[skipped - 1]]) if skipped else 0.0, float(last_s[steady[-1]])
    rate = len(steady) / (end_s - begin_s)
    within = (ends_s[1:] > begin_s) & (ends_s[1:] <= end_s)
    total_s, num_steps = float((seconds * within).sum()), int(within.sum())

    def total(part: Number) -> float:
        return float((np.broadcast_to(part, seconds.shape) * within).sum())

    took_s = last_s - arrival_s
    return Forecast(
        requests=len(last_s),
        requests_per_s=rate,
        output_tokens_per_s=rate * float(np.mean([load.output_tokens[index] for index in steady])),
        time_to_first_token_s=_percentiles((first_s - arrival_s)[steady]),
        inter_token_s=_gaps(course, ends_s, set(steady.tolist())),
        completion_s=_percentiles(took_s[steady]),
        running=float((steps.running * seconds * within).sum()) / (end_s - begin_s),
        most_running=course.most_running,
        most_waiting=course.most_waiting,
        preemptions=course.preemptions,
        kv_room_reached=course.kv_room_reached,
        max_running_reached=course.max_running_reached,
        keeps_up=load.arrival_s is None or _keeps_up(took_s, arrival_s),
        steps=len(seconds),
        tokens=round(float(np.sum(steps.shape.tokens))),
        memory_share=total(time.memory_s) / total_s,
        arithmetic_share=total(time.arithmetic_s) / total_s,
        exchange_share=total(time.exchange_s) / total_s,
        overhead_share=total(time.overhead_s) / total_s,
        limit_share=total(time.limit_s) / total_s,
        distinct_experts=0.0 if model.distinct is None else total(model.distinct(steps.shape.tokens)) / num_steps,
        bytes_per_step=total(time.num_bytes) / num_steps,
        operations_per_step=total(time.operations) / num_steps,
    )


def _percentiles(values: FloatArray) -> Percentiles:
    return Percentiles(float(values.mean()), *(float(value) for value in np.percentile(values, (50, 99))))


def _gaps(course: Course, ends_s: FloatArray, steady: set[int]) -> Percentiles:
    """Times between one token and the next: a step's, once for each request that decodes in it, and the pauses of
    requests that were preempted."""
    changes = np.zeros(len(ends_s), np.int64)
    for index, first, last in course.runs:
        if index in steady:
            changes[first] += 1
            changes[last + 1] -= 1
    gaps, weights = np.diff(ends_s), np.cumsum(changes)[:-1]
    pauses = [ends_s[after + 1] - ends_s[before + 1] for index, before, after in course.pauses if index in steady]
    gaps, weights = np.append(gaps, pauses), np.append(weights, np.ones(len(pauses), np.int64))
    order = np.argsort(gaps)
    reached = np.cumsum(weights[order])
    if not reached[-1]:
        return Percentiles(0.0, 0.0, 0.0)
    mean = float((gaps * weights).sum() / reached[-1])
    ranks = np.ceil(reached[-1] * np.array([0.5, 0.99]))
    return Percentiles(mean, *(float(gap) for gap in gaps[order][np.searchsorted(reached, ranks)]))


def _keeps_up(took_s: FloatArray, arrival_s: FloatArray) -> bool:
    """Whether requests of the last quarter take no longer than those of the quarter before; where a queue grows,
    they take longer by a share of the time that has passed between them."""
    quarter = len(took_s) // 4
    if quarter < 2:
        return True
    before, after = slice(-2 * quarter, -quarter), slice(-quarter, None)
    grown_s = float(np.mean(took_s[after]) - np.mean(took_s[before]))
    passed_s = float(np.mean(arrival_s[after]) - np.mean(arrival_s[before]))
    return grown_s <= GROWTH * passed_s
