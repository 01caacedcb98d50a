"""The outcome of a plan, from its samples: rates or times, and Small 4's over Small 3's; its text, its picture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.campaign import outcome, plot, table
from cierzo.bench.campaign.store import Store
from cierzo.bench.headline.cells import LIMIT_S, SIMULATED, Cell, Plan, Subject
from cierzo.bench.headline.measurement import Measurement
from cierzo.bench.machine import Ceilings

Outcome = outcome.Outcome[Cell, Subject, Measurement]
Row = outcome.Row[Cell, Subject, Measurement]
Ratio = outcome.Ratio[Cell, Subject]
GIGA, TERA = 1e9, 1e12
COLUMNS, PANEL_INCHES = 3, (3.6, 2.9)
SIMULATION = (
    "SIMULATION: no card has run this. Scheduler, cache and load client are the real ones; a step takes what the",
    "price of its operations says (engine/cost), by the shares of the rates and the overheads named below.",
)
EXPLAINED = (
    "requests/s: completions between the C-th and the (N-C)-th of N = 3C requests of C clients, over the time "
    "between the two, so that neither ramp nor tail counts; plain: all requests over all the time.",
    "TPOT (time per output token): from a request's first token to its last, over the tokens between; inter-token: "
    "between two tokens of a request; TTFT: time to first token. Of a throughput cell those of the requests that "
    "end in the steady time, of a latency cell all.",
    "clients, where the cell does not give them: as many as give the most requests/s with a median TPOT of at most "
    f"{LIMIT_S * 1e3:.0f} ms. fit: requests of full length that the KV cache holds.",
    "of limit: of the requests/s if the device moved all bytes, or computed all operations, of these steps at its "
    "full rate, whichever takes longer; limit of the ratio: if both models ran at theirs; limited by: the roof and "
    "the operation that take most of the time. running, experts (distinct, of a layer; of a real server as its "
    "tokens chose, which costs it up to 2 %), GB and TFLOP: of a step of one engine, on average.",
)


def outcome_of(plan: Plan, store: Store) -> Outcome:
    """Every subject in every cell that was tried, every pair in every cell that both ran, every goal of a cell."""

    @functools.cache
    def measured(cell: Cell, subject: Subject) -> dict[int, Measurement]:
        return msgspec.convert(store.measured(cell, subject), dict[int, Measurement])

    def values(cell: Cell, subject: Subject) -> dict[int, float]:
        return {number: found.value(cell) for number, found in measured(cell, subject).items()}

    def limits(cell: Cell, subject: Subject) -> dict[int, float]:
        """At the device's full rates. Where equally many wait, completion times are as the inverse of the requests
        per second."""
        rates = {n: found.steps.limit_requests_per_s for n, found in measured(cell, subject).items() if found.steps}
        return rates if cell.is_throughput else {number: 1 / rate for number, rate in rates.items()}

    ratios = []
    for cell, (ours, against) in itertools.product(plan.cells, plan.pairs):
        goal = plan.goals.get((cell.name, ours, against))
        found = outcome.ratio(cell, ours, against, values, goal, at_least=cell.is_throughput)
        if found.rounds or goal is not None:
            limit = outcome.ratio(cell, ours, against, limits).ratio
            ratios.append(msgspec.structs.replace(found, limit=limit))
    return Outcome(
        identity=store.identity,
        goals_are_for=plan.goals_are_for,
        ceilings=msgspec.convert(store.ceilings(), list[Ceilings]),
        rows=outcome.rows(store, itertools.product(plan.cells, plan.subjects), values, _about),
        ratios=ratios,
    )


def _about(cell: Cell, subject: Subject, result: Any) -> dict[str, Any]:
    """The result, typed, without samples, and a note of layouts that lost and requests that were."""
    if result is None:
        return {}
    found = msgspec.convert({**result, "samples": []}, Measurement)
    notes = [f"{found.layout} won, {'; '.join(found.others)}"] if found.others else []
    notes += [f"requests without an answer: {found.errors}"] if found.errors else []
    return {"result": found, "note": "; ".join(notes)}


def text(found: Outcome, command: str) -> str:
    """All that a run says, for a terminal: ratios, those with a goal first, then each cell, with its subjects."""
    banner = SIMULATION if found.identity["device"].startswith(SIMULATED) else ()
    ratios = sorted(found.ratios, key=lambda one: one.goal is None)
    goals = [one for one in ratios if one.goal is not None]
    met = f"goals, set for {found.goals_are_for}: {sum(one.met is True for one in goals)} of {len(goals)} met"
    grids = [table.grid_of(f"ratios (median of paired rounds); {met}", [_ratio(one) for one in ratios])]
    for cell in dict.fromkeys(row.cell for row in found.rows):
        grids.append(table.grid_of(str(cell), [_line(row) for row in found.rows if row.cell == cell]))
    return table.page([*banner, *outcome.head(found, command)], grids, outcome.notes(found), EXPLAINED)


def _ratio(one: Ratio) -> dict[str, str]:
    bound = "at least" if one.cell.is_throughput else "at most"
    return {
        "Small 4 over Small 3": f"{one.cell.name}: {one.ours} / {one.against}",
        "of": "requests/s" if one.cell.is_throughput else "completion",
        "ratio": _times(one.ratio),
        "limit of the ratio": _times(one.limit),
        "rounds": str(one.rounds),
        "goal": "" if one.goal is None else f"{bound} {_times(one.goal)}",
        "met": "" if one.goal is None else {True: "yes", False: "NO", None: "not measured"}[one.met],
    }


def _line(row: Row) -> dict[str, str]:
    """A subject's figures by heading."""
    found, cell = row.result, row.cell
    judged = "requests/s" if cell.is_throughput else "completion p50/p99 s"
    if found is None:
        return {"precision": str(row.subject), judged: "failed"}
    engines = "" if found.replicas == 1 else f", {found.replicas} engines"
    value, rate = table.middle(row.values, 4), f"{found.output_tokens_per_s:,.0f}"
    if cell.is_throughput:
        plain, clients = f"{found.plain_requests_per_s:.4g}", f"{found.concurrency:,}"
        first = {judged: value, "plain": plain, "out tok/s": rate, "clients": clients}
    else:
        value += f"/{found.completion_s.p99:.4g}"
        first = {judged: value, "requests/s": f"{found.requests_per_s:.4g}", "out tok/s": rate}
    steps = dict.fromkeys(("running", "experts", "GB/step", "TFLOP/step", "of limit"), "-")
    if one := found.steps:
        steps = {
            "running": f"{one.running:.1f}",
            "experts": f"{one.distinct_experts:.1f}" if one.distinct_experts else "-",
            "GB/step": f"{one.num_bytes / GIGA:.3g}",
            "TFLOP/step": f"{one.operations / TERA:.3g}",
            "of limit": f"{found.requests_per_s / one.limit_requests_per_s:.0%}",
        }
    if one and one.roof != "-":
        steps["limited by"] = one.roof
    last = {"fit": f"{found.kv_room_requests:,}", "bounded by": found.bounded_by}
    return {
        "precision": f"{row.subject}{engines}",
        **first,
        "TTFT p50/p99 s": f"{found.time_to_first_token_s.p50:.3g}/{found.time_to_first_token_s.p99:.3g}",
        "TPOT p50 ms": f"{found.time_per_output_token_s.p50 * 1e3:.2f}",
        "inter-token p50/p99 ms": f"{found.inter_token_s.p50 * 1e3:.2f}/{found.inter_token_s.p99 * 1e3:.2f}",
        **steps,
        **(last if cell.concurrency is None else {}),
    }


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def picture(found: Outcome, path: Path) -> None:
    """Write a PNG: filled marks are loads, hollow ones forecasts. Raises ConfigError."""
    colors = plot.colors((row.subject for row in found.rows), lambda subject: subject.model == "small4")
    device = found.identity["device"].partition(": ")[0].replace(SIMULATED, "SIMULATION of ")  # without its figures
    title = f"Small 4 against Small 3, {device}, {found.identity['commit']}"
    draws = [functools.partial(_draw, panel, colors) for panel in panels(found.rows)]
    plot.plot(path, title, draws, COLUMNS, PANEL_INCHES, {str(subject): color for subject, color in colors.items()})


