"""From records to what is told: rows, ratios of paired rounds, goals met or not."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cierzo.bench.headline.cells import Cell, Goal, Plan, Subject
from cierzo.bench.headline.figures import Figure
from cierzo.bench.headline.records import Measurement, Records
from cierzo.bench.stats import median, paired_ratio


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A subject in a cell. values: by round, requests per second or seconds. measurement: of the round in the
    middle, without samples. error: if there is none."""

    cell: Cell
    subject: Subject
    rounds: list[int] = []
    values: list[float] = []
    measurement: Measurement | None = None
    error: str = ""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Small 4's figure over Small 3's: requests per second of a throughput cell, completion times of a latency one;
    the median over paired rounds. limit: the ratio if both ran at the device's full rates, as many at once."""

    cell: Cell
    small4: Subject
    small3: Subject
    ratio: float
    rounds: int
    limit: float | None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A goal, and what was measured; None where it was not."""

    goal: Goal
    ratio: float | None
    limit: float | None
    met: bool | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run says. assumed: of a simulated device, the shares of its rates and the overheads."""

    device: str
    assumed: str
    simulation: bool
    commit: str
    small4: str
    small3: str
    goals_are_for: str
    rows: list[Row]
    ratios: list[Ratio]
    verdicts: list[Verdict]


def value(cell: Cell, figure: Figure) -> float:
    """What a cell is judged by."""
    return figure.requests_per_s if cell.is_throughput else figure.completion_s.p50


def rows(plan: Plan, records: Records) -> list[Row]:
    """Every subject in every cell that was tried."""
    found = []
    for cell in plan.cells:
        for subject in plan.subjects:
            measured = records.measured(cell, subject)
            error = records.error(cell, subject)
            if not measured and not error:
                continue
            rounds = sorted(measured)
            found.append(
                Row(
                    cell=cell,
                    subject=subject,
                    rounds=rounds,
                    values=[value(cell, measured[number].figure) for number in rounds],
                    measurement=_middle(cell, measured),
                    error="" if measured else error,
                )
            )
    return found


def _middle(cell: Cell, measured: Mapping[int, Measurement]) -> Measurement | None:
    """Of the round with the median value; of an even number the lower of the two."""
    ordered = sorted(measured.values(), key=lambda one: value(cell, one.figure))
    if not ordered:
        return None
    return msgspec.structs.replace(ordered[(len(ordered) - 1) // 2], samples=[])


def ratios(plan: Plan, records: Records) -> list[Ratio]:
    """Every pair in every cell that both ran."""
    found = []
    for cell in plan.cells:
        for small4, small3 in plan.pairs:
            ours, theirs = records.measured(cell, small4), records.measured(cell, small3)
            common = sorted(ours.keys() & theirs.keys())
            if not common:
                continue
            pairs = [(ours[number].figure, theirs[number].figure) for number in common]
            limits = [limit for one, other in pairs if (limit := _limit(cell, one, other)) is not None]
            found.append(
                Ratio(
                    cell=cell,
                    small4=small4,
                    small3=small3,
                    ratio=paired_ratio([value(cell, one) for one, _ in pairs], [value(cell, o) for _, o in pairs]),
                    rounds=len(common),
                    limit=median(limits) if limits else None,
                )
            )
    return found


def _limit(cell: Cell, small4: Figure, small3: Figure) -> float | None:
    """Where equally many wait, completion times are as the inverse of the requests per second."""
    if small4.steps is None or small3.steps is None:
        return None
    rate = small4.steps.limit_requests_per_s / small3.steps.limit_requests_per_s
    return rate if cell.is_throughput else 1 / rate


def verdicts(plan: Plan, found: list[Ratio]) -> list[Verdict]:
    """Every goal of the plan's cells."""
    by_pair = {(one.cell.name, one.small4, one.small3): one for one in found}
    names = {cell.name for cell in plan.cells}
    said = []
    for goal in plan.goals:
        if goal.cell not in names:
            continue
        one = by_pair.get((goal.cell, goal.small4, goal.small3))
        if one is None:
            said.append(Verdict(goal=goal, ratio=None, limit=None, met=None))
            continue
        enough = goal.at_least is None or one.ratio >= goal.at_least
        met = enough and (goal.at_most is None or one.ratio <= goal.at_most)
        said.append(Verdict(goal=goal, ratio=one.ratio, limit=one.limit, met=met))
    return said
