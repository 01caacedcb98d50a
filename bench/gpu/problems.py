"""What a launch of each compiled kernel moves and computes at least, for two steps of full size; without a device.

Where a kernel is an operation of its own, these are the figures of its case in bench/kernel_cases.py, made of
tensors without memory (torch's "meta" device). The parts of an operation of several launches are added up here:
every byte that the part reads and writes once, what lies between two launches too; tests hold them to the case's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cierzo.bench.attention_cases import pairs_seen
from cierzo.bench.gpu.cases import SMALL3, SMALL4, DeviceMaker, make_call
from cierzo.bench.gpu.kernels import SIZES
from cierzo.bench.kernel_cases import VALUE_BYTES, Model, Size, expert_bytes, weight_bytes
from cierzo.kernels.triton.heuristics import APART_TOKENS
from cierzo.kernels.triton.split import SPLITS

META = torch.device("meta")
E4M3 = "*fp8e4nv"
STEPS = tuple(size for size in SIZES if size.name in ("decode 64", "prefill 4096"))


@dataclass(frozen=True, slots=True)
class Card:
    """Data sheet, dense: bytes/s of memory, operations/s of the tensor cores."""

    name: str
    memory: float
    bf16: float
    fp8: float


CARDS = (Card("H100 SXM", 3.35e12, 989.5e12, 1979e12), Card("H200", 4.8e12, 989.5e12, 1979e12))


@dataclass(frozen=True, slots=True)
class Work:
    """Of one launch."""

    num_bytes: int
    flops: int = 0

    def limit_s(self, card: Card, fp8: bool) -> tuple[float, str]:
        """The time that it takes at least, and which limit says so. fp8: the operands of its products."""
        memory, arithmetic = self.num_bytes / card.memory, self.flops / (card.fp8 if fp8 else card.bf16)
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def problems(configuration: Any) -> Iterator[tuple[str, Work]]:
    """(step, work) for each of STEPS that launches the kernel."""
    for size in STEPS:
        work = KERNELS[configuration.name](configuration, size)
        if work is not None:
            yield size.name, work


Kernel = Callable[[Any, Size], Work | None]
KERNELS: dict[str, Kernel] = {}


def kernel(function: Kernel) -> Kernel:
    """The work of the kernel that the function is named after."""
    KERNELS[function.__name__] = function
    return function


def _operation(name: str, model: Model, size: Size, format: str = "bf16") -> Work | None:
    call = make_call(name, model, size, format, META, cold_bytes=0)
    return None if call is None else Work(call.num_bytes, call.flops)


def _format(constants: Any) -> str:
    return "bf16" if constants["FORMAT"] == "plain" else str(constants["FORMAT"])


def _row_bytes(values: int, pointer: str) -> int:
    """Of a row of activations: e4m3 codes have a scale."""
    return values + 4 if pointer == E4M3 else values * VALUE_BYTES


def _pages(pointer: str) -> str:
    return {"*bf16": "bf16", "*fp8e4nv": "fp8"}[pointer]


# --- kernels that are an operation each --------------------------------------------------------------------


@kernel
def rms_norm(configuration: Any, size: Size) -> Work | None:
    """Rows of D values, out as they are or as e4m3 codes."""
    name = "rms_norm_fp8" if E4M3 in configuration.types.values() else "rms_norm"
    return _operation(name, replace(SMALL4, hidden=configuration.constants["D"]), size)


@kernel
def add_rms_norm(configuration: Any, size: Size) -> Work | None:
    """The same, and the residual."""
    name = "add_rms_norm_fp8" if E4M3 in configuration.types.values() else "add_rms_norm"
    return _operation(name, replace(SMALL4, hidden=configuration.constants["D"]), size)


@kernel
def rope_tables(configuration: Any, size: Size) -> Work | None:
    """Of a step."""
    return _operation("rope_tables", replace(SMALL4, rope=2 * configuration.constants["F"]), size)


@kernel
def apply_rope(configuration: Any, size: Size) -> Work | None:
    """Of Small 4's queries."""
    return _operation("apply_rope", replace(SMALL4, heads=configuration.constants["H"]), size)


@kernel
def write_normed_latents(configuration: Any, size: Size) -> Work | None:
    """Of Small 4."""
    return _operation("write_normed_latents", SMALL4, size, _pages(configuration.types["pages_ptr"]))


