"""From samples to the table's figures: medians, spreads, shares of the roof, ratios of paired rounds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cierzo.bench.peers.ceilings import Limits
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.peers.roof import roof
from cierzo.bench.peers.samples import Samples
from cierzo.bench.stats import median, paired_ratio, spread

OURS = "cierzo"
AGREEMENT_PERCENT = 95  # of first choices: less is told, and timed all the same
NUMBER_FORMATS = ("bf16", "int8", "int4")
SMALL4_OVER_SMALL3 = ("small4", "small3")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One engine in one cell. `rounds` and `values` go together; `roof` in the cell's unit; `error` if none ran.

    `note`: what the figure does not say: how near an agreement is, how many requests got no answer.
    """

    checkpoint: str
    engine: str
    cell: str
    unit: str
    rounds: list[int] = []
    values: list[float] = []
    median: float | None = None
    spread: float | None = None
    roof: float | None = None
    note: str = ""
    error: str = ""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as good as `against` our engine is: the median over `rounds` rounds that both ran."""

    checkpoint: str
    cell: str
    ours: str
    against: str
    ratio: float
    rounds: int


def rows(
    samples: Samples,
    checkpoints: Sequence[Checkpoint],
    engines: Sequence[Engine],
    cells: Sequence[Cell],
    limits: Limits | None,
) -> list[Row]:
    """Every engine in every cell that was tried."""
    found = []
    for checkpoint in checkpoints:
        for engine in engines:
            for cell in cells:
                values = samples.values(checkpoint.name, cell, engine.name)
                error = samples.error(checkpoint.name, cell, engine.name)
                if not values and not error:
                    continue
                limit = roof(cell, checkpoint.config(), engine.weight_bits, limits) if limits else None
                found.append(
                    Row(
                        checkpoint=checkpoint.name,
                        engine=engine.name,
                        cell=cell.name,
                        unit=cell.unit,
                        rounds=sorted(values),
                        values=[values[number] for number in sorted(values)],
                        median=median(list(values.values())) if values else None,
                        spread=spread(list(values.values())) if values else None,
                        roof=limit,
                        note=_note(samples, checkpoint, cell, engine),
                        error="" if values else error,
                    )
                )
    return found


def _note(samples: Samples, checkpoint: Checkpoint, cell: Cell, engine: Engine) -> str:
    raws = [sample.raw for sample in samples.of(checkpoint.name, cell, engine.name) if sample.value is not None]
    if cell.kind == "agreement" and raws:
        below = f"below {AGREEMENT_PERCENT} %, " if raws[-1]["top1_percent"] < AGREEMENT_PERCENT else ""
        return f"{below}near {raws[-1]['near_percent']:.1f} %, RMS {raws[-1]['rms_logprob']:.4f} nats"
    if cell.kind == "served" and (lost := sum(sum(raw["errors"].values()) for raw in raws)):
        return f"{lost} of {len(raws) * cell.requests} requests got no answer"
    return ""


def ratios(
    samples: Samples, checkpoints: Sequence[Checkpoint], engines: Sequence[Engine], cells: Sequence[Cell]
) -> list[Ratio]:
    """What the targets are about: bf16 against the best peer in bf16; int8 against our bf16 and llama.cpp's Q8_0;
    int4 against our int8."""
    ours = {engine.number_format: engine.name for engine in engines if engine.peer == OURS}
    peers = [engine for engine in engines if engine.peer != OURS]
    found = []
    for checkpoint in checkpoints:
        for cell in cells:
            pairs = [(ours.get("bf16"), best(samples, checkpoint, cell, peers, "bf16"))]
            pairs += [(ours.get("int8"), ours.get("bf16"))]
            pairs += [(ours.get("int8"), best(samples, checkpoint, cell, peers, "q8_0"))]
            pairs += [(ours.get("int4"), ours.get("int8"))]
            for one, other in pairs:
                if one is not None and other is not None:
                    found += ratio(samples, checkpoint, cell, one, other)
    return found


def best(
    samples: Samples, checkpoint: Checkpoint, cell: Cell, engines: Sequence[Engine], number_format: str
) -> str | None:
    """The engine of this number format with the best median; None if none has a value."""
    medians = {
        engine.name: median(list(values.values()))
        for engine in engines
        if engine.number_format == number_format and (values := samples.values(checkpoint.name, cell, engine.name))
    }
    choose = max if cell.higher_is_better else min
    return choose(medians, key=medians.__getitem__) if medians else None


def ratio(samples: Samples, checkpoint: Checkpoint, cell: Cell, ours: str, against: str) -> list[Ratio]:
    """The ratio as a list of one, above 1 where ours is better; empty where no round has both."""
    one = samples.values(checkpoint.name, cell, ours)
    other = samples.values(checkpoint.name, cell, against)
    common = sorted(one.keys() & other.keys())
    if not common or cell.kind == "agreement":
        return []
    pair = [one[number] for number in common], [other[number] for number in common]
    value = paired_ratio(*(pair if cell.higher_is_better else pair[::-1]))
    return [
        Ratio(
            checkpoint=checkpoint.name, cell=cell.name, ours=ours, against=against, ratio=value, rounds=len(common)
        )
    ]


def close_pairs(found: Sequence[Ratio], engines: Sequence[Engine], below: float) -> set[tuple[str, ...]]:
    """(checkpoint, cell, engine) of both sides of each ratio of ours to a peer's that is under `below`."""
    peers = {engine.name for engine in engines if engine.peer != OURS}
    return {
        (entry.checkpoint, entry.cell, engine)
        for entry in found
        if entry.ratio < below and entry.against in peers
        for engine in (entry.ours, entry.against)
    }


def small4_over_small3(samples: Samples, cell: Cell, engines: Sequence[Engine]) -> list[Ratio]:
    """For each engine that ran both checkpoints: requests per second of Small 4's over those of Small 3's."""
    found = []
    for engine in engines:
        small4, small3 = (samples.values(name, cell, engine.name) for name in SMALL4_OVER_SMALL3)
        common = sorted(small4.keys() & small3.keys())
        if common and cell.kind == "served":
            value = paired_ratio([small4[n] for n in common], [small3[n] for n in common])
            over = f"{engine.name} on {SMALL4_OVER_SMALL3[1]}"
            found.append(
                Ratio(
                    checkpoint=SMALL4_OVER_SMALL3[0],
                    cell=cell.name,
                    ours=engine.name,
                    against=over,
                    ratio=value,
                    rounds=len(common),
                )
            )
    return found
