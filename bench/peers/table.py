"""The figures as text: a table for each checkpoint, then the ratios, notes, and what could not be measured."""

from __future__ import annotations

from cierzo.bench.campaign import table
from cierzo.bench.campaign.outcome import ceilings_line
from cierzo.bench.machine import middle
from cierzo.bench.peers.results import Outcome, Ratio, Row
from cierzo.bench.stats import median


def text(found: Outcome, command: str) -> str:
    """Medians with half their spread, from two rounds on, and the share of what the ceilings would allow."""
    head = [f"{command}, commit {found.identity['commit']}", *ceilings_line(found.ceilings)]
    if found.ceilings and (int8 := middle(found.ceilings).int8) is not None:
        head.append(f"{int8.rate:.0f} GOP/s in int8")
    grids = [_checkpoint(found, name) for name in dict.fromkeys(row.subject.checkpoint for row in found.rows)]
    grids.append(table.grid("median of paired rounds", [_ratio(one) for one in found.ratios]))
    notes = [f"{row.subject} {row.cell.name}: {row.note}" for row in found.rows if row.note]
    notes += [f"{row.subject} {row.cell.name}: NOT MEASURED: {row.error}" for row in found.rows if row.error]
    return table.page(head, grids, notes)


def _checkpoint(found: Outcome, name: str) -> str:
    """A row for each engine, a column for each cell."""
    rows = [row for row in found.rows if row.subject.checkpoint == name]
    columns = dict.fromkeys((f"{row.cell.name}, {row.cell.unit}" for row in rows), "-")
    lines = {row.subject.engine: {name: row.subject.engine, **columns} for row in rows}
    for row in rows:
        lines[row.subject.engine][f"{row.cell.name}, {row.cell.unit}"] = _figure(row)
    return table.grid("", list(lines.values()))


def _figure(row: Row) -> str:
    if not row.values:
        return "failed"
    share = f" ({median(row.values) / row.limit:.0%})" if row.limit else ""
    return f"{table.middle(row.values, 3)}{share}"


def _ratio(one: Ratio) -> dict[str, str]:
    ours, against = one.ours, one.against
    return {
        "": f"{ours.checkpoint} {one.cell.name}",
        "times as good": f"{one.ratio:.2f}",
        "is": ours.engine,
        "as": f"{against.engine} on {against.checkpoint}"
        if against.checkpoint != ours.checkpoint
        else against.engine,
        "rounds": str(one.rounds),
    }
