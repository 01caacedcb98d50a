"""Grids as text: a title, headings, rows; the first column is aligned to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cierzo.bench.stats import median, spread


def grid(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Rows, each its figures by heading, as lines, columns two blanks apart; a row may leave columns out. Empty
    without rows."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    table = [heads, *([row.get(head, "") for head in heads] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [title] if title and rows else []
    for first, *others in table:
        aligned = [first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def page(head: Sequence[str], grids: Sequence[str], notes: Sequence[str], foot: Sequence[str] = ()) -> str:
    """All that a run says: what the figures belong to, grids, notes, explanations."""
    parts = ["\n".join(head), *grids, "\n".join(["notes", *notes] if notes else []), "\n".join(foot)]
    return "\n\n".join(part for part in parts if part)


def middle(values: Sequence[float], digits: int) -> str:
    """The median of the rounds to so many significant digits, and from two rounds on half their spread."""
    found = median(values)
    told = f"{found:.{digits}g}" if found < 10 ** (digits - 1) else f"{found:.0f}"
    return told if len(values) == 1 else f"{told} ±{spread(values) / 2:.0%}"
