"""Experts of a layer in two launches: gate, up and their product; down. They leave a token's terms (ops/terms.py).

The pairs of tokens and slots are sorted by expert; the tokens of the shared expert follow:

    row      0 .. T*K - 1                      T*K .. T*K + T - 1
             pair order[row], by expert        token row - T*K, the shared expert

    inner [T*K + T, F]    in that order: written by the first launch, read by the second
    outputs [T*K + T, D]  row token * K + slot: the slots of a token, which are added next, are contiguous

For experts that take their activations in FP8, a kernel before the first launch quantises `x` into that order.
`inner` is quantised by the first launch if its scales are static, else by a kernel before the second.

Each launch has a program for every tile of rows that there could be, since the host does not know how many tokens
an expert has. A program finds its expert and its rows in `starts`; programs past the last tile return at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.derived import derived
from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.device import E4M3
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Terms
from cierzo.kernels.triton.activations import (
    empty_rows,
    pair_of,
    quantise_pairs,
    quantise_rows,
    scale_types,
    store_tile,
    token_of,
)
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.four_bit import in_order
from cierzo.kernels.triton.heuristics import Tile, decided, reading, rows_of_most, spread, tile
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.linear import gated_mlp_into, multiprocessors
from cierzo.kernels.triton.norm import Codes
from cierzo.kernels.triton.product import Weights, pointers, product, row_stride
from cierzo.kernels.triton.terms import sum_terms


@kernel
def _expert_tile(
    starts_ptr, tokens,
    E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tile of this program: its expert, first row and the end of that expert's rows, int64; its first of N
    outputs. The shared expert is number E. A program without a tile gets the number past the last expert."""
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile_t = tl.program_id(0) // across
    expert = tl.arange(0, LANES)
    first = tl.load(starts_ptr + expert, mask=expert < E, other=0)
    last = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
    if SHARED:
        pairs = tokens.to(tl.int64) * SLOTS
        first = tl.where(expert == E, pairs, first)
        last = tl.where(expert == E, pairs + tokens, last)
    tiles = tl.cdiv(last - first, BLOCK_T)
    ends = tl.cumsum(tiles, 0)
    found = tl.sum((ends <= tile_t).to(tl.int64), 0)  # experts that end before the tile
    before = tl.sum(tl.where(expert < found, tiles, 0), 0)
    start = tl.sum(tl.where(expert == found, first, 0), 0) + (tile_t - before) * BLOCK_T
    end = tl.sum(tl.where(expert == found, last, 0), 0)
    return found, start, end, tl.program_id(0) % across * BLOCK_N


