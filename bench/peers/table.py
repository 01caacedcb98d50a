"""The figures as text: a table for each checkpoint, then the ratios, notes, and what could not be measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Engine
from cierzo.bench.peers.results import Ratio, Row

NAME_WIDTH = 26


def table(rows: Sequence[Row], ratios: Sequence[Ratio], cells: Sequence[Cell], engines: Sequence[Engine]) -> str:
    """Medians with their spread ((largest - smallest) / median, from two rounds on) and share of the roof."""
    parts = [_checkpoint_table(name, rows, cells, engines) for name in _distinct(row.checkpoint for row in rows)]
    if ratios:
        parts.append("\n".join(["times as good (median of paired rounds)", *map(_ratio_line, ratios)]))
    notes = [f"{row.checkpoint} {row.engine} {row.cell}: {row.note}" for row in rows if row.note]
    if notes:
        parts.append("\n".join(["notes", *notes]))
    failed = [f"{row.checkpoint} {row.engine} {row.cell}: {row.error}" for row in rows if row.error]
    if failed:
        parts.append("\n".join(["not measured", *failed]))
    return "\n\n".join(parts)


def _checkpoint_table(name: str, rows: Sequence[Row], cells: Sequence[Cell], engines: Sequence[Engine]) -> str:
    found = {(row.engine, row.cell): row for row in rows if row.checkpoint == name}
    columns = [cell for cell in cells if any(column == cell.name for _, column in found)]
    texts = [[f"{cell.name}, {cell.unit}" for cell in columns]]
    names = [engine.name for engine in engines if any(row == engine.name for row, _ in found)]
    texts += [[_figure(found.get((engine, cell.name))) for cell in columns] for engine in names]
    widths = [max(len(row[column]) for row in texts) for column in range(len(columns))]
    lines = []
    for label, row in zip([name, *names], texts, strict=True):
        aligned = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join([label.ljust(NAME_WIDTH), *aligned]))
    return "\n".join(lines)


def _figure(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.median is None:
        return "failed"
    text = f"{row.median:.3g}" if row.median < 100 else f"{row.median:.0f}"
    if row.spread is not None and len(row.values) > 1:
        text += f" ±{row.spread / 2:.0%}"
    if row.roof:
        text += f" ({row.median / row.roof:.0%})"
    return text


def _ratio_line(ratio: Ratio) -> str:
    where = f"{ratio.checkpoint} {ratio.cell}"
    return f"{where.ljust(NAME_WIDTH)}  {ratio.ratio:6.2f}  {ratio.ours} / {ratio.against}, {ratio.rounds} rounds"


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
