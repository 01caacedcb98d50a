"""Forecasts: requests a second, latencies, and what limits an engine on a device under a workload. No torch.

`batching.py` says which steps the workload comes to, engine/cost how long they take.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.bench.plan.batching import Batching, expand
from cierzo.bench.stats import Summary, summarise
from cierzo.bench.workload import TracedRequest, Workload, poisson_arrivals
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import FloatArray, StepModel, StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import ConfigError

FEWEST_CLOSED, FEWEST_OPEN, MOST_OPEN = 8, 256, 1 << 15  # requests of a forecast
LIMITS = ("memory", "arithmetic", "exchange", "overhead")
COUNTED = ("most_running", "most_waiting", "preemptions", "kv_room_reached", "max_running_reached")  # by Batching
LONGER = "a request of {:,} tokens, and max_model_len is {:,}"
MORE = "{:,} requests at once, and the queue takes {:,} (max_waiting, max_open_samples)"
GROWTH = 0.05  # seconds by which requests take longer, each second, from which on an engine does not keep up


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests between the S-th completion and the S-th last (S: a closed loop's concurrency, else a
    tenth of the requests), or of all where those two end in one step.

    time_to_first_token_s and completion_s count from arrival. running: sequences, on average over time, and the
    most. most_waiting: sequences that waited at once. keeps_up: whether requests end as fast as they come; a closed
    loop always does. steps, tokens: from the first step to the last. Shares of the time: operations that wait for
    memory, those that wait for arithmetic, exchanges between cards, overhead (launches, host); limit_share: what
    the steps would take at the device's rates. roof: of an operation, that which takes most of the time.
    distinct_experts: in a layer of a step, on average.
    """

    requests: int
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Summary
    inter_token_s: Summary
    completion_s: Summary
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
    roof: str
    distinct_experts: float
    bytes_per_step: float
    operations_per_step: float

    @property
    def limit(self) -> str:
        """The largest share of the time, in a word."""
        return max(LIMITS, key=lambda name: getattr(self, f"{name}_share"))


def forecast(
    config: EngineConfig, workload: Workload, *, device: Device | None = None, distinct: Distinct | None = None
) -> Forecast:
    """Forecast a workload. device: by default the one that `config` simulates. distinct: experts that so many
    tokens reach, by default as if chosen at random. Raises ConfigError for a workload that cannot run."""
    if (device := device or config.card) is None:
        raise ConfigError(f"a forecast for {config.device} needs its device", field="device", value=config.device)
    queue = min(config.scheduler.max_waiting, config.frontend.max_open_samples)
    for field, value, limit, said in (  # what the engine would refuse
        ("max_model_len", workload.longest_tokens, config.scheduler.max_model_len, LONGER),
        ("max_waiting", workload.concurrency or 0, queue, MORE),
    ):
        if value > limit:
            message = f"workload {workload}: {said.format(value, limit)}"
            raise ConfigError(message, field=field, limit=limit, value=value)
    if config.model.vision is None and any(one.image_tokens for one in workload.trace):
        told = f"workload {workload}: it has images, and the model takes none"
        raise ConfigError(told, field="image_tokens", limit="none", value="images")
    model = StepModel(config, device, distinct)
    if workload.rate is None or workload.requests is not None:
        return _forecast(config, requests_of(workload), workload.concurrency, model)
    count = FEWEST_OPEN
    while True:  # until the requests that run at once are few beside all
        load = requests_of(msgspec.structs.replace(workload, requests=count))
        # as if they came at the workload's rate, not at one drawn by chance
        factor = count / workload.rate / load[-1].arrival_s
        load = [msgspec.structs.replace(one, arrival_s=one.arrival_s * factor) for one in load]
        found = _forecast(config, load, None, model)
        if count >= MOST_OPEN or count >= 4 * found.most_running or not found.keeps_up:
            return found
        count *= 4


