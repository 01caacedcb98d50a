"""The outcome from samples: values with the machine's limit and notes, ratios; its text and its picture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import outcome, plot, table
from cierzo.bench.campaign.store import Store
from cierzo.bench.peers.engine import CHECKPOINTS, Cell, Engine, Subject
from cierzo.bench.revision import ROOT
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import step_time
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import StepShape, step_work
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config

Row = outcome.Row[Cell, Subject, None]
Ratio = outcome.Ratio[Cell, Subject]
Outcome = outcome.Outcome[Cell, Subject, None]
OURS = "cierzo"
# Our number format, and what it is compared with: whether that is ours too, and its number format.
TARGETS = (("bf16", False, "bf16"), ("int8", True, "bf16"), ("int8", False, "q8_0"), ("int4", True, "int8"))
PANEL_INCHES = (2.1, 2.6)
PLOTTED = ("decode", "prefill", "served", "memory")
AGREEMENT_PERCENT = 95  # of first choices: less is told, and timed all the same
WEIGHTS = {"q8_0": "int8"}  # a peer's number format -> what its limit is counted in; else its own name


def outcome_of(
    checkpoints: Sequence[Path], engines: Sequence[Engine], cells: Sequence[Cell], store: Store
) -> Outcome:
    """Every engine in every cell that was tried, with the targets' ratios and Small 4's over Small 3's."""
    ceilings = msgspec.convert(store.ceilings(), list[machine.Ceilings])
    device = machine.limit_device(machine.middle(ceilings)) if ceilings else None
    models = {checkpoint.name: read_model_config(checkpoint) for checkpoint in checkpoints} if device else {}
    formats = {engine.name: engine.number_format for engine in engines}

    def about(cell: Cell, subject: Subject, result: Any) -> dict[str, Any]:
        """How fast the machine could be, how near an agreement is, how many requests got no answer."""
        found = device and limit(cell, models[subject.checkpoint], formats[subject.engine], device)
        raws, note = [result["raw"] for result in store.measured(cell, subject).values()], ""
        if cell.kind == "agreement" and raws:
            below = f"below {AGREEMENT_PERCENT} %, " if raws[-1]["top1_percent"] < AGREEMENT_PERCENT else ""
            note = f"{below}near {raws[-1]['near_percent']:.1f} %, RMS {raws[-1]['rms_logprob']:.4f} nats"
        elif cell.kind == "served" and (lost := sum(sum(raw["errors"].values()) for raw in raws)):
            note = f"{lost} of {len(raws) * cell.requests} requests got no answer"
        return {"limit": found, "note": note}

    places = [
        (cell, Subject(checkpoint.name, engine.name))
        for checkpoint, cell, engine in itertools.product(checkpoints, cells, engines)
    ]
    return Outcome(
        identity=store.identity,
        ceilings=ceilings,
        rows=outcome.rows(store, places, functools.partial(values, store), about),
        ratios=ratios(store, checkpoints, engines, cells),
        samples=[_short(sample) for sample in store],
    )


def values(store: Store, cell: Cell, subject: Subject) -> dict[int, float]:
    """Value by round. The last one counts; of memory, which sessions of a round may report apart, the most."""
    found: dict[int, float] = {}
    for sample in store.of(cell, subject):
        if not sample.error:
            before = found.get(sample.round, 0.0) if cell.kind == "memory" else 0.0
            found[sample.round] = max(sample.result["value"], before)
    return found


def limit(cell: Cell, model: ModelConfig, number_format: str, device: Device) -> float | None:
    """Tokens per second of a decode or prefill cell if the machine's ceilings alone decided; for others None."""
    if cell.kind == "decode":
        pieces = [(cell.prompt_tokens + cell.new_tokens / 2 - 1, 1)] * cell.batch
    elif cell.kind == "prefill":
        pieces = [(0.0, cell.prompt_tokens)]
    else:
        return None
    shape = StepShape.of(pieces, generated=cell.kind == "decode")
    formats = NumberFormats(weights=WEIGHTS.get(number_format, number_format), on_gpu=False)
    work = step_work(model, model.cache_layout(1, "bfloat16"), formats, shape)
    return float(shape.tokens / step_time(device, work, rows=shape.sampled).limit_s)


