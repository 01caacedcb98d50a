"""The outcome from samples: values with the machine's limit and notes, ratios, what is close."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import outcome
from cierzo.bench.campaign.store import Store
from cierzo.bench.peers.cells import Cell, Subject
from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.revision import ROOT
from cierzo.bench.stats import median
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
AGREEMENT_PERCENT = 95  # of first choices: less is told, and timed all the same
SMALL4_OVER_SMALL3 = ("small4", "small3")
WEIGHTS = {"q8_0": "int8"}  # a peer's number format -> what its limit is counted in; else its own name


def outcome_of(
    store: Store,
    checkpoints: Sequence[Checkpoint],
    engines: Sequence[Engine],
    cells: Sequence[Cell],
) -> Outcome:
    """Every engine in every cell that was tried, with the targets' ratios and Small 4's over Small 3's."""
    ceilings = msgspec.convert(store.ceilings(), list[machine.Ceilings])
    device = machine.limit_device(machine.middle(ceilings)) if ceilings else None
    models = {checkpoint.name: read_model_config(checkpoint.path) for checkpoint in checkpoints} if device else {}
    by_name = {engine.name: engine for engine in engines}

    def complete(row: Row) -> Row:
        cell, subject = row.cell, row.subject
        found = None
        if device is not None:
            found = limit(cell, models[subject.checkpoint], by_name[subject.engine].number_format, device)
        return msgspec.structs.replace(row, limit=found, note=_note(store, cell, subject), result=None)

    places = [
        (cell, Subject(checkpoint.name, engine.name))
        for checkpoint in checkpoints
        for cell in cells
        for engine in engines
    ]
    names = [checkpoint.name for checkpoint in checkpoints]
    found = ratios(store, names, engines, cells) + [
        one for cell in cells if cell.kind == "served" for one in small4_over_small3(store, cell, engines)
    ]
    return Outcome(
        identity=store.identity,
        ceilings=ceilings,
        rows=outcome.rows(store, places, functools.partial(values, store), complete),
        ratios=found,
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
        rows, context = float(cell.batch), cell.batch * (cell.prompt_tokens + cell.new_tokens / 2)
        tokens = rows
        shape = StepShape(absorbed_tokens=rows, absorbed_pairs=context, absorbed_context=context, sampled=rows)
    elif cell.kind == "prefill":
        rows, tokens = 1.0, float(cell.prompt_tokens)
        pairs = tokens * (tokens + 1) / 2
        shape = StepShape(expanded_tokens=tokens, expanded_pairs=pairs, expanded_context=tokens, sampled=rows)
    else:
        return None
    formats = NumberFormats(weights=WEIGHTS.get(number_format, number_format), on_gpu=False)
    work = step_work(model, model.cache_layout(1, "bfloat16"), formats, shape)
    return tokens / float(step_time(device, work, rows=rows).limit_s)


def _note(store: Store, cell: Cell, subject: Subject) -> str:
    """Note that says how near an agreement is, or how many requests got no answer."""
    raws = [result["raw"] for result in store.measured(cell, subject).values()]
    if cell.kind == "agreement" and raws:
        below = f"below {AGREEMENT_PERCENT} %, " if raws[-1]["top1_percent"] < AGREEMENT_PERCENT else ""
        return f"{below}near {raws[-1]['near_percent']:.1f} %, RMS {raws[-1]['rms_logprob']:.4f} nats"
    if cell.kind == "served" and (lost := sum(sum(raw["errors"].values()) for raw in raws)):
        return f"{lost} of {len(raws) * cell.requests} requests got no answer"
    return ""


def ratios(
    store: Store, checkpoints: Sequence[str], engines: Sequence[Engine], cells: Sequence[Cell]
) -> list[Ratio]:
    """Ratios that say how many times as good ours are, for the targets: bf16 against the best peer in bf16; int8
    against our bf16 and llama.cpp's Q8_0; int4 against our int8."""
    ours = {engine.number_format: engine.name for engine in engines if engine.peer == OURS}
    peers = [engine for engine in engines if engine.peer != OURS]
    found = []
    for checkpoint in checkpoints:
        for cell in cells:
            pairs = [(ours.get("bf16"), best(store, checkpoint, cell, peers, "bf16"))]
            pairs += [(ours.get("int8"), ours.get("bf16"))]
            pairs += [(ours.get("int8"), best(store, checkpoint, cell, peers, "q8_0"))]
            pairs += [(ours.get("int4"), ours.get("int8"))]
            for one, other in pairs:
                if one is not None and other is not None:
                    found.append(_times(store, cell, Subject(checkpoint, one), Subject(checkpoint, other)))
    return [one for one in found if one is not None]


def best(store: Store, checkpoint: str, cell: Cell, engines: Sequence[Engine], number_format: str) -> str | None:
    """The engine of this number format with the best median; None if none has a value."""
    medians = {
        engine.name: median(list(by_round.values()))
        for engine in engines
        if engine.number_format == number_format
        and (by_round := values(store, cell, Subject(checkpoint, engine.name)))
    }
    choose = max if cell.higher_is_better else min
    return choose(medians, key=medians.__getitem__) if medians else None


def _times(store: Store, cell: Cell, ours: Subject, against: Subject) -> Ratio | None:
    """Ratio that is above 1 where ours is better, whichever way the cell counts."""
    if cell.kind == "agreement":
        return None
    pair: tuple[Mapping[int, float], Mapping[int, float]] = values(store, cell, ours), values(store, cell, against)
    return outcome.ratio(cell, ours, against, pair if cell.higher_is_better else pair[::-1])


def close_places(found: Sequence[Ratio], engines: Sequence[Engine], below: float) -> set[tuple[Cell, Subject]]:
    """The two sides of each ratio of ours to a peer's that is under `below`."""
    peers = {engine.name for engine in engines if engine.peer != OURS}
    return {
        (one.cell, subject)
        for one in found
        if one.ratio < below and one.against.engine in peers
        for subject in (one.ours, one.against)
    }


def small4_over_small3(store: Store, cell: Cell, engines: Sequence[Engine]) -> list[Ratio]:
    """For each engine that ran both checkpoints: Small 4's figure over Small 3's."""
    pairs = [[Subject(name, engine.name) for name in SMALL4_OVER_SMALL3] for engine in engines]
    found = [_times(store, cell, small4, small3) for small4, small3 in pairs]
    return [one for one in found if one is not None]


def _short(sample: Any) -> dict[str, Any]:
    """A sample without the times of single tokens and requests, which the file of samples has; paths are those
    from the repository's root."""
    told = {name: getattr(sample, name) for name in sample.__slots__}
    if isinstance(sample.result, dict) and "raw" in sample.result:
        raw = sample.result["raw"]
        if isinstance(raw, list):
            raw = None
        elif isinstance(raw, dict):
            raw = {name: value for name, value in raw.items() if name != "samples"}
        command = sample.result["command"].replace(f"{ROOT}/", "")
        told["result"] = {**sample.result, "raw": raw, "command": command}
    return told
