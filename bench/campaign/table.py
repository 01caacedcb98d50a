"""Grids as text: a title, headings, rows; the first column is aligned to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from cierzo.bench.stats import spread


class Grid(msgspec.Struct, frozen=True):
    """A title, a row of headings, rows, which may end early."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def grid_of(title: str, rows: Sequence[Mapping[str, str]]) -> Grid:
    """The grid of rows that are texts by heading; a row may leave columns out."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return Grid(title, heads, [[row.get(head, "") for head in heads] for row in rows])


def text(grid: Grid) -> str:
    """The grid's lines, columns two blanks apart."""
    table = [grid.heads, *grid.rows]
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(grid.heads))]
    lines = [grid.title] if grid.title else []
    for first, *others in table:
        aligned = [first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=False))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def page(head: Sequence[str], grids: Sequence[Grid], notes: Sequence[str], foot: Sequence[str] = ()) -> str:
    """All that a run says: what the figures belong to, grids, notes, explanations."""
    parts = ["\n".join(head), *(text(grid) for grid in grids if grid.rows)]
    if notes:
        parts.append("\n".join(["notes", *notes]))
    if foot:
        parts.append("\n".join(foot))
    return "\n\n".join(parts)


def middle(values: Sequence[float], digits: int) -> str:
    """The median of the rounds to so many significant digits, and from two rounds on half their spread."""
    found = median(values)
    told = f"{found:.{digits}g}" if found < 10 ** (digits - 1) else f"{found:.0f}"
    return told if len(values) == 1 else f"{told} ±{spread(values) / 2:.0%}"
