"""The outcome as grids of text, which the terminal and the HTML page both show."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell
from cierzo.bench.headline.figures import Figure, Steps
from cierzo.bench.headline.outcome import Outcome, Ratio, Row, Verdict
from cierzo.bench.machine import Ceilings
from cierzo.bench.stats import median, spread

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


class Grid(msgspec.Struct, frozen=True):
    """A title, a row of headings, rows; the first column is aligned to the left."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def grids(outcome: Outcome) -> list[Grid]:
    """Goals, ratios, then each cell."""
    found = [_goals(outcome), _ratios(outcome.ratios)]
    for cell in dict.fromkeys(row.cell for row in outcome.rows):
        found.append(_cell(cell, [row for row in outcome.rows if row.cell == cell]))
    return [grid for grid in found if grid.rows]


def notes(outcome: Outcome) -> list[str]:
    """What the grids have no room for: layouts that lost, lost requests, cells without a figure."""
    found = []
    for row in outcome.rows:
        where = f"{row.cell.name} {row.subject}"
        if row.error:
            found.append(f"{where}: NOT MEASURED: {row.error}")
        if row.measurement is not None and row.measurement.others:
            found.append(f"{where}: {row.measurement.layout} won; {'; '.join(row.measurement.others)}")
        if row.measurement is not None and row.measurement.figure.errors:
            found.append(f"{where}: requests without an answer: {row.measurement.figure.errors}")
    return found


def text(outcome: Outcome, head: Sequence[str]) -> str:
    """All of it, for a terminal."""
    parts = ["\n".join(head), *(_aligned(grid) for grid in grids(outcome))]
    if told := notes(outcome):
        parts.append("\n".join(["notes", *told]))
    return "\n\n".join([*parts, "\n".join(EXPLAINED)])


def head(outcome: Outcome, command: str) -> list[str]:
    """What the figures belong to."""
    lines = [f"Small 4 against Small 3 on {outcome.device}", f"{command}, commit {outcome.commit}"]
    if outcome.simulation:
        lines = [*SIMULATION, *lines]
    if outcome.assumed:
        lines.append(outcome.assumed)
    lines += [f"small4: {outcome.small4}", f"small3: {outcome.small3}"]
    if ceilings := _ceilings(outcome.rows):
        lines.append(ceilings)
    return lines


def _ceilings(rows: Sequence[Row]) -> str:
    found: list[Ceilings] = [
        row.measurement.ceilings for row in rows if row.measurement and row.measurement.ceilings
    ]
    if not found:
        return ""
    read, bf16 = median([one.read.rate for one in found]), median([one.bf16.rate for one in found])
    return f"ceilings measured in the same run, median: {read:.1f} GB/s read, {bf16:.0f} GFLOP/s in bf16"


def _goals(outcome: Outcome) -> Grid:
    met = sum(verdict.met is True for verdict in outcome.verdicts)
    title = f"goals, set for {outcome.goals_are_for}: {met} of {len(outcome.verdicts)} met"
    found = "simulated" if outcome.simulation else "measured"
    return Grid(title, ("goal", found, "limit of the ratio", "met"), [_goal(one) for one in outcome.verdicts])


def _goal(verdict: Verdict) -> tuple[str, ...]:
    goal = verdict.goal
    pair = f"{goal.cell}: {goal.small4} / {goal.small3}"
    if goal.at_least is not None:
        wanted = f"{pair}: requests/s at least {goal.at_least:.2f}x"
    else:
        wanted = f"{pair}: completion at most {goal.at_most:.2f}x"
    said = {True: "yes", False: "NO", None: "not measured"}[verdict.met]
    return wanted, _times(verdict.ratio), _times(verdict.limit), said


def _ratios(found: Sequence[Ratio]) -> Grid:
    lines: list[tuple[str, ...]] = []
    for one in found:
        what = "requests/s" if one.cell.is_throughput else "completion"
        pair = f"{one.cell.name}: {one.small4} / {one.small3}"
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


def _cell(cell: Cell, found: Sequence[Row]) -> Grid:
    heads = ("precision", *_HEADS[cell.is_throughput], *_STEP_HEADS)
    if cell.concurrency is None:
        heads = (*heads, "fit", "bounded by")
    return Grid(f"{cell.name}: {cell.describe()}", heads, [_line(row) for row in found])


def _line(row: Row) -> tuple[str, ...]:
    if row.measurement is None:
        return str(row.subject), "failed"
    found, cell = row.measurement.figure, row.cell
    name = str(row.subject) if found.replicas == 1 else f"{row.subject}, {found.replicas} engines"
    ttft, gaps = found.time_to_first_token_s, found.inter_token_s
    shared = (
        f"{ttft.p50:.3g}/{ttft.p99:.3g}",
        f"{found.time_per_output_token_s.p50 * 1e3:.2f}",
        f"{gaps.p50 * 1e3:.2f}/{gaps.p99 * 1e3:.2f}",
        *_steps(found, found.steps),
    )
    rates = f"{found.output_tokens_per_s:,.0f}"
    if not cell.is_throughput:
        times = f"{_middle(row)}/{found.completion_s.p99:.4g}"
        return name, times, f"{found.requests_per_s:.4g}", rates, *shared
    line = (name, _middle(row), f"{found.plain_requests_per_s:.4g}", rates, f"{found.concurrency:,}", *shared)
    if cell.concurrency is not None:
        return line
    return *line, f"{row.measurement.kv_room_requests:,}", row.measurement.bounded_by


def _middle(row: Row) -> str:
    """The median of the rounds, with half their spread."""
    told = f"{median(row.values):.4g}"
    return told if len(row.values) == 1 else f"{told} ±{spread(row.values) / 2:.0%}"


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


def _aligned(grid: Grid) -> str:
    table = [grid.heads, *grid.rows]
    columns = len(grid.heads)
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(columns)]
    lines = [grid.title]
    for row in table:
        first, *others = row
        aligned = [first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=False))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
