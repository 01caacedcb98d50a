"""The concurrency of a throughput cell: searched for with forecasts, which take no time, and confirmed by loads."""

from __future__ import annotations

from collections.abc import Sequence

from cierzo.bench.headline.cells import LIMIT_S, Cell
from cierzo.bench.headline.figures import requests_for
from cierzo.bench.headline.search import Look, Point, best, confirm, search
from cierzo.bench.plan.forecast import forecast
from cierzo.bench.workload import Workload
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.device import Device


def estimates(config: EngineConfig, cell: Cell, most: int, device: Device) -> list[Point]:
    """Forecasts by concurrency, ascending. Raises NothingKeepsTheLimit."""
    return search(lambda concurrency: _estimate(config, cell, concurrency, device), most, LIMIT_S)


def confirmed(look: Look, forecasts: Sequence[Point], most: int) -> list[Point]:
    """Forecasts, and loads at the best of them and beside it, in their place."""
    measured = confirm(look, best(forecasts, LIMIT_S).concurrency, most, LIMIT_S)
    points = {point.concurrency: point for point in (*forecasts, *measured)}
    return [points[concurrency] for concurrency in sorted(points)]


def _estimate(config: EngineConfig, cell: Cell, concurrency: int, device: Device) -> Point:
    """By the roofline."""
    found = forecast(
        config,
        Workload(
            input_tokens=cell.input_tokens,
            output_tokens=cell.output_tokens,
            concurrency=concurrency,
            requests=requests_for(concurrency),
        ),
        device=device,
    )
    decoded_s = float(found.completion_s.p50 - found.time_to_first_token_s.p50)
    return Point(
        concurrency=concurrency,
        requests_per_s=float(found.requests_per_s),
        time_per_output_token_s=decoded_s / max(1, cell.output_tokens - 1),
        measured=False,
    )
