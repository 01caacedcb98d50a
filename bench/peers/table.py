"""The figures as text: a table for each checkpoint, then the ratios, notes, and what could not be measured."""

from __future__ import annotations

from cierzo.bench.campaign import table
from cierzo.bench.campaign.outcome import ceilings_line
from cierzo.bench.campaign.table import Grid
from cierzo.bench.machine import middle
from cierzo.bench.peers.results import Outcome, Ratio, Row
from cierzo.bench.stats import median


def text(found: Outcome, command: str) -> str:
    """Medians with half their spread, from two rounds on, and the share of what the ceilings would allow."""
    head = [f"{command}, commit {found.identity['commit']}", *ceilings_line(found.ceilings)]
    if found.ceilings and (int8 := middle(found.ceilings).int8) is not None:
        head.append(f"{int8.rate:.0f} GOP/s in int8")
    grids = [_checkpoint(found, name) for name in dict.fromkeys(row.subject.checkpoint for row in found.rows)]
    lines = []
    for one in found.ratios:
        place, pair = f"{one.ours.checkpoint} {one.cell.name}", (one.ours.engine, _against(one))
        lines.append((place, f"{one.ratio:.2f}", *pair, str(one.rounds)))
    grids.append(Grid("median of paired rounds", ("", "times as good", "is", "as", "rounds"), lines))
    notes = [f"{row.subject} {row.cell.name}: {row.note}" for row in found.rows if row.note]
    notes += [f"{row.subject} {row.cell.name}: NOT MEASURED: {row.error}" for row in found.rows if row.error]
    return table.page(head, grids, notes)


def _against(one: Ratio) -> str:
    same = one.against.checkpoint == one.ours.checkpoint
    return one.against.engine if same else f"{one.against.engine} on {one.against.checkpoint}"


def _checkpoint(found: Outcome, name: str) -> Grid:
    """A row for each engine, a column for each cell."""
    rows = {(row.subject.engine, row.cell): row for row in found.rows if row.subject.checkpoint == name}
    cells = list(dict.fromkeys(cell for _, cell in rows))
    engines = dict.fromkeys(engine for engine, _ in rows)
    lines = [[engine, *(_figure(rows.get((engine, cell))) for cell in cells)] for engine in engines]
    return Grid("", [name, *(f"{cell.name}, {cell.unit}" for cell in cells)], lines)


def _figure(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.values:
        return "failed"
    share = f" ({median(row.values) / row.limit:.0%})" if row.limit else ""
    return f"{table.middle(row.values, 3)}{share}"
