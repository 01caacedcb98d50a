"""Work of a launch of each compiled kernel, for two steps of full size; without a device.

A kernel that is an operation of its own does the work of that (engine/cost/operations.py). Parts of an operation
of several launches are added up here: every byte that a part reads and writes once, what lies between two launches
too; tests hold them to the operation's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cierzo.bench.gpu.calls import random_experts
from cierzo.bench.gpu.cases import SMALL4, Size
from cierzo.bench.gpu.timing import SIZES
from cierzo.engine.cost import operations
from cierzo.engine.cost.operations import FP32, Work, stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.triton.heuristics import APART_TOKENS
from cierzo.kernels.triton.launch import Configuration
from cierzo.kernels.triton.split import SPLITS

BF16, E4M3 = "*bf16", "*fp8e4nv"
STEPS = tuple(size for size in SIZES if size.name in ("decode 64", "prefill 4096"))
IN_DECODE = ("sum_parts", "mla_attend", "gqa_attend", "plan", "prefixes", "combine")
IN_PREFILL = ("gather", "expand", "flash")
Known = Any  # a kernel's constants, or the types of what it points to, by name


def problems(configuration: Configuration) -> Iterator[tuple[str, Work]]:
    """(step, work) for each of STEPS that launches the kernel."""
    name, c = configuration.name, configuration.constants
    for size in STEPS:
        launched = name not in (IN_PREFILL if size.decodes else IN_DECODE)
        if name == "linear":  # products of each head are of generated rows; parts of k are apart for few rows
            launched = (size.decodes or not c["X_HEAD"]) and (size.rows <= APART_TOKENS or not c["APART"])
        if launched:
            done = _work(name, c, configuration.types, size)
            yield size.name, done if isinstance(done, Work) else Work(name, done)


def _work(name: str, c: Known, t: Known, size: Size) -> Work | int:
    """A launch by the kernel's constants and types: its work, or its bytes if it has no products."""
    rows, tokens = size.rows, size.sequences * size.context
    page_bytes = 1 if E4M3 in (t.get("pages_ptr"), t.get("k_pages_ptr")) else 2  # of a value
    splits = SPLITS.count(size.context, c.get("WINDOW", 0))  # of a sequence that decodes
    met = c.get("SLOTS", 0) + c.get("SHARED", 0)  # experts that a token goes to
    match name:
        case "rms_norm" | "add_rms_norm":
            row_bytes = _row(c["D"], E4M3 if E4M3 in t.values() else BF16)
            residual = name == "add_rms_norm"
            return operations.norm(ModelSizes(hidden=c["D"]), rows, residual=residual, row_bytes=row_bytes)
        case "rope_tables" | "apply_rope":
            return operations.moved(name, ModelSizes(heads=c.get("H", 0), rope=2 * c["F"]), rows)
        case "write_normed_latents":
            return operations.moved(name, ModelSizes(rank=c["R"], rope=2 * c["F"]), rows, page_bytes)
        case "rotate_and_write":
            model = ModelSizes(heads=c["HQ"], kv_heads=c["HK"], head_dim=2 * c["F"])
            return operations.moved("rotate_and_write_keys_values", model, rows, page_bytes)
        case "linear":
            return _linear(c, t, size)
        case "sum_parts":
            return rows * (c["PARTS"] * c["N"] * FP32 + _row(c["N"]))
        case "quantise_rows" | "quantise_pairs":
            return rows * (_row(c["D"]) + (met or 1) * _row(c["D"], E4M3))
        case "expert_gate_up":  # experts share a token's row in bf16; codes are a row for each: scales differ
            read = _row(c["K"], t["x_ptr"]) * (met if t["x_ptr"] == E4M3 else 1)
            return _experts(c, size, met, read + met * _row(c["ROWS"] // 2, t["inner_ptr"]))
        case "expert_down":
            return _experts(c, size, met, met * (_row(c["K"], t["inner_ptr"]) + _row(c["ROWS"], t["outputs_ptr"])))
        case "sum_slots":  # outputs of a token's experts and their weights in, one result out
            return rows * ((c["SLOTS"] + c["WITH_SHARED"] + 1) * _row(c["D"]) + c["SLOTS"] * FP32)
        case (
            "plan"
        ):  # a tile of rows for each sequence: items of four numbers; starts, contexts; each row's sequence
            return 4 * (4 * size.sequences * splits + 3 * size.sequences + 2 + rows)
        case "prefixes":  # tables of sequences that share a prefix, twice
            return 4 * size.sequences * (2 * size.context // c["S"] + 5 + c["M"])
        case "mla_attend":  # partial results go out in place of results
            model = ModelSizes(heads=c["H"], rank=c["R"], rope=c["P"])
            entry_bytes, partial_bytes = model.page_values * page_bytes, _partial_bytes(splits, c["R"])
            return operations.mla_decode(model, *size.queries(), entry_bytes, partial_bytes)
        case "gqa_attend":  # over the keys and values that each context's window leaves
            model = ModelSizes(heads=c["HK"] * c["G"], kv_heads=c["HK"], head_dim=c["D"])
            entry_bytes, partial_bytes = model.page_values * page_bytes, _partial_bytes(splits, c["D"])
            return operations.gqa(model, *size.queries(c["WINDOW"]), entry_bytes, partial_bytes)
        case "combine":
            return rows * c["HK"] * c["G"] * (_partial_bytes(splits, c["W"]) + _row(c["W"]))
        case "gather":  # a context's pages, in rows of bf16
            return tokens * c["HK"] * c["W"] * (1 + c["KEYS"]) * (page_bytes + 2)
        case "expand":  # latents to keys, or to values, of every head
            return operations.linear(ModelSizes(), tokens, c["R"], c["N"], "bf16")
        case "flash":  # B values of a key are the same for all heads; CARRIED: the sums of a first piece in and out
            width, entry = c["A"] + c["B"], c["HK"] * (c["A"] + c["V"]) + c["B"]
            carried = 2 * rows * c["H"] * (c["V"] + 2) * FP32 if c["CARRIED"] else 0
            _, pairs, _ = size.queries(c["WINDOW"])
            moved = 2 * (rows * c["H"] * (width + c["V"]) + tokens * entry) + carried
            return Work("part", moved, 2 * pairs * c["H"] * (width + c["V"]))
    raise ValueError(f"kernel {name}: its work is not known")


def _linear(c: Known, t: Known, size: Size) -> Work:
    """A dense product; also logits, the products of each head, and gate and up of a dense MLP."""
    n, k, pointer, format = c["ROWS"], c["K"], t["out_ptr"], _format(c)
    if c["X_HEAD"]:
        return (operations.mla_absorb if c["COPIED"] else operations.mla_unabsorb)(SMALL4, size.rows)
    if pointer == "*fp32" and not c["APART"]:
        return operations.lm_head(ModelSizes(hidden=k, vocab=n), size.sequences, format)
    written = c["PARTS"] * n * FP32 if c["APART"] else _row(n // 2 if c["PAIRED"] else n, pointer)
    return operations.linear(ModelSizes(), size.rows, k, n, format, read=_row(k, t["x_ptr"]), written=written)


def _experts(c: Known, size: Size, met: int, row_bytes: int) -> Work:
    """A product of the experts, of which a token meets so many. row_bytes: of all rows of a token, in and out."""
    chosen = len(random_experts(ModelSizes(experts=c["E"], top_k=c["SLOTS"]), size).unique())
    weights = (chosen + c["SHARED"]) * stored(_format(c), c["ROWS"], c["K"])
    return Work("part", weights + size.rows * row_bytes, 2 * size.rows * met * c["ROWS"] * c["K"])


def _partial_bytes(splits: int, width: int) -> int:
    """Bytes that the splits of a row and head leave for `combine`: sums, largest score, sum of weights, in fp32."""
    return splits * (width + 2) * FP32


def _row(values: int, pointer: str = BF16) -> int:
    """Bytes of a row of activations."""
    return int(stored("fp8" if pointer == E4M3 else "bf16", 1, values))


def _format(c: Known) -> str:
    return "bf16" if c["FORMAT"] == "plain" else str(c["FORMAT"])
