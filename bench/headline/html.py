"""The outcome as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec

from cierzo.bench.headline.outcome import Outcome
from cierzo.bench.headline.table import EXPLAINED, Grid, grids, notes
from cierzo.bench.report import Report

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #1c2430 }
table { border-collapse: collapse; margin: 0 0 1.5em; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .4em 0 }
th, td { padding: .2em .7em; border-bottom: 1px solid #dde3ea; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.yes { color: #17683a; font-weight: 600 } td.no { color: #a3261b; font-weight: 600 }
.simulation { font-size: 3em; font-weight: 800; color: #a3261b; border: 4px solid; padding: .1em .5em }
img { max-width: 100% } div.wide { overflow-x: auto }
pre { background: #f4f6f8; padding: 1em; white-space: pre-wrap }
"""


def page(outcome: Outcome, report: Report, head: Sequence[str], picture: Path | None) -> str:
    """picture: a PNG, if there is one."""
    parts = ["<!doctype html>", '<html lang="en"><meta charset="utf-8">', "<title>Small 4 against Small 3</title>"]
    parts.append(f"<style>{STYLE}</style>")
    if outcome.simulation:
        parts.append('<p class="simulation">SIMULATION</p>')
    parts.append(f"<h1>Small 4 against Small 3 on {escape(outcome.device)}</h1>")
    parts.append(f"<pre>{escape(chr(10).join(head))}</pre>")
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="latency against throughput" src="data:image/png;base64,{data}">')
    parts += [_table(grid) for grid in grids(outcome)]
    if told := notes(outcome):
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in told) + "</ul>")
    parts.append("<h2>How to read it</h2>" + "".join(f"<p>{escape(line)}</p>" for line in EXPLAINED))
    parts.append("<h2>Settings</h2>" + _block(report.settings))
    parts.append("<h2>Machine and versions</h2>" + _block({"machine": report.machine, "versions": report.versions}))
    return "\n".join(parts) + "\n"


def _table(grid: Grid) -> str:
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in grid.heads) + "</tr>"]
    for row in grid.rows:
        cells = "".join(f"<td{_mark(text)}>{escape(text)}</td>" for text in row)
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><caption>{escape(grid.title)}</caption>{"".join(rows)}</table></div>'


def _mark(text: str) -> str:
    return {"yes": ' class="yes"', "NO": ' class="no"', "failed": ' class="no"'}.get(text, "")


def _block(value: object) -> str:
    return f"<pre>{escape(msgspec.json.format(msgspec.json.encode(value)).decode())}</pre>"
