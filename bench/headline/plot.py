"""Latency against throughput, as a picture: a panel for each length of requests, a curve for each subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.headline.outcome import Outcome, Row
from cierzo.engine.errors import ConfigError

COLORS = {
    "small4": ("#b3362b", "#e08a5b", "#d4a017", "#f2b8a0"),
    "small3": ("#22577a", "#38a3a5", "#80b918", "#9aa6b2"),
}
PANEL_INCHES = (3.6, 2.9)
COLUMNS = 3
Curve = list[tuple[float, float, int, bool]]  # latency, requests per second, concurrency, whether measured
Panel = tuple[str, str, float | None, dict[Subject, Curve]]  # title, what latency it is, its limit, curves


def plot(outcome: Outcome, path: Path) -> None:
    """Write a PNG: filled marks are loads, hollow ones forecasts. Raises ConfigError
    without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{path} needs matplotlib: pip install 'cierzo[bench]'", field="output") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    shown = panels(outcome.rows)
    if not shown:
        raise ConfigError(f"nothing was measured that {path} could show", field="output", value=path)
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 1.1)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    colors = _colors(outcome.rows)
    for axis, panel in zip(axes.flat, shown, strict=False):
        _draw(axis, panel, colors)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()]
    figure.legend(handles, [str(subject) for subject in colors], loc="outside lower center", ncols=3, fontsize=8)
    name = outcome.device.partition(":")[0] if outcome.simulation else outcome.device
    title = f"Small 4 against Small 3 on {name}, {outcome.commit}"
    figure.suptitle(f"SIMULATION: {title}" if outcome.simulation else title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Cells of one length and profile make a curve of concurrencies; a search makes one of its own."""
    found: list[Panel] = []
    for key in dict.fromkeys(_key(row.cell) for row in rows):
        curves: dict[Subject, Curve] = {}
        mine = [row for row in rows if _key(row.cell) == key and row.measurement is not None]
        for row in mine:
            curves.setdefault(row.subject, []).extend(_points(row))
        if not mine:
            continue
        profile, input_tokens, output_tokens = key
        searched = any(row.cell.concurrency is None for row in mine)
        title = f"{profile}: {input_tokens:,} in, {output_tokens:,} out"
        latency = "median time per output token, ms" if searched else "median completion, s"
        found.append((title, latency, LIMIT_S * 1e3 if searched else None, curves))
    return found


def _key(cell: Cell) -> tuple[str, int, int]:
    return cell.profile, cell.input_tokens, cell.output_tokens


def _points(row: Row) -> Curve:
    assert row.measurement is not None
    figure = row.measurement.figure
    if row.cell.concurrency is None:
        return [
            (point.time_per_output_token_s * 1e3, point.requests_per_s, point.concurrency, point.measured)
            for point in row.measurement.points
        ]
    return [(figure.completion_s.p50, figure.requests_per_s, figure.concurrency, True)]


def _draw(axis: Any, panel: Panel, colors: dict[Subject, str]) -> None:
    title, latency, limit, curves = panel
    for subject, curve in curves.items():
        color = colors[subject]
        ordered = sorted(curve, key=lambda point: point[2])
        axis.plot([p[0] for p in ordered], [p[1] for p in ordered], color=color, linewidth=1)
        for x, y, concurrency, measured in ordered:
            face = color if measured else "white"
            axis.plot(x, y, marker="o", markersize=4, color=color, markerfacecolor=face)
            if measured and limit is None:
                axis.annotate(f"{concurrency:,}", (x, y), fontsize=6, xytext=(3, -7), textcoords="offset points")
    if limit is not None:
        axis.axvline(limit, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, 1.6 * limit)
    else:
        axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(latency, fontsize=7)
    axis.set_ylabel("requests/s", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _colors(rows: Sequence[Row]) -> dict[Subject, str]:
    """Small 4 warm, Small 3 cold."""
    colors: dict[Subject, str] = {}
    for subject in dict.fromkeys(row.subject for row in rows):
        palette = COLORS[subject.model]
        colors[subject] = palette[sum(other.model == subject.model for other in colors) % len(palette)]
    return colors