@kernel
def rotate_and_write(configuration: Any, size: Size) -> Work | None:
    """Of Small 3."""
    model = replace(SMALL3, heads=configuration.constants["HQ"], kv_heads=configuration.constants["HK"])
    return _operation("rotate_and_write_keys_values", model, size, _pages(configuration.types["k_pages_ptr"]))


@kernel
def linear(configuration: Any, size: Size) -> Work | None:
    """Also logits, the products of each head, and gate and up of a dense MLP."""
    constants = configuration.constants
    rows, k, format = constants["ROWS"], constants["K"], _format(constants)
    if constants["X_HEAD"]:
        name, model = "mla_absorb" if constants["COPIED"] else "mla_unabsorb", SMALL4
        return _operation(name, model, size, format)
    if configuration.types["out_ptr"] == "*fp32" and not constants["APART"]:
        return _operation("lm_head", replace(SMALL4, vocab=rows, hidden=k), size, format)
    work = _operation("linear", replace(SMALL4, hidden=rows, heads=1, value_dim=k), size, format)
    if work is None or (constants["APART"] and size.rows > APART_TOKENS):
        return None
    types = configuration.types
    written = _row_bytes(rows // 2 if constants["PAIRED"] else rows, types["out_ptr"])
    written = constants["PARTS"] * rows * 4 if constants["APART"] else written
    moved = _row_bytes(k, types["x_ptr"]) + written - (k + rows) * VALUE_BYTES  # the case has both in bf16
    return replace(work, num_bytes=work.num_bytes + size.rows * moved)


@kernel
def quantise_rows(configuration: Any, size: Size) -> Work:
    """A row a token."""
    width = configuration.constants["D"]
    return Work(size.rows * (width * VALUE_BYTES + _row_bytes(width, E4M3)))


@kernel
def quantise_pairs(configuration: Any, size: Size) -> Work:
    """A row for each expert that a token goes to."""
    constants = configuration.constants
    written = (constants["SLOTS"] + constants["SHARED"]) * _row_bytes(constants["D"], E4M3)
    return Work(size.rows * (constants["D"] * VALUE_BYTES + written))


# --- parts of an operation ---------------------------------------------------------------------------------


def _expert_work(configuration: Any, size: Size, read: int, written: int) -> Work:
    """read, written: bytes of all rows of a token."""
    constants = configuration.constants
    shape, make = (constants["ROWS"], constants["K"]), DeviceMaker(False, _format(constants), "meta")
    model = replace(SMALL4, experts=constants["E"], top_k=constants["SLOTS"])
    pairs = size.rows * (constants["SLOTS"] + constants["SHARED"])
    moved = expert_bytes(model, size, make.matrix(model.experts, *shape))
    moved += weight_bytes(make.matrix(*shape)) if constants["SHARED"] else 0
    return Work(moved + size.rows * (read + written), 2 * pairs * shape[0] * shape[1])


@kernel
def expert_gate_up(configuration: Any, size: Size) -> Work:
    """Reads a row of x once for all of its experts; of codes, one for each."""
    constants, types = configuration.constants, configuration.types
    pairs = constants["SLOTS"] + constants["SHARED"]
    read = _row_bytes(constants["K"], types["x_ptr"]) * (pairs if types["x_ptr"] == E4M3 else 1)
    return _expert_work(configuration, size, read, pairs * _row_bytes(constants["ROWS"] // 2, types["inner_ptr"]))


@kernel
def expert_down(configuration: Any, size: Size) -> Work:
    """Reads a row of its own for each expert."""
    constants, types = configuration.constants, configuration.types
    pairs = constants["SLOTS"] + constants["SHARED"]
    read = pairs * _row_bytes(constants["K"], types["inner_ptr"])
    return _expert_work(configuration, size, read, pairs * _row_bytes(constants["ROWS"], types["outputs_ptr"]))


@kernel
def sum_slots(configuration: Any, size: Size) -> Work:
    """Each token's outputs, one result."""
    constants = configuration.constants
    rows = constants["SLOTS"] + constants["WITH_SHARED"] + 1
    return Work(size.rows * (rows * constants["D"] * VALUE_BYTES + constants["SLOTS"] * 4))


@kernel
def sum_parts(configuration: Any, size: Size) -> Work | None:
    """Of a product whose parts are apart."""
    if size.rows > APART_TOKENS:
        return None
    return Work(size.rows * configuration.constants["N"] * (configuration.constants["PARTS"] * 4 + VALUE_BYTES))


@kernel
def plan(configuration: Any, size: Size) -> Work | None:
    """One tile of rows for each sequence."""
    if not size.decodes:
        return None
    items = size.sequences * _splits(configuration, size)
    return Work(16 * items + (3 * size.sequences + 2) * 4 + size.rows * 4)


def _splits(configuration: Any, size: Size) -> int:
    """Of a sequence that decodes."""
    return SPLITS.count(size.context, configuration.constants.get("WINDOW", 0))


def _partial_bytes(configuration: Any, size: Size, width: int) -> int:
    """Bytes that a row's splits leave for `combine`: sums in fp32, largest score, sum of weights."""
    return _splits(configuration, size) * (width + 2) * 4


def _attend(operation: str, configuration: Any, size: Size, model: Model, width: int, pages: str) -> Work | None:
    """Decoding but for the sum of its splits: partial results go out in place of results in bf16."""
    work = _operation(operation, model, size, _pages(configuration.types[pages]))
    if work is None:
        return None
    written = _partial_bytes(configuration, size, width) - width * VALUE_BYTES
    return replace(work, num_bytes=work.num_bytes + size.rows * model.heads * written)


@kernel
def mla_attend(configuration: Any, size: Size) -> Work | None:
    """Reads each context's latents once."""
    model = replace(SMALL4, heads=configuration.constants["H"])
    return _attend("mla_decode", configuration, size, model, model.rank, "pages_ptr")


@kernel
def gqa_attend(configuration: Any, size: Size) -> Work | None:
    """Reads the keys and values that each context's window leaves."""
    constants = configuration.constants
    shared, width = constants["HK"], constants["D"]
    heads, window = shared * constants["G"], constants["WINDOW"]
    model = replace(SMALL3, heads=heads, kv_heads=shared, head_dim=width, window=window)
    return _attend("gqa_decode", configuration, size, model, width, "k_pages_ptr")


@kernel
def prefixes(configuration: Any, size: Size) -> Work | None:
    """The tables of sequences that share a prefix, twice."""
    if not size.decodes:
        return None
    blocks = size.context // configuration.constants["S"]
    return Work(size.sequences * 4 * (2 * blocks + 5 + configuration.constants["M"]))


@kernel
def combine(configuration: Any, size: Size) -> Work | None:
    """Every split's partial result."""
    if not size.decodes:
        return None
    constants = configuration.constants
    heads, width = constants["HK"] * constants["G"], constants["W"]
    return Work(size.rows * heads * (_partial_bytes(configuration, size, width) + width * VALUE_BYTES))


@kernel
def gather(configuration: Any, size: Size) -> Work | None:
    """A context's pages, in rows of bf16."""
    if size.decodes:
        return None
    entry_bytes = 1 if configuration.types["pages_ptr"] == "*fp8e4nv" else VALUE_BYTES
    constants = configuration.constants
    values = size.sequences * size.context * constants["HK"] * constants["W"] * (2 if constants["KEYS"] else 1)
    return Work(values * (entry_bytes + VALUE_BYTES))


@kernel
def expand(configuration: Any, size: Size) -> Work | None:
    """Latents to keys, or to values, of every head."""
    if size.decodes:
        return None
    tokens, rank, columns = (
        size.sequences * size.context,
        configuration.constants["R"],
        configuration.constants["N"],
    )
    values = tokens * (rank + columns) + rank * columns
    return Work(values * VALUE_BYTES, 2 * tokens * rank * columns)


@kernel
def flash(configuration: Any, size: Size) -> Work | None:
    """carried: a context in two pieces, of which the second adds to the fp32 sums of the first."""
    if size.decodes:
        return None
    constants = configuration.constants
    heads, width = constants["H"], constants["A"] + constants["B"]
    tokens = size.sequences * size.context
    values = size.rows * heads * (width + constants["V"])
    values += tokens * (constants["HK"] * (constants["A"] + constants["V"]) + constants["B"])
    carried = size.rows * heads * (constants["V"] + 2) * 4 * 2 if constants["CARRIED"] else 0
    pairs = pairs_seen(size, constants["WINDOW"])
    return Work(values * VALUE_BYTES + carried, 2 * pairs * heads * (width + constants["V"]))