def requests_of(workload: Workload) -> Sequence[TracedRequest]:
    """The workload's requests, one by one; those of a closed loop come at no time of their own."""
    if workload.trace:
        return workload.trace
    count = workload.requests or max(FEWEST_CLOSED, 4 * (workload.concurrency or 0))
    arrivals = [0.0] * count if workload.rate is None else poisson_arrivals(count, workload.rate, workload.seed)
    lengths = {name: getattr(workload, name) for name in ("input_tokens", "output_tokens", "shared_tokens")}
    return [TracedRequest(arrival_s=at, **lengths) for at in arrivals]


def left_out(requests: int, concurrency: int | None) -> int:
    """Completions that a steady rate leaves out at either end."""
    return min(requests // 10 if concurrency is None else concurrency, (requests - 1) // 2)


def _forecast(
    config: EngineConfig, load: Sequence[TracedRequest], concurrency: int | None, model: StepModel
) -> Forecast:
    is_open = concurrency is None
    course = Batching(config, load, concurrency or 0, model).run()
    time = model.time(*expand(course.rows))
    seconds = time.total_s
    spans_s = seconds.copy()
    spans_s[list(course.idle_s)] += list(course.idle_s.values())
    # a step's number plus one is the index of its end; 0 is the start
    ends_s = np.concatenate([[0.0], np.cumsum(spans_s)])
    arrival_s = np.array([one.arrival_s for one in load]) if is_open else ends_s[course.arrival + 1]
    first_s, last_s = ends_s[course.first + 1], ends_s[course.last + 1]
    skipped = left_out(len(load), concurrency)
    order = np.argsort(last_s, kind="stable")
    if skipped and last_s[order[skipped - 1]] == last_s[order[-skipped - 1]]:
        skipped = 0  # they end in one step
    steady = order[skipped : len(order) - skipped]
    begin_s, end_s = float(last_s[order[skipped - 1]]) if skipped else 0.0, float(last_s[steady[-1]])
    rate = len(steady) / (end_s - begin_s)
    within = (ends_s[1:] > begin_s) & (ends_s[1:] <= end_s)
    totals = StepTotals().add(time, within)
    running = np.repeat([row.running for row in course.rows], [row.repeat for row in course.rows])
    took_s = last_s - arrival_s
    return Forecast(
        requests=len(load),
        requests_per_s=rate,
        output_tokens_per_s=rate * float(np.mean([load[index].output_tokens for index in steady])),
        time_to_first_token_s=summarise((first_s - arrival_s)[steady].tolist()),
        inter_token_s=_gaps(course, ends_s, steady),
        completion_s=summarise(took_s[steady].tolist()),
        running=float((running * seconds * within).sum()) / (end_s - begin_s),
        **{name: getattr(course, name) for name in COUNTED},
        keeps_up=not is_open or _keeps_up(took_s, arrival_s),
        steps=len(seconds),
        tokens=round(float(np.sum(time.tokens))),
        **{f"{part}_share": getattr(totals, f"{part}_s") / totals.total_s for part in (*LIMITS, "limit")},
        roof=totals.roof,
        distinct_experts=totals.distinct_experts / totals.steps,
        bytes_per_step=totals.num_bytes / totals.steps,
        operations_per_step=totals.operations / totals.steps,
    )


def _gaps(course: Batching, ends_s: FloatArray, steady: NDArray[np.int64]) -> Summary:
    """Times between one token and the next: a step's, once for each request that decodes in it, and the pauses of
    requests that were preempted."""
    pauses = np.array(course.pauses, np.int64).reshape(-1, 3)
    _, before, after = pauses[np.isin(pauses[:, 0], steady)].T
    changes = np.zeros(len(ends_s), np.int64)
    for steps, change in ((course.first[steady], 1), (before, -1), (after, 1), (course.last[steady], -1)):
        np.add.at(changes, steps + 1, change)  # of the requests that decode
    gaps = np.append(np.diff(ends_s), ends_s[after + 1] - ends_s[before + 1])
    weights = np.append(np.cumsum(changes)[:-1], np.ones(len(before), np.int64))
    if not weights.any():
        return Summary()
    percentiles = np.percentile(gaps, (50, 90, 99, 100), weights=weights, method="inverted_cdf").tolist()
    return Summary(int(weights.sum()), float(np.average(gaps, weights=weights)), *percentiles)


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
