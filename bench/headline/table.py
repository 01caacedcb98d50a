"""The outcome as grids of text: goals, ratios, then each cell with a row for every subject."""

from __future__ import annotations

from collections.abc import Sequence

from cierzo.bench.campaign import table
from cierzo.bench.campaign.outcome import ceilings_line
from cierzo.bench.headline.cells import LIMIT_S
from cierzo.bench.headline.measurement import Measurement
from cierzo.bench.headline.outcome import Outcome, Ratio, Row

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
    identity = found.identity
    head = [
        *(SIMULATION if found.is_simulation else ()),
        f"Small 4 against Small 3 on {found.device}",
        f"{command}, commit {identity['commit']}",
        *([found.assumed] if found.assumed else []),
        *(f"{model}: {identity[model]}" for model in ("small4", "small3")),
        *ceilings_line(found.ceilings),
    ]
    goals = [one for one in found.ratios if one.goal is not None]
    met = sum(one.met is True for one in goals)
    grids = [
        table.grid(
            f"goals, set for {found.goals_are_for}: {met} of {len(goals)} met",
            [_goal(one, "simulated" if found.is_simulation else "measured") for one in goals],
        ),
        table.grid("ratios (median of paired rounds)", [_ratio(one) for one in found.ratios if one.rounds]),
    ]
    for cell in dict.fromkeys(row.cell for row in found.rows):
        grids.append(table.grid(str(cell), [_line(row) for row in found.rows if row.cell == cell]))
    return table.page(head, grids, _notes(found.rows), EXPLAINED)


def _notes(rows: Sequence[Row]) -> list[str]:
    """Lines for what the grids have no room for: layouts that lost, lost requests, cells without a figure."""
    found = []
    for row in rows:
        where = f"{row.cell.name} {row.subject}"
        if row.error:
            found.append(f"{where}: NOT MEASURED: {row.error}")
        if row.result is not None and row.result.others:
            found.append(f"{where}: {row.result.layout} won; {'; '.join(row.result.others)}")
        if row.result is not None and row.result.errors:
            found.append(f"{where}: requests without an answer: {row.result.errors}")
    return found


def _goal(one: Ratio, ratio: str) -> dict[str, str]:
    what = "requests/s at least" if one.cell.is_throughput else "completion at most"
    return {
        "goal": f"{one.cell.name}: {one.ours} / {one.against}: {what} {_times(one.goal)}",
        ratio: _times(one.ratio),
        "limit of the ratio": _times(one.limit),
        "met": {True: "yes", False: "NO", None: "not measured"}[one.met],
    }


def _ratio(one: Ratio) -> dict[str, str]:
    return {
        "Small 4 over Small 3": f"{one.cell.name}: {one.ours} / {one.against}",
        "of": "requests/s" if one.cell.is_throughput else "completion",
        "ratio": _times(one.ratio),
        "limit of the ratio": _times(one.limit),
        "rounds": str(one.rounds),
    }


def _line(row: Row) -> dict[str, str]:
    """A subject's figures by heading."""
    found, cell = row.result, row.cell
    judged = "requests/s" if cell.is_throughput else "completion p50/p99 s"
    if found is None:
        return {"precision": str(row.subject), judged: "failed"}
    engines = "" if found.replicas == 1 else f", {found.replicas} engines"
    line = {"precision": f"{row.subject}{engines}", judged: table.middle(row.values, 4)}
    if cell.is_throughput:
        line["plain"] = f"{found.plain_requests_per_s:.4g}"
    else:
        line[judged] += f"/{found.completion_s.p99:.4g}"
        line["requests/s"] = f"{found.requests_per_s:.4g}"
    line["out tok/s"] = f"{found.output_tokens_per_s:,.0f}"
    if cell.is_throughput:
        line["clients"] = f"{found.concurrency:,}"
    first, gaps = found.time_to_first_token_s, found.inter_token_s
    line["TTFT p50/p99 s"] = f"{first.p50:.3g}/{first.p99:.3g}"
    line["TPOT p50 ms"] = f"{found.time_per_output_token_s.p50 * 1e3:.2f}"
    line["inter-token p50/p99 ms"] = f"{gaps.p50 * 1e3:.2f}/{gaps.p99 * 1e3:.2f}"
    line |= _steps(found)
    if cell.concurrency is None:
        line |= {"fit": f"{found.kv_room_requests:,}", "bounded by": found.bounded_by}
    return line


def _steps(found: Measurement) -> dict[str, str]:
    steps = found.steps
    if steps is None:
        return dict.fromkeys(("running", "experts", "GB/step", "TFLOP/step", "of limit"), "-")
    return {
        "running": f"{steps.running:.1f}",
        "experts": f"{steps.distinct_experts:.1f}" if steps.distinct_experts else "-",
        "GB/step": f"{steps.num_bytes / GIGA:.3g}",
        "TFLOP/step": f"{steps.operations / TERA:.3g}",
        "of limit": f"{found.share_of_limit:.0%}",
    }


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
