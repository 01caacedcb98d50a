"""The concurrency of a throughput cell: searched for with forecasts, which take no time, and confirmed by loads."""

from __future__ import annotations

from cierzo.bench.headline.cells import LIMIT_S, Cell
from cierzo.bench.headline.figures import requests_for
from cierzo.bench.headline.search import Look, Point, best, confirm, search
from cierzo.engine.config import EngineConfig
from cierzo.engine.roofline.device import Device
from cierzo.engine.roofline.forecast import forecast
from cierzo.engine.roofline.workload import Workload


def find(config: EngineConfig, cell: Cell, look: Look, most: int, device: Device | None) -> list[Point]:
    """Points by concurrency, ascending. device: by default the one that is simulated.

    Without a device to forecast on, every point is a load. Raises NothingKeepsTheLimit.
    """
    device = device or config.card
    if device is None:
        return search(look, most, LIMIT_S)
    estimates = search(lambda concurrency: estimate(config, cell, concurrency, device), most, LIMIT_S)
    measured = confirm(look, best(estimates, LIMIT_S).concurrency, most, LIMIT_S)
    points = {point.concurrency: point for point in (*estimates, *measured)}
    return [points[concurrency] for concurrency in sorted(points)]


def estimate(config: EngineConfig, cell: Cell, concurrency: int, device: Device) -> Point:
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