def ratios(
    store: Store, checkpoints: Sequence[Path], engines: Sequence[Engine], cells: Sequence[Cell]
) -> list[Ratio]:
    """How many times as good ours are, for the targets: bf16 against the best peer in bf16; int8 against our bf16
    and llama.cpp's Q8_0; int4 against our int8. Then, where an engine served both, Small 4's figure over Small 3's.
    """

    def good(cell: Cell, subject: Subject) -> dict[int, float]:
        """Value by round, or its inverse where less is better; agreement is no rate, and has none."""
        found = values(store, cell, subject) if cell.kind != "agreement" else {}
        return {number: 1 / value if cell.kind in ("load", "memory") else value for number, value in found.items()}

    found = []
    for checkpoint, cell in itertools.product(checkpoints, cells):
        best: dict[tuple[bool, str], Subject] = {}  # by whether it is ours, and number format: with the best median
        medians: dict[Subject, float] = {}
        for engine in engines:
            place, subject = (engine.peer == OURS, engine.number_format), Subject(checkpoint.name, engine.name)
            if by_round := good(cell, subject):
                medians[subject] = median(by_round.values())
                best[place] = max(best.get(place, subject), subject, key=medians.__getitem__)
        for number_format, are_both_ours, against in TARGETS:
            one, other = best.get((True, number_format)), best.get((are_both_ours, against))
            if one and other:
                found.append(outcome.ratio(cell, one, other, good))
    for cell, engine in itertools.product(cells, engines):
        if cell.kind == "served":
            small4, small3 = (Subject(name, engine.name) for name in CHECKPOINTS)
            found.append(outcome.ratio(cell, small4, small3, good))
    return [one for one in found if one.rounds]


def _short(sample: Any) -> dict[str, Any]:
    """A sample without the times of single tokens and requests, which the file of samples has; paths are those
    from the repository's root."""
    told = {name: getattr(sample, name) for name in sample.__slots__}
    if "raw" in (result := sample.result or {}):
        raw = result["raw"] if isinstance(result["raw"], dict) else None
        raw = raw and {name: value for name, value in raw.items() if name != "samples"}
        told["result"] = result | {"raw": raw, "command": result["command"].replace(f"{ROOT}/", "")}
    return told


def text(found: Outcome, command: str) -> str:
    """Medians with half their spread, from two rounds on, and the share of what the ceilings would allow."""
    grids = [_checkpoint(found, name) for name in dict.fromkeys(row.subject.checkpoint for row in found.rows)]
    grids.append(table.grid_of("median of paired rounds", [_ratio(one) for one in found.ratios]))
    return table.page(outcome.head(found, command), grids, outcome.notes(found))


def _checkpoint(found: Outcome, name: str) -> table.Grid:
    """A row for each engine, a column for each cell."""
    rows = [row for row in found.rows if row.subject.checkpoint == name]
    columns = dict.fromkeys((f"{row.cell.name}, {row.cell.unit}" for row in rows), "-")
    lines = {row.subject.engine: {name: row.subject.engine, **columns} for row in rows}
    for row in rows:
        share = f" ({median(row.values) / row.limit:.0%})" if row.limit and row.values else ""
        figure = f"{table.middle(row.values, 3)}{share}" if row.values else "failed"
        lines[row.subject.engine][f"{row.cell.name}, {row.cell.unit}"] = figure
    return table.grid_of("", list(lines.values()))


def _ratio(one: Ratio) -> dict[str, str]:
    elsewhere = "" if one.against.checkpoint == one.ours.checkpoint else f" on {one.against.checkpoint}"
    return {
        "": f"{one.ours.checkpoint} {one.cell.name}",
        "times as good": f"{one.ratio:.2f}",
        "is": one.ours.engine,
        "as": f"{one.against.engine}{elsewhere}",
        "rounds": str(one.rounds),
    }


def picture(found: Outcome, path: Path) -> None:
    """Write a PNG. Bars are medians, whiskers the least and the most. Raises ConfigError."""
    rows = [row for row in found.rows if row.values and row.cell.kind in PLOTTED]
    colors = plot.colors((row.subject.engine for row in rows), lambda engine: engine.startswith(OURS))
    checkpoints, cells = ({row.subject.checkpoint: 0 for row in rows}, {row.cell: 0 for row in rows})
    panels = []
    for checkpoint, cell in itertools.product(checkpoints, cells):
        mine = [row for row in rows if (row.subject.checkpoint, row.cell) == (checkpoint, cell)]
        panels.append(functools.partial(_panel, f"{checkpoint}: {cell.name}, {cell.unit}", mine, colors))
    title = f"{found.identity['device']}, {found.identity['commit']}"
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
