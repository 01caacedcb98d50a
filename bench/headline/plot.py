"""Latency against throughput, as a picture: a panel for each length of requests, a curve for each subject."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.campaign import plot
from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.headline.table import Outcome, Row

PANEL_INCHES = (3.6, 2.9)
COLUMNS = 3
Curve = list[tuple[float, float, int, bool]]  # latency, requests per second, concurrency, whether measured
Panel = tuple[str, str, float | None, dict[Subject, Curve]]  # title, what latency it is, its limit, curves


def picture(outcome: Outcome, path: Path) -> None:
    """Write a PNG: filled marks are loads, hollow ones forecasts. Raises ConfigError."""
    colors = plot.colors((row.subject for row in outcome.rows), lambda subject: subject.model == "small4")
    name = outcome.device.partition(":")[0] if outcome.is_simulation else outcome.device
    title = f"Small 4 against Small 3 on {name}, {outcome.identity['commit']}"
    title = f"SIMULATION: {title}" if outcome.is_simulation else title
    draws = [functools.partial(_draw, panel=panel, colors=colors) for panel in panels(outcome.rows)]
    plot.plot(path, title, draws, COLUMNS, PANEL_INCHES, {str(subject): color for subject, color in colors.items()})


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Cells of one length and profile make a curve of concurrencies; a search makes one of its own."""
    found: list[Panel] = []
    for key in dict.fromkeys(_key(row.cell) for row in rows):
        curves: dict[Subject, Curve] = {}
        mine = [row for row in rows if _key(row.cell) == key and row.result is not None]
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
    assert row.result is not None
    figure = row.result.figure
    if row.cell.concurrency is None:
        return [
            (point.time_per_output_token_s * 1e3, point.requests_per_s, point.concurrency, point.measured)
            for point in row.result.points
        ]
    return [(figure.completion_s.p50, figure.requests_per_s, figure.concurrency, True)]


def _draw(axis: Any, *, panel: Panel, colors: dict[Subject, str]) -> None:
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
