"""What a cell's measurement is, and the campaign: a block for each profile of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cierzo.bench.campaign.loop import Block, Campaign
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.figures import Figure
from cierzo.bench.headline.search import Point
from cierzo.bench.latency import RequestSample
from cierzo.engine.expert_statistics import ExpertStatistics


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A cell of one subject: the figure, and how it came about.

    layout: how several cards were used; `others`: what else they could do, and why it lost or cannot be. points:
    those of the search for a concurrency; bounded_by: what kept it from being higher. kv_room_requests: how many
    requests of full length the KV cache holds. experts: those that tokens chose, where they were counted. samples:
    those of the load that `figure` describes.
    """

    figure: Figure
    layout: str = ""
    others: list[str] = []
    points: list[Point] = []
    bounded_by: str = ""
    kv_room_requests: int = 0
    experts: ExpertStatistics | None = None
    command: str = ""
    samples: list[RequestSample] = []


def value(cell: Cell, figure: Figure) -> float:
    """The figure that a cell is judged by: requests per second, or the median completion time."""
    return figure.requests_per_s if cell.is_throughput else figure.completion_s.p50


def told(cell: Cell, figure: Figure) -> str:
    """The figure that a cell is judged by, in words."""
    if cell.is_throughput:
        return f"{figure.requests_per_s:.4g} requests/s at {figure.concurrency:,}"
    return f"{figure.completion_s.p50:.4g} s"


class Headline(Campaign[Cell, Subject]):
    """A plan; Serving (serve.py) and Simulation (simulate.py) say where its engines run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def blocks(self) -> Sequence[Block[Cell, Subject]]:
        """A profile's cells, which one engine serves."""
        cells = self._plan.cells
        return [
            Block(profile, [cell for cell in cells if cell.profile == profile], self._plan.subjects)
            for profile in dict.fromkeys(cell.profile for cell in cells)
        ]

    def told(self, cell: Cell, result: Any) -> str:
        """The figure that the cell is judged by."""
        return told(cell, msgspec.convert(result, Measurement).figure)
