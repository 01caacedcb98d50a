"""An engine's settings for a cell, and the cell's concurrency: the one with the most requests per second at which
the median time per output token keeps its limit. Forecasts, which take no time, say where to look; loads decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.headline.measurement import Measurement, Point, closed_loop
from cierzo.bench.plan.forecast import forecast
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device
from cierzo.engine.errors import ConfigError
from cierzo.engine.kv_room import AUTO_KV_REQUEST_TOKENS

NEAR = 0.03  # as closely as a concurrency is looked for, relative to it
TRIES = 4  # loads, at most, to confirm what was found by forecasts
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
    low, high, size = 0, math.inf, 1
    while low < most and high - low > max(1.0, NEAR * low):
        found[size] = look(size)
        low, high = (size, high) if keeps_limit(found[size]) else (low, size)
        size = min(2 * low, most) if high == math.inf else (low + int(high)) // 2
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
