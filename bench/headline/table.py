"""The outcome as grids of text: goals, ratios, then each cell with a row for every subject."""

from __future__ import annotations

from collections.abc import Sequence

from cierzo.bench.campaign import outcome, table
from cierzo.bench.campaign.outcome import ceilings_line
from cierzo.bench.campaign.table import Grid
from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.headline.figures import Figure, Steps
from cierzo.bench.headline.measurement import Measurement

Outcome = outcome.Outcome[Cell, Subject, Measurement]
Row = outcome.Row[Cell, Subject, Measurement]
GIGA, TERA = 1e9, 1e12
SIMULATION = (
    "SIMULATION: no card has run this. Scheduler, cache and load client are the real ones; a step takes what the",
    "roofline says of its bytes and operations, with the overheads and shares of the device's rates named below.",
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
    "full rate, whichever takes longer; limit of the ratio: if both models ran at theirs. running, experts "
    "(distinct, of a layer; of a real server as its tokens chose, which costs it up to 2 %), GB and TFLOP: of a "
    "step of one engine, on average.",
)


def text(found: Outcome, command: str) -> str:
    """All that a run says, for a terminal."""
    grids = [_goals(found), _ratios(found)]
    for cell in dict.fromkeys(row.cell for row in found.rows):
        grids.append(_cell(cell, [row for row in found.rows if row.cell == cell]))
    return table.page(_head(found, command), grids, _notes(found.rows), EXPLAINED)


def _head(found: Outcome, command: str) -> list[str]:
    """What the figures belong to."""
    identity = found.identity
    return [
        *(SIMULATION if found.is_simulation else ()),
        f"Small 4 against Small 3 on {found.device}",
        f"{command}, commit {identity['commit']}",
        *([found.assumed] if found.assumed else []),
        *(f"{model}: {identity[model]}" for model in ("small4", "small3")),
        *ceilings_line(found.ceilings),
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What the grids have no room for: layouts that lost, lost requests, cells without a figure."""
    found = []
    for row in rows:
        where = f"{row.cell.name} {row.subject}"
        if row.error:
            found.append(f"{where}: NOT MEASURED: {row.error}")
        if row.result is not None and row.result.others:
            found.append(f"{where}: {row.result.layout} won; {'; '.join(row.result.others)}")
        if row.result is not None and row.result.figure.errors:
            found.append(f"{where}: requests without an answer: {row.result.figure.errors}")
    return found


def _goals(found: Outcome) -> Grid:
    met = sum(verdict.met is True for verdict in found.verdicts)
    title = f"goals, set for {found.goals_are_for}: {met} of {len(found.verdicts)} met"
    lines = []
    for verdict in found.verdicts:
        goal = verdict.goal
        if goal.at_least is not None:
            wanted = f"requests/s at least {goal.at_least:.2f}x"
        else:
            wanted = f"completion at most {goal.at_most:.2f}x"
        said = {True: "yes", False: "NO", None: "not measured"}[verdict.met]
        pair = f"{goal.cell}: {goal.ours} / {goal.against}: {wanted}"
        lines.append((pair, _times(verdict.ratio), _times(verdict.limit), said))
    measured = "simulated" if found.is_simulation else "measured"
    return Grid(title, ("goal", measured, "limit of the ratio", "met"), lines)


def _ratios(found: Outcome) -> Grid:
    lines = []
    for one in found.ratios:
        what = "requests/s" if one.cell.is_throughput else "completion"
        pair = f"{one.cell.name}: {one.ours} / {one.against}"
        lines.append((pair, what, _times(one.ratio), _times(one.limit), str(one.rounds)))
    heads = ("Small 4 over Small 3", "of", "ratio", "limit of the ratio", "rounds")
    return Grid("ratios (median of paired rounds)", heads, lines)


_STEP_HEADS = ("running", "experts", "GB/step", "TFLOP/step", "of limit")
_HEADS = {
    True: (
        "requests/s",
        "plain",
        "out tok/s",
        "clients",
        "TTFT p50/p99 s",
        "TPOT p50 ms",
        "inter-token p50/p99 ms",
    ),
    False: (
        "completion p50/p99 s",
        "requests/s",
        "out tok/s",
        "TTFT p50/p99 s",
        "TPOT p50 ms",
        "inter-token p50/p99 ms",
    ),
}


def _cell(cell: Cell, rows: Sequence[Row]) -> Grid:
    heads = ("precision", *_HEADS[cell.is_throughput], *_STEP_HEADS)
    if cell.concurrency is None:
        heads = (*heads, "fit", "bounded by")
    return Grid(str(cell), heads, [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    if row.result is None:
        return str(row.subject), "failed"
    found, cell = row.result.figure, row.cell
    name = str(row.subject) if found.replicas == 1 else f"{row.subject}, {found.replicas} engines"
    ttft, gaps, middle = found.time_to_first_token_s, found.inter_token_s, table.middle(row.values, 4)
    shared = (
        f"{ttft.p50:.3g}/{ttft.p99:.3g}",
        f"{found.time_per_output_token_s.p50 * 1e3:.2f}",
        f"{gaps.p50 * 1e3:.2f}/{gaps.p99 * 1e3:.2f}",
        *_steps(found, found.steps),
    )
    rates = f"{found.output_tokens_per_s:,.0f}"
    if not cell.is_throughput:
        return name, f"{middle}/{found.completion_s.p99:.4g}", f"{found.requests_per_s:.4g}", rates, *shared
    line = (name, middle, f"{found.plain_requests_per_s:.4g}", rates, f"{found.concurrency:,}", *shared)
    if cell.concurrency is not None:
        return line
    return *line, f"{row.result.kv_room_requests:,}", row.result.bounded_by


def _steps(found: Figure, steps: Steps | None) -> tuple[str, ...]:
    if steps is None:
        return ("-",) * len(_STEP_HEADS)
    return (
        f"{steps.running:.1f}",
        f"{steps.distinct_experts:.1f}" if steps.distinct_experts else "-",
        f"{steps.num_bytes / GIGA:.3g}",
        f"{steps.operations / TERA:.3g}",
        f"{found.share_of_limit:.0%}",
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
