"""The outcome from samples: values with the machine's limit and notes, ratios, what is close."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import outcome
from cierzo.bench.campaign.store import Store
from cierzo.bench.peers.cells import Cell, Subject
from cierzo.bench.peers.engine import CHECKPOINTS, Checkpoint, Engine
from cierzo.bench.revision import ROOT
from cierzo.bench.stats import median
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_time import step_time
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import StepShape, step_work
from cierzo.engine.model.config import ModelConfig, read_model_config

Row = outcome.Row[Cell, Subject, None]
Ratio = outcome.Ratio[Cell, Subject]
Outcome = outcome.Outcome[Cell, Subject, None]
OURS = "cierzo"
AGREEMENT_PERCENT = 95  # of first choices: less is told, and timed all the same
WEIGHTS = {"q8_0": "int8"}  # a peer's number format -> what its limit is counted in; else its own name


def outcome_of(
    checkpoints: Sequence[Checkpoint], engines: Sequence[Engine], cells: Sequence[Cell], store: Store
) -> Outcome:
    """Every engine in every cell that was tried, with the targets' ratios and Small 4's over Small 3's."""
    ceilings = msgspec.convert(store.ceilings(), list[machine.Ceilings])
    device = machine.limit_device(machine.middle(ceilings)) if ceilings else None
    models = {checkpoint.name: read_model_config(checkpoint.path) for checkpoint in checkpoints} if device else {}
    formats = {engine.name: engine.number_format for engine in engines}

    def about(cell: Cell, subject: Subject, result: Any) -> dict[str, Any]:
        found = device and limit(cell, models[subject.checkpoint], formats[subject.engine], device)
        return {"limit": found, "note": _note(store, cell, subject)}

    places = [
        (cell, Subject(checkpoint.name, engine.name))
        for checkpoint, cell, engine in itertools.product(checkpoints, cells, engines)
    ]
    return Outcome(
        identity=store.identity,
        ceilings=ceilings,
        rows=outcome.rows(store, places, functools.partial(values, store), about),
        ratios=ratios(store, checkpoints, engines, cells) + small4_over_small3(store, engines, cells),
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


def goodness(store: Store, cell: Cell, subject: Subject) -> dict[int, float]:
    """Value by round, or its inverse where less is better; agreement is no rate, and has none."""
    found = values(store, cell, subject) if cell.kind != "agreement" else {}
    return {number: value if cell.higher_is_better else 1 / value for number, value in found.items()}


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
    store: Store, checkpoints: Sequence[Checkpoint], engines: Sequence[Engine], cells: Sequence[Cell]
) -> list[Ratio]:
    """Ratios that say how many times as good ours are, for the targets: bf16 against the best peer in bf16; int8
    against our bf16 and llama.cpp's Q8_0; int4 against our int8."""
    good, found = functools.partial(goodness, store), []
    for checkpoint, cell in itertools.product(checkpoints, cells):
        best: dict[tuple[bool, str], Subject] = {}  # by whether it is ours, and number format: with the best median
        medians: dict[Subject, float] = {}
        for engine in engines:
            place, subject = (engine.peer == OURS, engine.number_format), Subject(checkpoint.name, engine.name)
            if by_round := good(cell, subject):
                medians[subject] = median(list(by_round.values()))
                best[place] = max(best.get(place, subject), subject, key=medians.__getitem__)
        for ours, against in (
            *(("bf16", (False, "bf16")), ("int8", (True, "bf16"))),
            *(("int8", (False, "q8_0")), ("int4", (True, "int8"))),
        ):
            if (True, ours) in best and against in best:
                found.append(outcome.ratio(cell, best[True, ours], best[against], good))
    return [one for one in found if one.rounds]


def close_places(
    store: Store, checkpoints: Sequence[Checkpoint], engines: Sequence[Engine], cells: Sequence[Cell], below: float
) -> set[tuple[Cell, Subject]]:
    """The two sides of each ratio of ours to a peer's that is under `below`."""
    peers = {engine.name for engine in engines if engine.peer != OURS}
    return {
        (one.cell, subject)
        for one in ratios(store, checkpoints, engines, cells)
        if one.ratio is not None and one.ratio < below and one.against.engine in peers
        for subject in (one.ours, one.against)
    }


def small4_over_small3(store: Store, engines: Sequence[Engine], cells: Sequence[Cell]) -> list[Ratio]:
    """For each engine that served both checkpoints: Small 4's figure over Small 3's."""
    found = []
    for cell, engine in itertools.product(cells, engines):
        if cell.kind == "served":
            small4, small3 = (Subject(name, engine.name) for name in CHECKPOINTS)
            found.append(outcome.ratio(cell, small4, small3, functools.partial(goodness, store)))
    return [one for one in found if one.rounds]


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
