"""Work of a launch of each compiled kernel, for two steps of full size; without a device.

A kernel that is an operation of its own does the work of that (engine/cost/operations.py). Parts of an operation
of several launches are added up here: every byte that a part reads and writes once, what lies between two launches
too; tests hold them to the operation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cierzo.bench.gpu.calls import random_experts
from cierzo.bench.gpu.cases import SMALL4, Size
from cierzo.bench.gpu.timing import SIZES
from cierzo.engine.cost import operations
from cierzo.engine.cost.operations import FP32, Work, stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.triton.heuristics import APART_TOKENS
from cierzo.kernels.triton.split import SPLITS

E4M3 = "*fp8e4nv"
PAGE_BYTES = {"*bf16": 2, E4M3: 1}  # of a value in the cache
STEPS = tuple(size for size in SIZES if size.name in ("decode 64", "prefill 4096"))
Known = Any  # a kernel's constants, or the types of what it points to, by name


def problems(configuration: Any) -> Iterator[tuple[str, Work]]:
    """(step, work) for each of STEPS that launches the kernel."""
    name, c, t = configuration.name, configuration.constants, configuration.types
    for size in STEPS:
        if _launched(name, c, size):
            done = KERNELS[name](c, t, size)
            yield size.name, done if isinstance(done, Work) else Work(name, done)


def _launched(name: str, c: Known, size: Size) -> bool:
    """Say if a step has the kernel. Products of each head are of generated rows; parts of k are apart for few."""
    if name == "linear":
        return (size.decodes or not c["X_HEAD"]) and (size.rows <= APART_TOKENS or not c["APART"])
    return name not in (IN_PREFILL if size.decodes else IN_DECODE)


def _row(values: int, pointer: str = "*bf16") -> int:
    """Bytes of a row of activations."""
    return int(stored("fp8" if pointer == E4M3 else "bf16", 1, values))


def _format(c: Known) -> str:
    return "bf16" if c["FORMAT"] == "plain" else str(c["FORMAT"])


# --- kernels that are an operation each --------------------------------------------------------------------


def _norm(c: Known, t: Known, size: Size, residual: bool) -> Work:
    """Rows of D values, out as they are or as e4m3 codes."""
    row_bytes = _row(c["D"], E4M3 if E4M3 in t.values() else "*bf16")
    return operations.norm(ModelSizes(hidden=c["D"]), size.rows, residual=residual, row_bytes=row_bytes)


def _moved(operation: str, size: Size, page: str = "*bf16", **sizes: int) -> Work:
    return operations.moved(operation, ModelSizes(**sizes), size.rows, PAGE_BYTES[page])  # type: ignore[arg-type]


def _linear(c: Known, t: Known, size: Size) -> Work:
    """A dense product; also logits, the products of each head, and gate and up of a dense MLP."""
    n, k, pointer = c["ROWS"], c["K"], t["out_ptr"]
    if c["X_HEAD"]:
        return (operations.mla_absorb if c["COPIED"] else operations.mla_unabsorb)(SMALL4, size.rows)
    if pointer == "*fp32" and not c["APART"]:
        return operations.lm_head(ModelSizes(hidden=k, vocab=n), size.sequences, _format(c))
    written = c["PARTS"] * n * FP32 if c["APART"] else _row(n // 2 if c["PAIRED"] else n, pointer)
    read = _row(k, t["x_ptr"])
    return operations.linear(ModelSizes(), size.rows, k, n, _format(c), read=read, written=written)


# --- parts of an operation ---------------------------------------------------------------------------------


def _experts(c: Known, size: Size, read: float, written: float) -> Work:
    """A product of the experts. read, written: bytes of all rows of a token."""
    chosen = len(random_experts(ModelSizes(experts=c["E"], top_k=c["SLOTS"]), size).unique())
    weights = (chosen + c["SHARED"]) * stored(_format(c), c["ROWS"], c["K"])
    pairs = size.rows * _met(c)
    return Work("part", weights + size.rows * (read + written), 2 * pairs * c["ROWS"] * c["K"])


def _met(c: Known) -> int:
    """Experts that a token goes to."""
    return int(c["SLOTS"] + c["SHARED"])


def _gate_up(c: Known, t: Known, size: Size) -> Work:
    """First product of the experts. They share a token's row in bf16; codes are a row for each: scales differ."""
    read = _row(c["K"], t["x_ptr"]) * (_met(c) if t["x_ptr"] == E4M3 else 1)
    return _experts(c, size, read, _met(c) * _row(c["ROWS"] // 2, t["inner_ptr"]))


def _splits(c: Known, size: Size) -> int:
    """Splits of a sequence that decodes."""
    return SPLITS.count(size.context, c.get("WINDOW", 0))


def _partial_bytes(c: Known, size: Size, width: int) -> int:
    """Bytes that the splits of a row and head leave for `combine`: sums, largest score, sum of weights, in fp32."""
    return _splits(c, size) * (width + 2) * FP32


def _mla_attend(c: Known, t: Known, size: Size) -> Work:
    """Decoding but for the sum of its splits: partial results go out in place of results."""
    model = ModelSizes(heads=c["H"], rank=c["R"], rope=c["P"])
    entry_bytes, row_bytes = model.page_values * PAGE_BYTES[t["pages_ptr"]], _partial_bytes(c, size, c["R"])
    return operations.mla_decode(model, *size.queries(), entry_bytes, row_bytes)


def _gqa_attend(c: Known, t: Known, size: Size) -> Work:
    """Decoding but for the sum of its splits, over the keys and values that each context's window leaves."""
    model = ModelSizes(heads=c["HK"] * c["G"], kv_heads=c["HK"], head_dim=c["D"])
    entry_bytes, row_bytes = model.page_values * PAGE_BYTES[t["k_pages_ptr"]], _partial_bytes(c, size, c["D"])
    return operations.gqa(model, *size.queries(c["WINDOW"]), entry_bytes, row_bytes)


def _flash(c: Known, t: Known, size: Size) -> Work:
    """Attention over expanded keys and values, of which B values of a key are the same for all heads. CARRIED: a
    context in two pieces, of which the second adds to the fp32 sums of the first."""
    width, rows = c["A"] + c["B"], size.rows * c["H"]
    entry = c["HK"] * (c["A"] + c["V"]) + c["B"]
    carried = 2 * rows * (c["V"] + 2) * FP32 if c["CARRIED"] else 0
    values = rows * (width + c["V"]) + _tokens(size) * entry
    _, pairs, _ = size.queries(c["WINDOW"])
    return Work("part", 2 * values + carried, 2 * pairs * c["H"] * (width + c["V"]))


IN_DECODE = ("sum_parts", "mla_attend", "gqa_attend", "plan", "prefixes", "combine")
IN_PREFILL = ("gather", "expand", "flash")
# What a launch of each kernel does, by its constants, its types and a step: work, or bytes if it has no products.
KERNELS: dict[str, Callable[[Known, Known, Size], Work | int]] = {
    "rms_norm": lambda c, t, size: _norm(c, t, size, residual=False),
    "add_rms_norm": lambda c, t, size: _norm(c, t, size, residual=True),
    "rope_tables": lambda c, t, size: _moved("rope_tables", size, rope=2 * c["F"]),
    "apply_rope": lambda c, t, size: _moved("apply_rope", size, heads=c["H"], rope=2 * c["F"]),
    "write_normed_latents": lambda c, t, size: _moved(
        "write_normed_latents", size, t["pages_ptr"], rank=c["R"], rope=2 * c["F"]
    ),
    "rotate_and_write": lambda c, t, size: _moved(
        *("rotate_and_write_keys_values", size, t["k_pages_ptr"]),
        heads=c["HQ"],
        kv_heads=c["HK"],
        head_dim=2 * c["F"],
    ),
    "linear": _linear,
    "quantise_rows": lambda c, t, size: size.rows * (_row(c["D"]) + _row(c["D"], E4M3)),
    "quantise_pairs": lambda c, t, size: size.rows * (_row(c["D"]) + _met(c) * _row(c["D"], E4M3)),
    "expert_gate_up": _gate_up,
    "expert_down": lambda c, t, size: _experts(
        c, size, _met(c) * _row(c["K"], t["inner_ptr"]), _met(c) * _row(c["ROWS"], t["outputs_ptr"])
    ),
    # Outputs of a token's experts and their weights in, one result out.
    "sum_slots": lambda c, t, size: (
        size.rows * ((c["SLOTS"] + c["WITH_SHARED"] + 1) * _row(c["D"]) + c["SLOTS"] * FP32)
    ),
    "sum_parts": lambda c, t, size: size.rows * (c["PARTS"] * c["N"] * FP32 + _row(c["N"])),
    # A tile of rows for each sequence: items of four numbers; starts and contexts; each row's sequence.
    "plan": lambda c, t, size: 4 * (4 * size.sequences * _splits(c, size) + 3 * size.sequences + 2 + size.rows),
    # Tables of sequences that share a prefix, twice.
    "prefixes": lambda c, t, size: 4 * size.sequences * (2 * size.context // c["S"] + 5 + c["M"]),
    "mla_attend": _mla_attend,
    "gqa_attend": _gqa_attend,
    "combine": lambda c, t, size: size.rows * c["HK"] * c["G"] * (_partial_bytes(c, size, c["W"]) + _row(c["W"])),
    # A context's pages, in rows of bf16.
    "gather": lambda c, t, size: (
        _tokens(size) * c["HK"] * c["W"] * (1 + c["KEYS"]) * (PAGE_BYTES[t["pages_ptr"]] + 2)
    ),
    # Latents to keys, or to values, of every head.
    "expand": lambda c, t, size: operations.linear(ModelSizes(), _tokens(size), c["R"], c["N"], "bf16"),
    "flash": _flash,
}


def _tokens(size: Size) -> int:
    """Tokens of all contexts."""
    return size.sequences * size.context
