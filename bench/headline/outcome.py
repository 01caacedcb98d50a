"""The outcome of a plan, from its samples: requests per second or completion times, Small 4's over Small 3's."""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.bench.campaign import outcome
from cierzo.bench.campaign.store import Store
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.measurement import Measurement, value
from cierzo.bench.machine import Ceilings

Outcome = outcome.Outcome[Cell, Subject, Measurement]
Row = outcome.Row[Cell, Subject, Measurement]
Ratio = outcome.Ratio[Cell, Subject]


def outcome_of(plan: Plan, assumed: str, store: Store) -> Outcome:
    """Every subject in every cell that was tried, every pair in every cell that both ran, every goal of a cell."""

    def measured(cell: Cell, subject: Subject) -> dict[int, Measurement]:
        return msgspec.convert(store.measured(cell, subject), dict[int, Measurement])

    def values(cell: Cell, subject: Subject) -> dict[int, float]:
        return {number: value(cell, found) for number, found in measured(cell, subject).items()}

    def limits(cell: Cell, subject: Subject) -> dict[int, float]:
        """At the device's full rates. Where equally many wait, completion times are as the inverse of the requests
        per second."""
        rates = {n: found.steps.limit_requests_per_s for n, found in measured(cell, subject).items() if found.steps}
        return rates if cell.is_throughput else {number: 1 / rate for number, rate in rates.items()}

    def about(cell: Cell, subject: Subject, result: Any) -> dict[str, Any]:
        """The result, typed, without samples."""
        return {"result": result and msgspec.convert({**result, "samples": []}, Measurement)}

    ratios = []
    for cell in plan.cells:
        for ours, against in plan.pairs:
            goal = plan.goals.get((cell.name, ours, against))
            found = outcome.ratio(cell, ours, against, values, goal, at_least=cell.is_throughput)
            limit = outcome.ratio(cell, ours, against, limits).ratio
            if found.rounds or goal is not None:
                ratios.append(msgspec.structs.replace(found, limit=limit))
    places = [(cell, subject) for cell in plan.cells for subject in plan.subjects]
    return Outcome(
        identity=store.identity,
        assumed=assumed,
        goals_are_for=plan.goals_are_for,
        ceilings=msgspec.convert(store.ceilings(), list[Ceilings]),
        rows=outcome.rows(store, places, values, about),
        ratios=ratios,
    )
