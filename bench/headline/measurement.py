"""A cell of a subject: the engine's settings for it, the concurrency that it is measured at, and its figures.

The concurrency is the one with the most requests per second at which the median time per output token keeps its
limit. Forecasts, which take no time, say where to look; loads decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.latency import LoadResult, steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.plan.forecast import forecast
from cierzo.bench.plan.search import highest
from cierzo.bench.stats import Summary, summarise
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.engine.kv_room import AUTO_KV_REQUEST_TOKENS

NEAR = 0.03  # as closely as a concurrency is looked for, relative to it
TRIES = 4  # loads, at most, to confirm what was found by forecasts


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """A step on average, in one engine: sequences in it, experts of a layer that had tokens (0 in a dense
    model), bytes and operations. limit_requests_per_s: of all replicas, at the device's full rates. roof: what
    limits most of the time."""

    running: float
    distinct_experts: float
    num_bytes: float
    operations: float
    limit_requests_per_s: float
    roof: str = "-"


class Point(msgspec.Struct, frozen=True):
    """A concurrency, of all engines, and what it gives; `measured`, or forecast. Seconds are medians."""

    concurrency: int
    requests_per_s: float
    time_per_output_token_s: float
    measured: bool


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A cell of one subject: a closed loop of `concurrency` clients in all, divided between `replicas` engines of
    equal load.

    requests_per_s: steady, of `steady_load`; plain: all requests over all the time. Latencies are those of the
    requests that end in the steady time where throughput is measured, of all where latency is. layout: how several
    cards were used; `others`: what else they could do, and why it lost or cannot be. points: those of the search
    for a concurrency; bounded_by: what kept it from being higher. kv_room_requests: how many requests of full
    length the KV cache holds. experts: those that tokens chose, where they were counted. samples: of each request
    when it was sent, when its first and its last token came, and how many did.
    """

    replicas: int = 1
    concurrency: int
    requests: int
    requests_per_s: float
    plain_requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Summary
    time_per_output_token_s: Summary
    inter_token_s: Summary
    completion_s: Summary
    errors: dict[str, int] = {}
    steps: Steps | None = None
    layout: str = ""
    others: list[str] = []
    points: list[Point] = []
    bounded_by: str = ""
    kv_room_requests: int = 0
    experts: ExpertStatistics | None = None
    command: str = ""
    samples: list[tuple[float, float, float, int]] = []

    def value(self, cell: Cell) -> float:
        """The figure that a cell is judged by: requests per second, or the median completion time."""
        return self.requests_per_s if cell.is_throughput else self.completion_s.p50

    def told(self, cell: Cell) -> str:
        """The figure that a cell is judged by, in words."""
        told = f"{self.value(cell):.4g}"
        return f"{told} requests/s at {self.concurrency:,}" if cell.is_throughput else f"{told} s"


def closed_loop(cell: Cell, concurrency: int, seed: int) -> LoadSettings:
    """The load of a cell at a concurrency: of as many requests that their middle third can be looked at."""
    return LoadSettings(
        rpc="",
        requests=max(3 * concurrency, 4),
        concurrency=concurrency,
        input_tokens=cell.input_tokens,
        output_tokens=cell.output_tokens,
        seed=seed,
    )


def measured(
    cell: Cell, result: LoadResult, concurrency: int, replicas: int = 1, totals: StepTotals | None = None
) -> Measurement:
    """The figures of so many engines, each under such a load of so many clients. totals: of the steps in the steady
    time of one."""
    settled = steady_load(result, concurrency)
    looked_at = settled if cell.is_throughput else result
    steps = None
    if totals is not None:
        steps = Steps(
            running=totals.rows / totals.steps,
            distinct_experts=totals.distinct_experts / totals.steps,
            num_bytes=totals.num_bytes / totals.steps,
            operations=totals.operations / totals.steps,
            limit_requests_per_s=replicas * settled.answered / totals.limit_s,
            roof=totals.roof,
        )
    return Measurement(
        replicas=replicas,
        concurrency=replicas * concurrency,
        requests=replicas * len(result.samples),
        requests_per_s=replicas * settled.requests_per_s,
        plain_requests_per_s=replicas * result.requests_per_s,
        output_tokens_per_s=replicas * settled.output_tokens_per_s,
        time_to_first_token_s=looked_at.time_to_first_token_s,
        time_per_output_token_s=summarise(
            [
                (one.delta_s[-1] - one.delta_s[0]) / (one.num_tokens - 1)
                for one in looked_at.samples
                if one.error is None and one.num_tokens > 1
            ]
        ),
        inter_token_s=looked_at.inter_token_s,
        completion_s=looked_at.end_to_end_s,
        errors=result.errors,
        steps=steps,
        samples=[
            (one.start_s, one.delta_s[0], one.delta_s[-1], one.num_tokens) for one in result.samples if one.delta_s
        ],
    )


Load = Callable[[int, int], Measurement]  # so many clients of each of so many engines
Look = Callable[[int], Point]  # at so many clients of one engine
Points = Mapping[int, Point]


