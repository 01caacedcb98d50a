"""Latency against throughput, as a picture: a panel for each length of requests, a curve for each subject."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.campaign import plot
from cierzo.bench.headline.cells import LIMIT_S, Subject
from cierzo.bench.headline.outcome import Outcome, Row

PANEL_INCHES = (3.6, 2.9)
COLUMNS = 3


def picture(outcome: Outcome, path: Path) -> None:
    """Write a PNG: filled marks are loads, hollow ones forecasts. Raises ConfigError."""
    colors = plot.colors((row.subject for row in outcome.rows), lambda subject: subject.model == "small4")
    name = outcome.device.partition(":")[0] if outcome.is_simulation else outcome.device
    title = f"Small 4 against Small 3 on {name}, {outcome.identity['commit']}"
    title = f"SIMULATION: {title}" if outcome.is_simulation else title
    draws = [functools.partial(_draw, panel, colors) for panel in panels(outcome.rows)]
    plot.plot(path, title, draws, COLUMNS, PANEL_INCHES, {str(subject): color for subject, color in colors.items()})


def panels(rows: Sequence[Row]) -> list[list[Row]]:
    """Cells of one length and profile make curves of concurrencies."""
    found: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row.result is not None:
            key = row.cell.profile, row.cell.input_tokens, row.cell.output_tokens
            found.setdefault(key, []).append(row)
    return list(found.values())


def _draw(rows: list[Row], colors: dict[Subject, str], axis: Any) -> None:
    cell, searched = rows[0].cell, rows[0].cell.concurrency is None
    curves: dict[Subject, list[tuple[float, float, int, bool]]] = {}  # latency, rate, concurrency, whether measured
    for row in rows:
        found = row.result
        assert found is not None
        curves.setdefault(row.subject, []).extend(
            [
                (one.time_per_output_token_s * 1e3, one.requests_per_s, one.concurrency, one.measured)
                for one in found.points
            ]
            or [(found.completion_s.p50, found.requests_per_s, found.concurrency, True)]
        )
    for subject, curve in curves.items():
        color = colors[subject]
        curve.sort(key=lambda point: point[2])
        axis.plot([point[0] for point in curve], [point[1] for point in curve], color=color, linewidth=1)
        for x, y, concurrency, measured in curve:
            axis.plot(x, y, marker="o", markersize=4, color=color, markerfacecolor=color if measured else "white")
            if not searched:
                axis.annotate(f"{concurrency:,}", (x, y), fontsize=6, xytext=(3, -7), textcoords="offset points")
    axis.set_xlim(left=0, right=1.6 * LIMIT_S * 1e3 if searched else None)
    axis.set_ylim(bottom=0)
    if searched:
        axis.axvline(LIMIT_S * 1e3, color="black", linewidth=0.8, linestyle="--")
    axis.set_title(f"{cell.profile}: {cell.input_tokens:,} in, {cell.output_tokens:,} out", fontsize=8)
    axis.set_xlabel("median time per output token, ms" if searched else "median completion, s", fontsize=7)
    axis.set_ylabel("requests/s", fontsize=7)
