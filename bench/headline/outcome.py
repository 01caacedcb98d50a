"""The outcome of a plan, from its samples: requests per second or completion times, Small 4's over Small 3's."""

from __future__ import annotations

import msgspec

from cierzo.bench.campaign import outcome
from cierzo.bench.campaign.store import Store
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.figures import Figure
from cierzo.bench.headline.measurement import Measurement, value
from cierzo.bench.headline.table import Outcome, Row
from cierzo.bench.machine import Ceilings
from cierzo.bench.stats import median

Figures = dict[int, Figure]  # by round


def outcome_of(plan: Plan, store: Store, assumed: str = "") -> Outcome:
    """Every subject in every cell that was tried, every pair in every cell that both ran, every goal of a cell."""
    places = [(cell, subject) for cell in plan.cells for subject in plan.subjects]
    figures = {place: _figures(store, *place) for place in places}
    pairs = [(cell, *pair) for cell in plan.cells for pair in plan.pairs]
    ratios = [
        found
        for cell, ours, against in pairs
        if (found := _ratio(cell, ours, against, figures[cell, ours], figures[cell, against])) is not None
    ]
    names = {cell.name for cell in plan.cells}
    return Outcome(
        identity=store.identity,
        assumed=assumed,
        goals_are_for=plan.goals_are_for,
        ceilings=msgspec.convert(store.ceilings(), list[Ceilings]),
        rows=outcome.rows(store, places, lambda *place: _values(place[0], figures[place]), _complete),
        ratios=ratios,
        verdicts=outcome.verdicts([goal for goal in plan.goals if goal.cell in names], ratios),
    )


def _figures(store: Store, cell: Cell, subject: Subject) -> Figures:
    results = store.measured(cell, subject)
    return {number: msgspec.convert(result["figure"], Figure) for number, result in results.items()}


def _values(cell: Cell, figures: Figures) -> dict[int, float]:
    return {number: value(cell, figure) for number, figure in figures.items()}


def _complete(row: Row) -> Row:
    """The row with a result that is typed, without samples."""
    if row.result is None:
        return row
    result = msgspec.convert(row.result, Measurement)
    return msgspec.structs.replace(row, result=msgspec.structs.replace(result, samples=[]))


def _ratio(
    cell: Cell, ours: Subject, against: Subject, one: Figures, other: Figures
) -> outcome.Ratio[Cell, Subject] | None:
    found = outcome.ratio(cell, ours, against, (_values(cell, one), _values(cell, other)))
    common = sorted(one.keys() & other.keys())
    limits = [limit for number in common if (limit := _limit(cell, one[number], other[number])) is not None]
    return found and msgspec.structs.replace(found, limit=median(limits) if limits else None)


def _limit(cell: Cell, small4: Figure, small3: Figure) -> float | None:
    """The ratio if both ran at the device's full rates. Where equally many wait, completion times are as the
    inverse of the requests per second."""
    if small4.steps is None or small3.steps is None:
        return None
    rate = small4.steps.limit_requests_per_s / small3.steps.limit_requests_per_s
    return rate if cell.is_throughput else 1 / rate