def engine_settings(model: str, device: str, subject: Subject, cells: Sequence[Cell]) -> dict[str, object]:
    """Options for cells of one profile; what stays open is the profile's. Raises ConfigError where it does not fit.

    max_running is at least the largest concurrency, and large enough for the engine to set aside a KV cache that
    holds that many: it plans for max_running requests of a usual length.
    """
    settings: dict[str, object] = {
        **msgspec.structs.asdict(subject),
        "model": model,
        "device": device,
        "profile": cells[0].profile,
        "max_model_len": max(cell.tokens for cell in cells),
    }
    usual_tokens = min(max(cell.tokens for cell in cells), AUTO_KV_REQUEST_TOKENS)
    clients = max(-(-(cell.concurrency or 0) * cell.tokens // usual_tokens) for cell in cells)
    limits = resolved(settings).scheduler
    if clients > limits.max_running:
        settings["max_running"] = min(clients, limits.budget_tokens)
    return settings


def resolved(settings: dict[str, object]) -> EngineConfig:
    """The configuration that the engine makes of settings. Raises ConfigError."""
    return resolve(msgspec.convert(settings, EngineOptions))


def kv_room(config: EngineConfig, cell: Cell) -> int:
    """Requests of full length that the KV cache holds; clients beyond them wait, or preempt each other."""
    return config.cache.num_blocks // -(-cell.tokens // config.cache.block_tokens)


def at_best(cell: Cell, config: EngineConfig, device: Device | None, load: Load, replicas: int = 1) -> Measurement:
    """The cell at its concurrency, or where it has none, at the best one, on so many engines of this configuration.

    device: for forecasts. Raises ConfigError.
    """
    fit, loads = kv_room(config, cell), dict[int, Measurement]()
    if cell.concurrency is not None:
        engines = min(replicas, cell.concurrency)  # those that have clients
        found = load(-(-cell.concurrency // engines), engines)
        return msgspec.structs.replace(found, kv_room_requests=replicas * fit)

    def loaded(clients: int) -> Point:
        found = loads[clients] = load(clients, replicas)
        rate, token_s = found.requests_per_s, found.time_per_output_token_s.p50
        return Point(found.concurrency, rate, token_s, measured=True)

    def forecasted(clients: int) -> Point:
        found = forecast(config, closed_loop(cell, clients, 0), device=device)
        decoded_s = float(found.completion_s.p50 - found.time_to_first_token_s.p50)
        token_s = decoded_s / max(1, cell.output_tokens - 1)
        return Point(replicas * clients, replicas * float(found.requests_per_s), token_s, measured=False)

    most, why = min((fit, "KV room"), (config.scheduler.max_running, "max_running"))
    forecasts = search(forecasted, most)
    points = confirm(loaded, best(forecasts), most)
    chosen = best(points)
    return msgspec.structs.replace(
        loads[chosen],
        points=[point for _, point in sorted({**forecasts, **points}.items())],
        bounded_by=why if chosen == most else bound(points, chosen),
        kv_room_requests=replicas * fit,
    )


def keeps_limit(point: Point) -> bool:
    """Whether clients get their tokens quickly enough."""
    return point.time_per_output_token_s <= LIMIT_S


def best(points: Points) -> int:
    """The clients with the most requests per second that keep the limit. Raises ConfigError."""
    kept = {clients: point.requests_per_s for clients, point in points.items() if keeps_limit(point)}
    if not kept:
        quickest_ms = min(point.time_per_output_token_s for point in points.values()) * 1e3
        limit = f"{LIMIT_S * 1e3:.0f} ms per output token, the quickest takes {quickest_ms:.1f}"
        raise ConfigError(f"none of {len(points)} loads keeps {limit}", field="concurrency", limit=LIMIT_S)
    return max(kept, key=kept.__getitem__)


def search(look: Look, most: int) -> Points:
    """Points by clients: doubled from 1 on until `most` or the limit, then between the last two."""
    found: dict[int, Point] = {}

    def keeps(clients: float) -> bool:
        found[int(clients)] = look(int(clients))
        return keeps_limit(found[int(clients)])

    highest(keeps, 1, most, 1 + NEAR)
    return found


def confirm(look: Look, start: int, most: int) -> Points:
    """Measure at `start`, which forecasts suggest, and beside it: at fewer clients until the limit is kept, else at
    more while that gives more. In the order in which they were measured."""
    found: dict[int, Point] = {}
    size = start
    while len(found) < TRIES and size not in found:
        point = found[size] = look(size)
        if not any(map(keeps_limit, found.values())):
            size = max(1, int(size * min(1 - NEAR, LIMIT_S / point.time_per_output_token_s)))
        elif size == best(found):
            size = min(most, max(size + 1, int(size * (1 + NEAR))))
    return found


def bound(points: Points, chosen: int) -> str:
    """The reason why there are no more clients than `chosen`, though there is room."""
    above = [point for clients, point in points.items() if clients > chosen]
    if any(map(keeps_limit, above)):
        return "more clients are answered no quicker"
    return f"{LIMIT_S * 1e3:.0f} ms per output token" if above else "not looked further"