def panels(rows: Sequence[Row]) -> list[list[Row]]:
    """Cells of one length and profile make curves of concurrencies."""

    def key(row: Row) -> tuple[str, int, int]:
        return row.cell.profile, row.cell.input_tokens, row.cell.output_tokens

    shown = [row for row in rows if row.result is not None]
    return [list(panel) for _, panel in itertools.groupby(shown, key)]


def _draw(rows: list[Row], colors: dict[Subject, str], axis: Any) -> None:
    cell, searched = rows[0].cell, rows[0].cell.concurrency is None
    for subject, color in colors.items():
        curve: list[tuple[int, float, float, bool]] = []  # concurrency, latency, requests/s, whether measured
        for found in (row.result for row in rows if row.subject == subject and row.result):
            curve.append((found.concurrency, found.completion_s.p50, found.requests_per_s, True))
            if searched:
                times_ms = [(one, one.time_per_output_token_s * 1e3) for one in found.points]
                curve = [(one.concurrency, ms, one.requests_per_s, one.measured) for one, ms in times_ms]
        curve.sort()
        axis.plot([point[1] for point in curve], [point[2] for point in curve], color=color, linewidth=1)
        for concurrency, x, y, measured in curve:
            axis.plot(x, y, marker="o", markersize=4, color=color, markerfacecolor=color if measured else "white")
            if not searched:
                axis.annotate(f"{concurrency:,}", (x, y), fontsize=6, xytext=(3, -7), textcoords="offset points")
    axis.set_xlim(left=0, right=1.6 * LIMIT_S * 1e3 if searched else None)
    axis.set_ylim(bottom=0)
    if searched:
        axis.axvline(LIMIT_S * 1e3, color="black", linewidth=0.8, linestyle="--")
    axis.set_title(f"{cell.profile}: {cell.input_tokens:,} in, {cell.output_tokens:,} out", fontsize=8)
    axis.set_xlabel("median time per output token, ms" if searched else "median completion, s", fontsize=7)
    axis.set_ylabel("requests/s", fontsize=7)
