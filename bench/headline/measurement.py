"""The measurement of a cell, from what its clients saw, and the campaign: a block for each profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cierzo.bench.campaign.loop import Block, Campaign
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.latency import LoadResult, steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.stats import Summary, summarise
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.expert_statistics import ExpertStatistics


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """A step on average, in one engine: sequences in it, experts of a layer that had tokens (0 in a dense
    model), bytes and operations. limit_requests_per_s: of all replicas, at the device's full rates."""

    running: float
    distinct_experts: float
    num_bytes: float
    operations: float
    limit_requests_per_s: float


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


def value(cell: Cell, found: Measurement) -> float:
    """The figure that a cell is judged by: requests per second, or the median completion time."""
    return found.requests_per_s if cell.is_throughput else found.completion_s.p50


def told(cell: Cell, found: Measurement) -> str:
    """The figure that a cell is judged by, in words."""
    told = f"{value(cell, found):.4g}"
    return f"{told} requests/s at {found.concurrency:,}" if cell.is_throughput else f"{told} s"


@dataclass
class Headline(Campaign[Cell, Subject]):
    """A plan; Serving (serve.py) and Simulation (simulate.py) say where its engines run."""

    plan: Plan

    @property
    def blocks(self) -> Sequence[Block[Cell, Subject]]:
        """A profile's cells, which one engine serves."""
        plan = self.plan
        return [
            Block(profile, [cell for cell in plan.cells if cell.profile == profile], plan.subjects)
            for profile in ("throughput", "latency")
        ]

    def told(self, cell: Cell, result: Any) -> str:
        """The figure that the cell is judged by."""
        return told(cell, msgspec.convert(result, Measurement))


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
