"""The figures as a picture: a row of panels for each checkpoint, a bar for each engine, the roof as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Engine
from cierzo.bench.peers.results import OURS, Row
from cierzo.engine.errors import ConfigError

OUR_COLORS = ("#b3362b", "#d97b66", "#ecb8a6")
PEER_COLORS = ("#22577a", "#38a3a5", "#57a773", "#9aa6b2", "#6d6875", "#b5838d", "#457b9d", "#84a98c")
PANEL_INCHES = (2.1, 2.6)
PLOTTED = ("decode", "prefill", "served", "memory")


def plot(rows: Sequence[Row], cells: Sequence[Cell], engines: Sequence[Engine], title: str, path: Path) -> None:
    """Write a PNG. Bars are medians, whiskers the least and the most. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{path} needs matplotlib: pip install 'cierzo[bench]'", field="output") from error
    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    shown = [row for row in rows if row.median is not None]
    checkpoints = list(dict.fromkeys(row.checkpoint for row in shown))
    columns = [cell for cell in cells if cell.kind in PLOTTED and any(row.cell == cell.name for row in shown)]
    names = [engine for engine in engines if any(row.engine == engine.name for row in shown)]
    if not checkpoints or not columns:
        raise ConfigError(f"nothing was measured that {path} could show", field="output", value=path)
    width, height = PANEL_INCHES
    figure, axes = pyplot.subplots(
        len(checkpoints),
        len(columns),
        figsize=(width * len(columns), height * len(checkpoints) + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for axes_row, checkpoint in zip(axes, checkpoints, strict=True):
        for axis, cell in zip(axes_row, columns, strict=True):
            panel = {row.engine: row for row in shown if (row.checkpoint, row.cell) == (checkpoint, cell.name)}
            _panel(axis, panel, names)
            axis.set_title(f"{cell.name}, {cell.unit}", fontsize=8)
        axes_row[0].set_ylabel(checkpoint, fontsize=9)
    handles = [patches.Patch(color=color) for color in _colors(names).values()]
    figure.legend(handles, [engine.name for engine in names], loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, panel: dict[str, Row], engines: Sequence[Engine]) -> None:
    """One cell of one checkpoint: an engine without a value leaves its place empty."""
    colors = _colors(engines)
    for place, engine in enumerate(engines):
        row = panel.get(engine.name)
        if row is None or row.median is None:
            continue
        whiskers = [[row.median - min(row.values)], [max(row.values) - row.median]]
        axis.bar(place, row.median, color=colors[engine.name], yerr=whiskers, error_kw={"linewidth": 0.8})
        if row.roof and engine.number_format == "bf16":
            axis.axhline(row.roof, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks([])
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _colors(engines: Sequence[Engine]) -> dict[str, str]:
    """Ours warm, the peers' cold."""
    colors, palettes = {}, {True: list(OUR_COLORS), False: list(PEER_COLORS)}
    for engine in engines:
        palette = palettes[engine.peer == OURS]
        colors[engine.name] = palette[0]
        palette.append(palette.pop(0))
    return colors
