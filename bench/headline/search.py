"""A cell's concurrency: the one with the most requests per second at which the median time per output token keeps
its limit. Forecasts, which take no time, say where to look; loads at the best of them and beside it decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell
from cierzo.bench.headline.measurement import Measurement, Point, closed_loop, of_all
from cierzo.bench.headline.settings import Room, room
from cierzo.bench.plan.forecast import forecast
from cierzo.bench.workload import Workload
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.device import Device

NEAR = 0.03  # as closely as a concurrency is looked for, relative to it
TRIES = 4  # loads, at most, to confirm what was found by forecasts
Look = Callable[[int], Point]


class NothingKeepsTheLimit(Exception):
    """Even a single client waits too long for each token."""


def at_best(
    cell: Cell, config: EngineConfig, device: Device | None, load: Callable[[int], Measurement], replicas: int = 1
) -> Measurement:
    """The cell at its concurrency, or where it has none, at the best one, on so many engines of this configuration.

    load: so many clients of one engine. device: for forecasts. Raises NothingKeepsTheLimit.
    """
    space = room(config, cell)
    if cell.concurrency is not None:
        engines = min(replicas, cell.concurrency)  # those that have clients
        found = load(-(-cell.concurrency // engines))
    else:
        engines, loads = replicas, {}

        def look(concurrency: int) -> Point:
            one = loads[concurrency] = load(concurrency)
            rate, token_s = one.requests_per_s, one.time_per_output_token_s.p50
            return Point(
                concurrency=concurrency, requests_per_s=rate, time_per_output_token_s=token_s, measured=True
            )

        forecasts = search(forecasts_of(config, cell, device), space.most)
        points = confirm(look, best(forecasts).concurrency, space.most)
        chosen = best(points).concurrency
        merged = {point.concurrency: point for point in (*forecasts, *points)}
        found = msgspec.structs.replace(
            loads[chosen],
            points=[merged[concurrency] for concurrency in sorted(merged)],
            bounded_by=bound(points, chosen, space),
        )
    return msgspec.structs.replace(of_all(found, engines), kv_room_requests=replicas * space.fit)


def keeps_limit(point: Point) -> bool:
    """Whether clients get their tokens quickly enough."""
    return point.time_per_output_token_s <= LIMIT_S


def best(points: Sequence[Point]) -> Point:
    """The point with the most requests per second among those that keep the limit. Raises NothingKeepsTheLimit."""
    kept = [point for point in points if keeps_limit(point)]
    if not kept:
        raise NothingKeepsTheLimit(
            f"none of {len(points)} loads keeps {LIMIT_S * 1e3:.0f} ms per output token, "
            f"the quickest takes {min(point.time_per_output_token_s for point in points) * 1e3:.1f}"
        )
    return max(kept, key=lambda point: point.requests_per_s)


def search(look: Look, most: int) -> list[Point]:
    """Points by concurrency, ascending: doubled from 1 on until `most` or the limit, then between the last two."""
    found: dict[int, Point] = {}
    low, high, size = 0, math.inf, 1
    while low < most and high - low > max(1.0, NEAR * low):
        found[size] = look(size)
        low, high = (size, high) if keeps_limit(found[size]) else (low, size)
        size = min(2 * low, most) if high == math.inf else (low + int(high)) // 2
    return [found[concurrency] for concurrency in sorted(found)]


def confirm(look: Look, start: int, most: int) -> list[Point]:
    """Measure at `start`, which forecasts suggest, and beside it: at fewer clients until the limit is kept, else at
    more while that gives more. Points in the order in which they were measured."""
    found: list[Point] = []
    size = start
    while len(found) < TRIES and all(size != point.concurrency for point in found):
        found.append(look(size))
        point = found[-1]
        if not any(map(keeps_limit, found)):
            size = max(1, int(size * min(1 - NEAR, LIMIT_S / point.time_per_output_token_s)))
        elif point is best(found):
            size = min(most, max(size + 1, int(size * (1 + NEAR))))
        else:
            break
    return found


def bound(points: Sequence[Point], chosen: int, space: Room) -> str:
    """The reason why the concurrency is not higher than `chosen`."""
    above = [point for point in points if point.concurrency > chosen]
    if any(map(keeps_limit, above)):
        return "more clients are answered no quicker"
    if above:
        return f"{LIMIT_S * 1e3:.0f} ms per output token"
    return space.why if chosen == space.most else "not looked further"


def forecasts_of(config: EngineConfig, cell: Cell, device: Device | None) -> Look:
    """Forecasts by concurrency."""

    def look(concurrency: int) -> Point:
        workload = Workload(
            input_tokens=cell.input_tokens,
            output_tokens=cell.output_tokens,
            concurrency=concurrency,
            requests=closed_loop(cell, concurrency, 0).requests,
        )
        found = forecast(config, workload, device=device)
        decoded_s = float(found.completion_s.p50 - found.time_to_first_token_s.p50)
        return Point(
            concurrency=concurrency,
            requests_per_s=float(found.requests_per_s),
            time_per_output_token_s=decoded_s / max(1, cell.output_tokens - 1),
            measured=False,
        )

    return look
