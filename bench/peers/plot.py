"""The figures as a picture: a line of panels for each checkpoint, a bar for each engine, the limit as a line."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from cierzo.bench.campaign import plot
from cierzo.bench.peers.results import OURS, Outcome, Row
from cierzo.bench.stats import median

PANEL_INCHES = (2.1, 2.6)
PLOTTED = ("decode", "prefill", "served", "memory")


def picture(found: Outcome, path: Path) -> None:
    """Write a PNG. Bars are medians, whiskers the least and the most. Raises ConfigError."""
    rows = [row for row in found.rows if row.values and row.cell.kind in PLOTTED]
    colors = plot.colors((row.subject.engine for row in rows), lambda engine: engine.startswith(OURS))
    cells = list(dict.fromkeys(row.cell for row in rows))
    panels = [
        functools.partial(
            _panel,
            title=f"{checkpoint}: {cell.name}, {cell.unit}",
            rows=[row for row in rows if (row.subject.checkpoint, row.cell) == (checkpoint, cell)],
            colors=colors,
        )
        for checkpoint in dict.fromkeys(row.subject.checkpoint for row in rows)
        for cell in cells
    ]
    title = f"{found.device}, {found.identity['commit']}"
    plot.plot(path, title, panels, len(cells), PANEL_INCHES, colors)


def _panel(axis: Any, *, title: str, rows: list[Row], colors: dict[str, str]) -> None:
    """A cell of a checkpoint: an engine without a value leaves its place empty. The limit is that of bf16."""
    places = {engine: place for place, engine in enumerate(colors)}
    for row in rows:
        middle, engine = median(row.values), row.subject.engine
        whiskers = [[middle - min(row.values)], [max(row.values) - middle]]
        axis.bar(places[engine], middle, color=colors[engine], yerr=whiskers, error_kw={"linewidth": 0.8})
        if row.limit and engine == f"{OURS}-bf16":
            axis.axhline(row.limit, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks([])
    axis.set_title(title, fontsize=7)
