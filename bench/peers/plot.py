"""The figures as a picture: a line of panels for each checkpoint, a bar for each engine, the limit as a line."""

from __future__ import annotations

import functools
import itertools
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
    checkpoints, cells = ({row.subject.checkpoint: 0 for row in rows}, {row.cell: 0 for row in rows})
    panels = []
    for checkpoint, cell in itertools.product(checkpoints, cells):
        mine = [row for row in rows if (row.subject.checkpoint, row.cell) == (checkpoint, cell)]
        panels.append(functools.partial(_panel, f"{checkpoint}: {cell.name}, {cell.unit}", mine, colors))
    title = f"{found.device}, {found.identity['commit']}"
    plot.plot(path, title, panels, len(cells), PANEL_INCHES, colors)


def _panel(title: str, rows: list[Row], colors: dict[str, str], axis: Any) -> None:
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