@kernel
def _expert_product(
    x_ptr, x_rows, x_scales_ptr, rows, inside, expert, n_start,
    codes_ptr, scales_ptr, row_scales_ptr, shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr,
    PAIRED: tl.constexpr, DESCRIBED: tl.constexpr, X_DESCRIBED: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """The product of a tile's rows with the matrix of its expert, number E of which is the shared one: `product`,
    but for x_scales_ptr, the scales of e4m3 x in the order of `rows`; else None."""
    if SHARED:  # noqa: SIM102 (joined, the rest would be compiled without a shared expert too)
        if expert == E:
            expert = expert * 0
            codes_ptr = shared_codes_ptr
            if FORMAT != "plain":
                scales_ptr = shared_scales_ptr
            if in_order(FORMAT):
                row_scales_ptr = shared_row_scales_ptr
    x_scales = None
    if x_scales_ptr is not None:
        x_scales = tl.load(x_scales_ptr + rows, mask=inside, other=0.0)
    return product(
        x_ptr, x_rows, inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, expert, n_start, 0, K,
        PAIRED, DESCRIBED, X_DESCRIBED,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
    )  # fmt: skip


@chained
def _expert_gate_up(
    x_ptr, x_scales_ptr, order_ptr, starts_ptr, codes_ptr, scales_ptr, row_scales_ptr,
    shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr, inner_ptr, static_ptr, shared_static_ptr,
    inner_scales_ptr, tokens,
    X_STRIDE: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """inner[row] = silu(gate) * up of the row's token. e4m3 x lies in the order of rows, with a scale each; e4m3
    inner is quantised by the static scale of its expert, static_ptr[expert]."""
    after_others()
    F: tl.constexpr = ROWS // 2
    expert, start, end, n_start = _expert_tile(starts_ptr, tokens, E, LANES, SLOTS, SHARED, F, BLOCK_N, BLOCK_T)
    if expert >= E + SHARED:
        return
    rows = start + tl.arange(0, BLOCK_T)
    inside = rows < end
    if x_scales_ptr is not None:
        x_rows = start.to(tl.int32) if DESCRIBED else rows * X_STRIDE
    else:
        x_rows = token_of(order_ptr, tl.minimum(rows, end - 1), inside, tokens, SLOTS) * X_STRIDE
    X_DESCRIBED: tl.constexpr = DESCRIBED and x_scales_ptr is not None
    total = _expert_product(
        x_ptr, x_rows, x_scales_ptr, rows, inside, expert, n_start,
        codes_ptr, scales_ptr, row_scales_ptr, shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr,
        True, DESCRIBED, X_DESCRIBED, E, SHARED,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
    )  # fmt: skip
    if static_ptr is not None:
        static_ptr += expert
        if SHARED:  # noqa: SIM102 (as in _expert_product)
            if expert == E:
                static_ptr = shared_static_ptr
    outputs = n_start + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (outputs < F)[None, :]
    store_tile(total, inner_ptr, rows * F, outputs, mask, static_ptr, inner_scales_ptr, rows, inside, n_start == 0)


@chained
def _expert_down(
    inner_ptr, inner_scales_ptr, order_ptr, starts_ptr, codes_ptr, scales_ptr, row_scales_ptr,
    shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr, outputs_ptr, tokens,
    E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """outputs[pair of row] = inner[row] @ down^T."""
    after_others()
    expert, start, end, n_start = _expert_tile(starts_ptr, tokens, E, LANES, SLOTS, SHARED, ROWS, BLOCK_N, BLOCK_T)
    if expert >= E + SHARED:
        return
    rows = start + tl.arange(0, BLOCK_T)
    inside = rows < end
    read = start.to(tl.int32) if DESCRIBED else tl.minimum(rows, end - 1) * K
    total = _expert_product(
        inner_ptr, read, inner_scales_ptr, rows, inside, expert, n_start,
        codes_ptr, scales_ptr, row_scales_ptr, shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr,
        False, DESCRIBED, DESCRIBED, E, SHARED,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
    )  # fmt: skip
    out_rows = pair_of(order_ptr, rows, inside, tokens, SLOTS)
    outputs = n_start + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (outputs < ROWS)[None, :]
    pointers = outputs_ptr + out_rows[:, None] * ROWS + outputs[None, :]
    tl.store(pointers, total.to(outputs_ptr.dtype.element_ty), mask=mask)


def expert_terms(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> Terms:
    """See ops/moe.py. A shared expert of the same width and format as the others is one more expert in their
    launches; any other has launches of its own."""
    tokens, slots = weights.shape
    with_shared = shared_gate_up is not None and shared_down is not None
    layer = _layer(gate_up, down, shared_gate_up, shared_down)
    together, pairs = layer.together, tokens * slots
    rows: Rows = x
    if layer.fp8:
        static = static_scales(gate_up), static_scales(shared_gate_up)
        rows = quantise_pairs(x, order, starts, slots, static, together)
    planned = _experts(
        layer.up,
        layer.down,
        together,
        (tokens, slots, layer.experts),
        (x.dtype, row_stride("expert_mlp", "x", x) if rows is x else None),
        layer.inner,
        multiprocessors(x.device),
    )
    outputs = x.new_empty(pairs + (tokens if with_shared else 0), layer.down.rows)
    inner_rows = pairs + (tokens if together else 0)
    inner: Rows
    if layer.inner == "static":
        inner = empty_rows(x, inner_rows, layer.down.k)
    else:
        inner = x.new_empty(inner_rows, layer.down.k)
    first = {**_operand("x", rows), **_operand("inner", inner), **_static(down)}
    first |= pointers(gate_up, planned.described)
    second = pointers(down, planned.down_described)
    if together and shared_gate_up is not None and shared_down is not None:
        first |= {**_static(shared_down, "shared_"), **pointers(shared_gate_up, planned.described, "shared_")}
        second |= pointers(shared_down, planned.down_described, "shared_")
    launch(planned.gate_up, planned.grid, order_ptr=order, starts_ptr=starts, tokens=tokens, **first)
    if layer.inner == "by row" and isinstance(inner, Tensor):
        inner = quantise_rows(inner, None)
    second |= _operand("inner", inner)
    launch(
        planned.down,
        planned.down_grid,
        order_ptr=order,
        starts_ptr=starts,
        outputs_ptr=outputs,
        tokens=tokens,
        **second,
    )
    if shared_gate_up is not None and shared_down is not None and not together:
        gated_mlp_into(x, shared_gate_up, shared_down, outputs[pairs:])
    return Terms(outputs, weights, x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Layouts of a layer's matrices. together: whether its shared expert is one more of their launches. fp8:
    whether x is quantised; inner: whether, and how, what lies between both products is."""

    up: Weights
    down: Weights
    experts: int
    together: bool
    fp8: bool
    inner: Codes


@derived
def _layer(gate_up: Matrix, down: Matrix, shared_gate_up: Matrix | None, shared_down: Matrix | None) -> _Layer:
    up, down_weights = Weights.of("expert_mlp", gate_up), Weights.of("expert_mlp", down)
    together = _alike(gate_up, shared_gate_up) and _alike(down, shared_down)
    inner: Codes = "" if not takes_fp8(down) else "by row"
    inner = "static" if static_scales(down) is not None else inner
    return _Layer(up, down_weights, down.shape[0], together, takes_fp8(gate_up), inner)


@dataclass(frozen=True, slots=True)
class _Planned:
    """The launches of a layer's experts, whose choices are made."""

    gate_up: Configuration
    grid: tuple[int]
    described: bool
    down: Configuration
    down_grid: tuple[int]
    down_described: bool


@decided
def _experts(
    up: Weights,
    down: Weights,
    together: bool,
    sizes: tuple[int, int, int],
    x: tuple[torch.dtype, int | None],
    inner: Codes,
    processors: int,
) -> _Planned:
    """sizes: tokens, slots and experts. x: dtype, and the stride of its rows; None if they are quantised."""
    (tokens, slots, experts), (dtype, stride) = sizes, x
    pairs = tokens * slots
    most, matrices = rows_of_most(pairs, experts), min(pairs, experts) + int(together)
    of_x, codes = POINTER[dtype], POINTER[E4M3]

    def grid(chosen: Tile, across: int) -> tuple[int]:
        return (most_tiles(tokens, slots, experts, chosen.block_t, together) * divide_up(across, chosen.block_n),)

    types = codes if stride is None else of_x, codes if inner == "static" else of_x
    first = spread(tile(up, types[0], True, most), up, down.k, matrices, processors)
    # Quantised rows lie in the order of the pairs; other rows of x are scattered, and read by pointers.
    first = reading(first, up, tokens, up.k if stride is None else 0)
    gate_up = gate_up_configuration(types, up, first, experts, slots, together, up.k if stride is None else stride)
    types = codes if inner else of_x, of_x
    second = spread(tile(down, types[0], False, most), down, down.rows, matrices, processors)
    second = reading(second, down, tokens, down.k * (E4M3 if inner else dtype).itemsize)
    through = down_configuration(types, down, second, experts, slots, together)
    return _Planned(
        gate_up, grid(first, down.k), first.described, through, grid(second, down.rows), second.described
    )


def expert_mlp(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> Tensor:
    """See ops/moe.py."""
    return sum_terms(expert_terms(x, gate_up, down, weights, order, starts, shared_gate_up, shared_down))


def most_tiles(tokens: int, slots: int, experts: int, block_t: int, shared: bool) -> int:
    """Largest number of tiles of rows, whichever experts the tokens choose."""
    pairs = tokens * slots
    used = min(experts, pairs)
    return used + (pairs - used) // block_t + (divide_up(tokens, block_t) if shared else 0)


def _alike(matrix: Matrix, shared: Matrix | None) -> bool:
    """Whether one kernel reads both matrices; the expert stride of the shared one does not matter."""
    if shared is None:
        return False
    one, other = Weights.of("expert_mlp", matrix), Weights.of("expert_mlp", shared)
    fields = ("format", "pointer", "rows", "k", "row_stride", "scale_block")
    same_rows = takes_fp8(matrix) == takes_fp8(shared)
    same_scales = (static_scales(matrix) is None) == (static_scales(shared) is None)
    return same_rows and same_scales and all(getattr(one, field) == getattr(other, field) for field in fields)


def _operand(name: str, rows: Rows) -> dict[str, Tensor]:
    """Arguments for rows that a kernel reads or writes."""
    if isinstance(rows, Tensor):
        return {f"{name}_ptr": rows}
    return {f"{name}_ptr": rows.codes, f"{name}_scales_ptr": rows.scales}


def _static(matrix: Matrix | None, prefix: str = "") -> dict[str, Tensor]:
    """Argument for the static scales of a matrix's activations, if it has any."""
    scales = static_scales(matrix)
    return {} if scales is None else {f"{prefix}static_ptr": scales}


@kept
def gate_up_configuration(
    pointers_of: tuple[str, str],
    weights: Weights,
    chosen: Tile,
    experts: int,
    slots: int,
    shared: bool,
    stride: int,
) -> Configuration:
    """pointers_of: to x and to inner, "*fp8e4nv" for codes. stride: of the rows of x, in values."""
    types = {"x_ptr": pointers_of[0], **scale_types(["x_scales_ptr"], pointers_of[0]), "inner_ptr": pointers_of[1]}
    written = ("static_ptr", "shared_static_ptr", "inner_scales_ptr")
    wanted = [name for name in written if shared or not name.startswith("shared")]
    types |= scale_types(wanted, pointers_of[1])
    missing = dict.fromkeys({"x_scales_ptr", *written} - types.keys())
    return _grouped(
        _expert_gate_up, types, weights, chosen, experts, slots, shared, {"X_STRIDE": stride, **missing}
    )


@kept
def down_configuration(
    pointers_of: tuple[str, str], weights: Weights, chosen: Tile, experts: int, slots: int, shared: bool
) -> Configuration:
    """pointers_of: to inner, "*fp8e4nv" for codes, and to outputs."""
    scales = scale_types(["inner_scales_ptr"], pointers_of[0])
    types = {"inner_ptr": pointers_of[0], **scales, "outputs_ptr": pointers_of[1]}
    missing: dict[str, Any] = {} if scales else {"inner_scales_ptr": None}
    return _grouped(_expert_down, types, weights, chosen, experts, slots, shared, missing)


def _grouped(
    of: Any,
    types: dict[str, str],
    weights: Weights,
    chosen: Tile,
    experts: int,
    slots: int,
    shared: bool,
    more: Any,
) -> Configuration:
    shared_names = ("shared_codes_ptr", "shared_scales_ptr", "shared_row_scales_ptr")
    missing = weights.without("shared_") if shared else dict.fromkeys(shared_names, None)
    names = ("codes_ptr", "shared_codes_ptr") if shared else ("codes_ptr",)
    dense = "inner_ptr" if of is _expert_down else "x_ptr"
    in_pairs = of is _expert_down or types[dense] == "*fp8e4nv"  # rows in the order of the pairs
    sizes = {"E": experts, "LANES": triton.next_power_of_2(experts + 1), "SLOTS": slots, "SHARED": int(shared)}
    return Configuration(
        of,
        {
            **types,
            "order_ptr": "*i64",
            "starts_ptr": "*i64",
            "tokens": "i32",
            **weights.types(),
            **(weights.types("shared_") if shared else {}),
        },
        {**weights.without(), **missing, **weights.constants, **chosen.constants, **sizes, **more},
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        blocks=chosen.blocks(weights.format, codes=names, rows=[dense] if in_pairs else []),
    )
