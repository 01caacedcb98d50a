"""How many clients give the most requests per second while the median time per output token keeps its limit.

Forecasts, which take no time, say where to look; loads at the best of them and beside it confirm it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell
from cierzo.bench.headline.figures import requests_for
from cierzo.bench.headline.settings import Room
from cierzo.bench.plan.forecast import forecast
from cierzo.bench.workload import Workload
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.device import Device

NEAR = 0.03  # as closely as a concurrency is looked for, relative to it
TRIES = 4  # further loads, at most, to confirm what was found by estimates


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A concurrency and what it gives; `measured`, or estimated. Seconds are medians."""

    concurrency: int
    requests_per_s: float
    time_per_output_token_s: float
    measured: bool


Look = Callable[[int], Point]


class NothingKeepsTheLimit(Exception):
    """One client alone waits too long for each token."""


def search(look: Look, most: int, limit_s: float) -> list[Point]:
    """Points by concurrency, ascending: doubled from 1 on until `most` or the limit, then between the last two.

    Raises NothingKeepsTheLimit.
    """
    found: dict[int, Point] = {}
    low, high = 0, 1
    while True:
        found[high] = look(high)
        if found[high].time_per_output_token_s > limit_s:
            break
        low = high
        if high == most:
            break
        high = min(2 * high, most)
    if low == 0:
        raise NothingKeepsTheLimit(
            f"one client alone gets a token each {found[1].time_per_output_token_s * 1e3:.1f} ms, "
            f"the limit is {limit_s * 1e3:.0f}"
        )
    while high - low > max(1.0, NEAR * low):
        middle = (low + high) // 2
        found[middle] = look(middle)
        if found[middle].time_per_output_token_s > limit_s:
            high = middle
        else:
            low = middle
    return [found[concurrency] for concurrency in sorted(found)]


def best(points: Sequence[Point], limit_s: float) -> Point:
    """The point with the most requests per second among those that keep the limit. Raises NothingKeepsTheLimit."""
    kept = [point for point in points if point.time_per_output_token_s <= limit_s]
    if not kept:
        raise NothingKeepsTheLimit(f"none of {len(points)} loads keeps {limit_s * 1e3:.0f} ms per output token")
    return max(kept, key=lambda point: point.requests_per_s)


def confirm(look: Look, start: int, most: int, limit_s: float) -> list[Point]:
    """Measure at `start`, which estimates suggest, and beside it: at fewer clients until the limit is kept, else at
    more while that gives more. Points in the order in which they were measured."""
    found = [look(start)]
    while found[-1].time_per_output_token_s > limit_s and len(found) < TRIES and found[-1].concurrency > 1:
        point = found[-1]
        shrunk = int(point.concurrency * min(1 - NEAR, limit_s / point.time_per_output_token_s))
        found.append(look(max(1, shrunk)))
    while len(found) < TRIES and found[-1] is best_or_none(found, limit_s):
        point = found[-1]
        grown = min(most, max(point.concurrency + 1, int(point.concurrency * (1 + NEAR))))
        if any(grown == other.concurrency for other in found):
            break
        found.append(look(grown))
    return found


def best_or_none(points: Sequence[Point], limit_s: float) -> Point | None:
    """The same as `best`, or None."""
    try:
        return best(points, limit_s)
    except NothingKeepsTheLimit:
        return None


def bound(points: Sequence[Point], chosen: int, space: Room, limit_s: float) -> str:
    """The reason why the concurrency is not higher than `chosen`."""
    above = [point for point in points if point.concurrency > chosen]
    if any(point.time_per_output_token_s <= limit_s for point in above):
        return "more clients are answered no quicker"
    if above:
        return f"{limit_s * 1e3:.0f} ms per output token"
    return space.why if chosen == space.most else "not looked further"


class Choice(msgspec.Struct, frozen=True):
    """The concurrency that a cell is measured at, the points that led there, and what kept it from being higher."""

    concurrency: int
    points: list[Point] = []
    bounded_by: str = ""


def choose(look: Look, forecasts: Sequence[Point] | None, space: Room) -> Choice:
    """The best concurrency by loads: those that the forecasts suggest, or without any a search by loads alone.

    Raises NothingKeepsTheLimit.
    """
    if forecasts is None:
        points = search(look, space.most, LIMIT_S)
    else:
        loads = confirm(look, best(forecasts, LIMIT_S).concurrency, space.most, LIMIT_S)
        merged = {point.concurrency: point for point in (*forecasts, *loads)}
        points = [merged[concurrency] for concurrency in sorted(merged)]
    measured = [point for point in points if point.measured]
    chosen = best(measured, LIMIT_S).concurrency
    return Choice(chosen, points, bound(measured, chosen, space, LIMIT_S))


def estimates(config: EngineConfig, cell: Cell, most: int, device: Device) -> list[Point]:
    """Forecasts by concurrency, ascending. Raises NothingKeepsTheLimit."""

    def look(concurrency: int) -> Point:
        workload = Workload(
            input_tokens=cell.input_tokens,
            output_tokens=cell.output_tokens,
            concurrency=concurrency,
            requests=requests_for(concurrency),
        )
        found = forecast(config, workload, device=device)
        decoded_s = float(found.completion_s.p50 - found.time_to_first_token_s.p50)
        return Point(
            concurrency=concurrency,
            requests_per_s=float(found.requests_per_s),
            time_per_output_token_s=decoded_s / max(1, cell.output_tokens - 1),
            measured=False,
        )

    return search(look, most, LIMIT_S)
