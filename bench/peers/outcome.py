"""The end of a run: the table on the terminal and in a file, JSON, PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.peers.ceilings import Limits, limits
from cierzo.bench.peers.cells import BY_PRODUCTS, Cell
from cierzo.bench.peers.engine import Engine
from cierzo.bench.peers.environments import RECIPES, Recipe
from cierzo.bench.peers.plot import plot
from cierzo.bench.peers.results import Ratio, Row, ratios, rows, small4_over_small3
from cierzo.bench.peers.run import CEILINGS, MACHINE, Plan
from cierzo.bench.peers.samples import Sample, Samples
from cierzo.bench.peers.table import table
from cierzo.bench.report import make_report, write_report
from cierzo.engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # of the repository


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, of which versions."""

    commit: str
    checkpoints: list[str]
    engines: list[Engine]
    cells: list[Cell]
    rounds: int
    close_rounds: int
    recipes: dict[str, Recipe]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All figures; `samples` are those of every round, but for the times of single tokens. Ceilings by round."""

    ceilings: list[Any]
    rows: list[Row]
    ratios: list[Ratio]
    samples: list[Sample]


def write_outcome(plan: Plan, samples: Samples, stem: Path, *, command: str, started: str, commit: str) -> bool:
    """Print the table, write `stem`.txt, .json and .png; whether every cell that was tried has a figure."""
    columns = [*plan.cells, *BY_PRODUCTS]
    measured = [sample.raw for sample in samples.of("", CEILINGS, MACHINE) if sample.value is not None]
    found_limits = limits(measured)
    found = rows(samples, plan.checkpoints, plan.engines, columns, found_limits)
    compared = ratios(samples, plan.checkpoints, plan.engines, columns)
    for cell in plan.cells:
        compared += small4_over_small3(samples, cell, plan.engines)
    head = f"{command}, commit {commit}\n{_describe(found_limits)}"
    text = f"{head}\n\n{table(found, compared, columns, plan.engines)}"
    print(f"\n{text}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    settings = Settings(
        commit=commit,
        checkpoints=[checkpoint.name for checkpoint in plan.checkpoints],
        engines=plan.engines,
        cells=plan.cells,
        rounds=plan.rounds,
        close_rounds=plan.close_rounds,
        recipes=RECIPES,
    )
    outcome = Outcome(ceilings=measured, rows=found, ratios=compared, samples=[_short(s) for s in samples])
    report = make_report("peers", command=command, started=started, settings=settings, results=outcome)
    write_report(report, stem.with_suffix(".json"))
    try:
        plot(found, columns, plan.engines, f"{report.machine.processor}, {commit}", stem.with_suffix(".png"))
    except ConfigError as error:
        print(f"no picture: {error}")
    return all(not row.error for row in found)


def _describe(found: Limits | None) -> str:
    if found is None:
        return "the machine's ceilings were not measured: no shares of the roof"
    return (
        f"ceilings, median of the rounds: {found.read_gb_per_s:.1f} GB/s read, "
        f"{found.bf16_gop_per_s:.0f} GFLOP/s in bf16, {found.int8_gop_per_s:.0f} GOP/s in int8"
    )


def _short(sample: Sample) -> Sample:
    """Without the times of single tokens and requests, which the file of samples keeps; paths from the root."""
    sample = msgspec.structs.replace(sample, command=sample.command.replace(f"{ROOT}/", ""))
    if sample.cell.kind in ("decode", "prefill") and isinstance(sample.raw, list):
        return msgspec.structs.replace(sample, raw=None)
    if sample.cell.kind == "served" and isinstance(sample.raw, dict):
        raw = {name: value for name, value in sample.raw.items() if name != "samples"}
        return msgspec.structs.replace(sample, raw=raw)
    return sample
