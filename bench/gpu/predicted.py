"""Seconds of every operation on the cards, predicted from the machine code and the launches of today's kernels.

`make gpu-report TRITON=3.6` writes them to engine/cost/predicted.json, cell by cell under the names that `make gpu`
times: a dry run tells the launches, the report (ceilings.py) what the compiler made of each kernel, and
engine/cost/roofs.py the seconds. Cells are called as a step calls them (kernels/ops/compose.py, counted by
engine/cost/launched.py): with terms where those before them leave some, and with codes where a norm makes them.
`print_validation` sets the same roofs against what others have published of their kernels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cierzo.bench.gpu import nvrtc
from cierzo.bench.gpu.calls import expert_outputs, make_call
from cierzo.bench.gpu.cases import BY_FP8, CASES, SMALL3, SMALL4, Maker, Size
from cierzo.bench.gpu.configurations import digest, fingerprint
from cierzo.bench.gpu.loops import Loop, classes, functions, loops, main_loop, products, whole
from cierzo.engine.cost import operations, roofs
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.roofs import Code, Counts
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.cuda.launch.kernel import options, program
from cierzo.kernels.cuda.launch.sampling import draw_words
from cierzo.kernels.formats.activations import quantise_rows
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.triton.launch import Configuration, Launch, dry_run

PUBLISHED = Path(__file__).parents[1] / "results" / "validation-sm90.json"
CODE = ("warps", "registers", "shared_bytes", "stages")
WIDTH = 120
FILE = Path(operations.__file__).with_name("predicted.json")
PRICED = "3.6."  # the Triton of the machines that have cards
HOPPER = DATA_SHEETS["h100"]
CONTEXT = 4096
DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
PREFILLS = (512, 1024, 2048, 4096, 8192, 16_384)
SIZES = (
    *(Size(name=f"decode {n}", sequences=n, rows_each=1, context=CONTEXT) for n in DECODES),
    Size(name="decode 1 of 256k", sequences=1, rows_each=1, context=1 << 18),
    *(Size(name=f"prefill {n}", sequences=1, rows_each=n, context=n) for n in PREFILLS),
)
# What a step of each model launches; "linear_in": its product before attention, or MLA's of queries where there are
# prompts; "plan": what attention does once a step, for all layers.
LAUNCHED = {
    SMALL4: (
        "rope_tables", "plan", "latents_of", "linear_in", "absorbed_queries", "apply_rope", "rotate_and_absorb",
        "mla_prefill", "mla_values", "linear_terms", "add_rms_norm", "route_groups", "expert_terms", "lm_head",
        "draw",
    ),
    SMALL3: (
        "rope_tables", "plan", "linear_in", "rotate_and_write_keys_values", "gqa_prefill", "gqa_decode",
        "linear_terms", "add_rms_norm", "add_rms_norm_fp8", "gated_mlp", "lm_head", "draw",
    ),
}  # fmt: skip
ONCE = ("prefixes", "plan")  # kernels of "plan"
LEFT_OUT = "static fp8 x fp8"  # steps do not tell it from FP8 activations with a scale for each row
# 64 results a clock: CUDA programming guide, arithmetic instructions of compute capability 9.0.
HALF_RATE = ("LOP3", "SHF", "PRMT", "ALU")
# 16 a clock: MUFU by the same table; F2F stated, as MUFU (that Hopper converts slowly enough to limit kernels is
# what Triton's pull request 4563 found).
SLOW = ("F2F", "MUFU")
Lines = Mapping[str, Mapping[str, Any]]  # of the report (ceilings.py), by configuration
# Tensors of a launch of stages (kernels/triton/latent_products.py): of its norms, and of its product.
NORM = ("terms_ptr", "shares_ptr", "residual_ptr", "norm_ptr", "norm_static_ptr", "x_ptr", "x_scales_ptr")
PRODUCT = ("x_ptr", "x_scales_ptr", "codes_ptr", "scales_ptr", "row_scales_ptr", "parts_ptr")
DRAWN = "sample_draw_"  # launches of a draw; these read all logits:
DRAW_PASSES = ("highest", "bins", "collect", "pieces")


@dataclass(frozen=True, slots=True)
class Part:
    """Work of a launch, or of a stage of one: how far the main loop of each program goes, in its unit (ceilings.py:
    weights, tokens, turns; of the router multiplications), programs that work (None: all), and bytes that it moves
    (None: those of its tensors). before: the stage before it. rounds: turns of the loops around the main one."""

    units: float = 0.0
    programs: float | None = None
    num_bytes: float | None = None
    before: Part | None = None
    rounds: float = 1.0

    @property
    def stages(self) -> list[Part]:
        """All up to this one, in order."""
        return [*(self.before.stages if self.before else ()), self]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operation, whose launches are priced."""

    operation: str
    model: ModelSizes
    size: Size
    format: str
    work: Work
    arguments: tuple[Any, ...] = ()
    once: bool = False  # of its launches those that are made once a step count, else the others

    @property
    def distinct(self) -> float:
        """Experts that have rows, on average."""
        return float(operations.random_distinct(self.model.experts, self.model.top_k, self.size.rows))

    def expert_tiles(self, block_t: int) -> float:
        """Tiles of rows in which experts have any, on average: an expert's rows are a binomial number."""
        rows, share = self.size.rows, self.model.top_k / self.model.experts
        numbers = np.arange(1, rows + 1)
        ways = np.cumsum(np.log((rows + 1 - numbers) / numbers))
        chances = np.exp(ways + numbers * np.log(share) + (rows - numbers) * np.log1p(-share))
        return self.model.experts * float((chances * -(-numbers // block_t)).sum()) + ceil(rows / block_t)


def _experts(call: Call, seen: Launch) -> Part:
    """Experts that have rows: of all weights, beside which the shared one's lie, theirs are read."""
    c, moved, paired = seen.kernel.constants, seen.num_bytes, 2 if seen.kernel.name == "expert_gate_up" else 1
    reached = {name: call.distinct / call.model.experts for name in moved if f"shared_{name}" in moved}
    num_bytes = sum(number * reached.get(name, 1) for name, number in moved.items())
    programs = call.expert_tiles(c["BLOCK_T"]) * ceil(c["ROWS"] / paired / c["BLOCK_N"])
    return Part(c["BLOCK_N"] * paired * c["K"], programs, num_bytes)


def _linear(call: Call, seen: Launch) -> Part:
    """Products; of a head's queries MLA multiplies a part, so that there the call's bytes count."""
    c = seen.kernel.constants
    depth = ceil(min(c["PART_K"], c["K"]) / c["BLOCK_K"]) * c["BLOCK_K"] * (1 if c["APART"] else c["PARTS"])
    moved = float(call.work.num_bytes) if call.operation.startswith("mla_") else None
    return Part(c["BLOCK_N"] * (2 if c["PAIRED"] else 1) * depth, num_bytes=moved)


def _bytes(call: Call, seen: Launch, names: Iterable[str]) -> float:
    """Bytes that move of some tensors: a residual comes and goes, and of pages the step's entries go."""
    found = {name: seen.num_bytes[name] for name in names if name in seen.num_bytes}
    if "pages_ptr" in found:
        width = 2 if seen.kernel.types["pages_ptr"] == "*bf16" else 1
        found["pages_ptr"] = call.size.rows * call.model.page_values * width
    return float(sum(found.values()) + found.get("residual_ptr", 0))


def _rows(call: Call, seen: Launch) -> Part:
    return Part(num_bytes=_bytes(call, seen, seen.num_bytes))


def _stages(call: Call, seen: Launch) -> Part:
    """Norms, if there are terms to add up before; parts of a product, by programs of their own; their sum."""
    c, rows, moved = seen.kernel.constants, call.size.rows, seen.num_bytes
    firsts = ceil(rows / c["BLOCK_T"]) * ceil(c["ROWS"] / c["BLOCK_N"]) * c["PARTS"]
    norms, norm = (rows, Part(programs=rows, num_bytes=_bytes(call, seen, NORM))) if NORM[0] in moved else (0, None)
    depth = ceil(min(c["PART_K"], c["K"]) / c["BLOCK_K"]) * c["BLOCK_K"]
    parts = Part(c["BLOCK_N"] * depth, firsts, _bytes(call, seen, PRODUCT), norm)
    rest = {"parts_ptr", *moved} - {*NORM, *PRODUCT[:-1]}
    return Part(programs=prod(seen.grid) - firsts - norms, num_bytes=_bytes(call, seen, rest), before=parts)


def _attend(call: Call, seen: Launch) -> Part:
    """Decoding: an item's tile of rows meets its split of the context, and leaves partial sums, not results. A
    program that walks over parts of a split adds each up, in the loop around; what it adds up stays in L2."""
    rows, pairs, _ = call.size.queries()
    heads, value = call.model.heads, call.model.rank or call.model.head_dim
    moved = float(call.work.num_bytes) + heads * (seen.grid[0] * (value + 2) * 4 - rows * value * 2)
    return Part(pairs / seen.grid[0], num_bytes=moved, rounds=_rounds(call, seen))


def _rounds(call: Call, seen: Launch) -> int:
    """Parts of a split that a program walks over."""
    c, context = seen.kernel.constants, call.size.context
    size = c["LONG"] if context > c["SHORT"] * c["SHORTS"] else c["SHORT"]
    parts = c.get("LONG_PARTS" if context > c["SHORT"] * c["SHORTS"] else "SHORT_PARTS", 1)
    return ceil(min(context, size) * parts / size)


def _splits(call: Call, seen: Launch) -> float:
    """Partial results of a row."""
    c, context = seen.kernel.constants, call.size.context
    shorts = c["SHORT"] * c["SHORTS"]
    return min(context, shorts) / c["SHORT"] + max(context - shorts, 0) / c["LONG"]


def _turn(seen: Launch) -> int:
    """Partial results that a turn of the sum's loop adds."""
    c = seen.kernel.constants
    return int(c["CHUNK"] if c["SHORT_JOINS"] == c["LONG_JOINS"] == 1 else max(c["SHORT_JOINS"], c["LONG_JOINS"]))


def _combine(call: Call, seen: Launch) -> Part:
    value, splits = call.model.rank or call.model.head_dim, _splits(call, seen)
    moved = seen.grid[0] * seen.grid[1] * ((value + 2) * 4 * splits + value * 2)
    return Part(ceil(splits / _turn(seen)), num_bytes=moved)


def _values(call: Call, seen: Launch) -> Part:
    """Sums of some tokens' partial results, and a head's W_UV."""
    c, model, rows = seen.kernel.constants, call.model, call.size.rows
    splits = _splits(call, seen)
    moved = rows * model.heads * ((model.rank + 2) * 4 * splits + model.value_dim * 2)
    weights = model.heads * model.value_dim * model.rank * 2
    return Part(ceil(splits / _turn(seen)) * min(c["LIVE"], rows), num_bytes=moved + weights)


def _flash(call: Call, seen: Launch) -> Part:
    c, (rows, pairs, _) = seen.kernel.constants, call.size.queries()
    return Part(ceil((pairs / rows + c["ROWS"] / 2) / c["TOKENS"]) * c["TOKENS"])


def _expand(_: Call, seen: Launch) -> Part:
    return Part(seen.kernel.constants["COLUMNS"] * seen.kernel.constants["R"])


def _logits(call: Call, seen: Launch) -> Part:
    """The router, on FP32 units: 8 rows a warp, for one expert, or for four where rows are many."""
    model, wide = call.model, seen.warps > 4
    moved = call.size.rows * (model.hidden * 2 + model.experts * 4) + model.experts * model.hidden * 2
    return Part(8 * (4 if wide else 1) * seen.warps * model.hidden, num_bytes=moved)


# Of the others, such as those that write into pages, a call's bytes count. Arguments of CUDA C++ are addresses.
PARTS: dict[str, Callable[[Call, Launch], Part]] = {
    "expert_gate_up": _experts,
    "expert_down": _experts,
    "linear": _linear,
    **dict.fromkeys(("latents_of", "absorbed_queries"), _stages),
    **dict.fromkeys(("rms_norm", "add_rms_norm", "norm_latents", "rotate_and_absorb"), _rows),
    **dict.fromkeys(("gather", "quantise_pairs", "quantise_rows", "sum_parts"), lambda *_: Part()),
    "mla_attend": _attend,
    "gqa_attend": _attend,
    "combine": _combine,
    "values": _values,
    "expand": _expand,
    "flash": _flash,
    "route_logits_bf16_bf16": _logits,
    "route_groups_bf16_bf16": _logits,
    "route_choose": lambda call, _: Part(
        num_bytes=call.size.rows * (call.model.experts * 4 + call.model.top_k * 12)
    ),
    "count_by_expert": lambda call, _: Part(num_bytes=call.size.rows * call.model.top_k * 8),
    **dict.fromkeys(
        (f"{DRAWN}{name}" for name in DRAW_PASSES),
        lambda call, _: Part(num_bytes=call.size.sequences * call.model.vocab * 4),
    ),
    f"{DRAWN}cut": lambda call, _: Part(num_bytes=call.size.sequences * draw_words(1) * 8),
    f"{DRAWN}choose": lambda call, _: Part(num_bytes=call.size.sequences * 8),
}


# --- what is launched, and what the compiler made of it -----------------------------------------------------


def launches(operation: str, arguments: tuple[Any, ...]) -> list[Launch]:
    """List what a call would launch, in order, of Triton or of CUDA C++."""
    return dry_run(registry.implementations(operation, "cuda")[0].load(), *arguments)


def counts(by_class: Mapping[str, float], mma: Mapping[str, int]) -> Counts:
    """Instructions of a warp by class, and matrix instructions by name -> by the pipes that they take."""
    clocks = 0.0
    for name, number in mma.items():
        opcode, *parts = name.split(".")
        shape = next((part.split("x") for part in parts if part.count("x") == 2), ["1", "1", str(products(name))])
        m, n, k = map(int, shape)
        group = opcode in ("HGMMA", "QGMMA")
        clocks += number * roofs.mma_clocks(HOPPER, m, n, k, fp8=opcode[0] == "Q", group=group)
    return Counts(
        issued=sum(by_class.values()),
        integers=sum(by_class.get(name, 0) for name in HALF_RATE),
        conversions=sum(by_class.get(name, 0) for name in SLOW),
        mma_clocks=clocks,
    )


@dataclass(frozen=True, slots=True)
class Made:
    """A kernel as the compiler made it, and units that a turn of a program's main loop does; 0 without a loop.
    around: what a turn of the loops around the main one does beside it."""

    code: Code
    units: int = 0
    around: Counts = field(default_factory=Counts)


def made_of(seen: Launch, lines: Lines) -> Made:
    """A launch's kernel as it was made: Triton's line of the report, or CUDA C++ compiled by NVRTC. Raises
    KeyError for a configuration that is not in the report."""
    if isinstance(seen.kernel, Configuration):
        return _of_line(lines[digest(seen.kernel)])
    return _of_source(seen.kernel.name, seen.warps, seen.shared_bytes, seen.kernel.source)


def _of_line(line: Mapping[str, Any]) -> Made:
    turn = line["turn"]
    of_turn, outside = counts(turn["classes"], turn["mma"]), counts(line["outside"], {})
    if not line["loops"]:  # the turn is all there is
        of_turn, outside = Counts(), of_turn
    code = Code(turn=of_turn, outside=outside, **{name: line[name] for name in CODE})
    return Made(code, line["units"] if line["loops"] else 0, counts(line["around"], {}))


@cache
def _of_source(name: str, warps: int, shared_bytes: int, source: str) -> Made:
    cubin = _cubin(source)
    code = functions(nvrtc.disassembled(cubin))[name]
    found, usage = loops(code), nvrtc.usage(cubin)[name]
    routes = name.startswith(("route_logits", "route_groups"))
    drawn = name.startswith(DRAWN)  # loops over bins, and searches: each counts once, though most run but in part
    loop: Loop | None
    if name.startswith("route_groups") or (routes and warps > 4):  # the logits' loop; of many rows, not of few
        loop = max(found, key=lambda one: one.classes().get("FP32", 0))
    else:
        loop = None if drawn else main_loop(code)
    if loop is None:
        loop = Loop({}, {})
    # Of a branch within the loop one arm runs; of the forms that the kernel has of its loop, one.
    runs = 1 - loop.skipped / 2 / max(loop.issued, 1)
    turn = counts({name: number * runs for name, number in loop.classes().items()}, {})
    straight = Counter(whole(code).instructions)
    if not drawn:
        straight -= sum((Counter(one.instructions) for one in found if not one.depth), Counter())
    made = Code(
        warps=warps,
        registers=usage.registers,
        shared_bytes=shared_bytes + usage.shared_bytes,
        turn=turn,
        outside=counts(classes(straight), {}),
    )
    return Made(made, 32 * warps * loop.classes().get("FP32", 0) if routes else 1)


@cache
def _cubin(source: str) -> bytes:
    return nvrtc.compile_cubin(program(source), options("sm_90"))


def to_price(call: Call, seen: Launch, lines: Lines) -> list[roofs.Launch]:
    """A launch of a call as it is priced, by its stages. Which code outside the loop is whose, nobody knows: each
    has an equal part of it."""
    made, name, programs = made_of(seen, lines), seen.kernel.name, prod(seen.grid)
    part = PARTS[name](call, seen) if name in PARTS else Part(num_bytes=float(call.work.num_bytes))
    found: list[roofs.Launch] = []
    stages = part.stages
    code = replace(made.code, outside=made.code.outside.times(1 / len(stages)))
    for stage in stages:
        working = programs if stage.programs is None else min(programs, round(stage.programs))
        turns = stage.units / made.units if made.units else 0.0
        num_bytes = sum(seen.num_bytes.values()) if stage.num_bytes is None else stage.num_bytes
        idle = programs - working if len(stages) == 1 else 0
        run = replace(code, outside=code.outside.plus(made.around.times(stage.rounds - 1)))
        priced = roofs.Launch(code=run, programs=working, num_bytes=num_bytes, turns=turns, idle=idle)
        found.append(replace(priced, follows=bool(found)))
    return found


# --- the table ---------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, list[Call]]]:
    """(name of a cell, the calls that it stands for): one, but two norms of a layer of Small 3."""
    for model, names in LAUNCHED.items():
        for operation, size in product(names, SIZES):
            known = CASES[door(operation, model)]
            for format in known.formats if operation != "plan" else ("bf16",):
                if format != LEFT_OUT and known.has(model, size):
                    found = as_called(operation, model, size, format)
                    yield f"{operation}, {model.name}, {size.name}, {format}", found


def door(operation: str, model: ModelSizes) -> str:
    """The operation whose case has what a step launches by a name."""
    return {"linear_in": "linear", "plan": "mla_values" if model.rank else "gqa_decode"}.get(operation, operation)


def as_called(operation: str, model: ModelSizes, size: Size, format: str) -> list[Call]:
    """Calls of a case with the arguments that a step has."""
    if operation == "linear_in":  # the case has the product behind attention
        k, n = model.projections[1 if model.query_rank else 0]
        model = replace(model, hidden=n, heads=1, head_dim=k, value_dim=k)
    call = _call(door(operation, model), model, size, format)
    rest = call.arguments[1:]
    if operation == "plan":
        return [replace(call, work=operations.moved("plan", model, size.rows), once=True)]
    if operation in ("linear_in", "gated_mlp") and format in BY_FP8:
        return [replace(call, arguments=(quantise_rows(call.arguments[0], None), *rest))]
    if operation == "latents_of":
        return [replace(call, arguments=(expert_outputs(model, size, Maker(device="meta")), *rest))]
    if operation.startswith("add_rms_norm"):  # behind attention; and behind a dense MLP
        of_parts = replace(call, arguments=(_attended(model, size, format), *rest))
        return [of_parts] if model.experts else [of_parts, call]
    return [call]


def _attended(model: ModelSizes, size: Size, format: str) -> Summands:
    """Rows, or terms of rows, that the product behind attention leaves."""
    found: list[Summands] = []
    of = _call("linear_terms", model, size, format if format in BY_FP8 else "fp8")
    function = registry.implementations("linear_terms", "cuda")[0].load()
    dry_run(lambda *given: found.append(function(*given)), *of.arguments)
    return found[0]


def _call(operation: str, model: ModelSizes, size: Size, format: str) -> Call:
    (arguments, *_), work = make_call(operation, model, size, format, torch.device("meta"), cold_bytes=0)
    call = Call(operation, model, size, format, work, arguments)
    if operation in ("expert_mlp", "expert_terms"):  # of the mean of all choices, not of the one that was drawn
        weights = format.partition(" x ")[0]
        call = replace(call, work=operations.expert_mlp(model, size.rows, call.distinct, weights))
    return call


def predict(found: Sequence[Call], lines: Lines) -> dict[str, Any]:
    """Bytes and operations of a cell's calls, their launches, the instructions that warps issue, and on each card
    their us and the roof that most of these are under."""
    made = ((call, one) for call in found for one in launches(call.operation, call.arguments))
    counted = ((call, one) for call, one in made if (one.kernel.name in ONCE) == call.once)
    seen = [stage for call, one in counted for stage in to_price(call, one, lines)]
    result: dict[str, Any] = {
        "bytes": float(sum(call.work.num_bytes for call in found)),
        "flops": float(sum(call.work.operations for call in found)),
        "calls": len(found),
        "launches": sum(not launch.follows for launch in seen),
        "instructions": round(sum(launch.instructions for launch in seen)),
    }
    for name, card in DATA_SHEETS.items():
        total: Counter[str] = Counter()
        for launch in seen:
            total.update(roofs.seconds(card, launch))
        result[name] = round(sum(total.values()) * 1e6, 3), max(total, key=total.__getitem__)
    return result


def write(triton: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Put a table in the place of the one that prices steps, if this Triton's is the code that the cards run: a
    cell a line. lines: of the report."""
    if not triton.startswith(PRICED):
        return
    known = {line["configuration"]: line for line in lines}
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(predict(found, known))}" for name, found in calls())
    head = json.dumps({"triton": triton, "sources": fingerprint()})
    FILE.write_text(f'{head[:-1]}, "cells": {{\n{body}\n}}}}\n', encoding="utf-8")


def validated() -> Iterator[tuple[str, float, float, str]]:
    """(kernel, shape and card; published us; predicted us; roof) of public kernels, compiled and counted in the
    same way, for shapes whose time is published. Those are times of a kernel, without the way to the next one."""
    for row in json.loads(PUBLISHED.read_text(encoding="utf-8")):
        rate = 2 * row["products"] * row["multiprocessors"] * row["clock_hz"]
        sizes = {name: row[name] for name in ("bytes_per_s", "multiprocessors", "products")}
        card = replace(HOPPER, bf16=rate, fp8=2 * rate, **sizes)
        code = Code(turn=Counts(**row["turn"]), **{name: row[name] for name in CODE})
        launch = roofs.Launch(code=code, programs=row["programs"], num_bytes=row["num_bytes"], turns=row["turns"])
        found = roofs.seconds(card, launch)
        shape = " ".join(f"{name} {value}" for name, value in row["shape"].items())
        name = f"{row['name']}: {shape}, {row['card']}"
        predicted_us = (sum(found.values()) - roofs.NODE_S) * 1e6
        yield name, row["published_us"], predicted_us, max(found, key=found.__getitem__)


def print_validation() -> None:
    """Print published times beside those that roofs.py predicts."""
    print("\nPublic kernels, compiled and counted in the same way: published times and predicted ones")
    print(f"{'kernel: shape, card':{WIDTH}}{'published, us':>14}{'predicted, us':>14}{'error':>8}  roof")
    for name, published_us, predicted_us, roof in validated():
        error = predicted_us / published_us - 1
        print(f"{name:{WIDTH}}{published_us:14.2f}{predicted_us:14.2f}{error:+8.0%}  {roof}")
