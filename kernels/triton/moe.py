"""The experts of a layer in three launches: gate, up and their product; down; the sum over a token's slots.

The pairs of tokens and slots are sorted by expert, and the shared expert's tokens stand behind them:

    row      0 .. T*K - 1                      T*K .. T*K + T - 1
             pair order[row], by expert        token row - T*K, the shared expert

    inner [T*K + T, F]    in that order: written by the first launch, read by the second
    outputs [T*K + T, D]  row token * K + slot, so that the third finds a token's slots side by side

Each launch has a program for every tile of rows that there could be, for the host does not know how many tokens an
expert has; a program finds its expert and its rows in `starts`, and those past the last tile return at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.triton.heuristics import Tile, tile
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.linear import gated_mlp_into
from cierzo.kernels.triton.product import Weights, pointers, product, row_stride

SUM_BLOCK = 1024  # values of a token's output that one program of the third launch adds up


@kernel
def _expert_rows(
    starts_ptr, tokens, tile_t,
    E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The expert of a tile, its first row and the end of its expert's rows, int64; an expert past E (or past the
    shared one, number E): there is no such tile."""
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
    return found, start, tl.sum(tl.where(expert == found, last, 0), 0)


@kernel
def _expert_gate_up(
    x_ptr, order_ptr, starts_ptr, codes_ptr, scales_ptr, row_scales_ptr,
    shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr, inner_ptr, tokens,
    X_STRIDE: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """inner[row] = silu(gate) * up of the row's token."""
    F: tl.constexpr = ROWS // 2
    across: tl.constexpr = tl.cdiv(F, BLOCK_N)
    tile_t = tl.program_id(0) // across
    expert, start, end = _expert_rows(starts_ptr, tokens, tile_t, E, LANES, SLOTS, SHARED, BLOCK_T)
    if expert >= E + SHARED:
        return
    if SHARED:  # noqa: SIM102 (joined, the rest would be compiled without a shared expert too)
        if expert == E:
            expert = expert * 0
            codes_ptr = shared_codes_ptr
            if FORMAT != "plain":
                scales_ptr = shared_scales_ptr
            if FORMAT == "nvfp4":
                row_scales_ptr = shared_row_scales_ptr
    rows = start + tl.arange(0, BLOCK_T)
    inside = rows < end
    pairs = tokens.to(tl.int64) * SLOTS
    pair = tl.load(order_ptr + rows, mask=inside & (rows < pairs), other=0)
    token = tl.where(rows < pairs, pair // SLOTS, rows - pairs)
    outputs = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product(
        x_ptr, token * X_STRIDE, inside, codes_ptr, scales_ptr, row_scales_ptr, expert, outputs, True,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
    )  # fmt: skip
    mask = inside[:, None] & (outputs < F)[None, :]
    tl.store(inner_ptr + rows[:, None] * F + outputs[None, :], total.to(inner_ptr.dtype.element_ty), mask=mask)


@kernel
def _expert_down(
    inner_ptr, order_ptr, starts_ptr, codes_ptr, scales_ptr, row_scales_ptr,
    shared_codes_ptr, shared_scales_ptr, shared_row_scales_ptr, outputs_ptr, tokens,
    E: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """outputs[pair of row] = inner[row] @ down^T."""
    across: tl.constexpr = tl.cdiv(ROWS, BLOCK_N)
    tile_t = tl.program_id(0) // across
    expert, start, end = _expert_rows(starts_ptr, tokens, tile_t, E, LANES, SLOTS, SHARED, BLOCK_T)
    if expert >= E + SHARED:
        return
    if SHARED:  # noqa: SIM102 (joined, the rest would be compiled without a shared expert too)
        if expert == E:
            expert = expert * 0
            codes_ptr = shared_codes_ptr
            if FORMAT != "plain":
                scales_ptr = shared_scales_ptr
            if FORMAT == "nvfp4":
                row_scales_ptr = shared_row_scales_ptr
    rows = start + tl.arange(0, BLOCK_T)
    inside = rows < end
    outputs = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product(
        inner_ptr, rows * K, inside, codes_ptr, scales_ptr, row_scales_ptr, expert, outputs, False,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
    )  # fmt: skip
    pairs = tokens.to(tl.int64) * SLOTS
    pair = tl.load(order_ptr + rows, mask=inside & (rows < pairs), other=0)
    out_rows = tl.where(rows < pairs, pair, rows)
    mask = inside[:, None] & (outputs < ROWS)[None, :]
    pointers = outputs_ptr + out_rows[:, None] * ROWS + outputs[None, :]
    tl.store(pointers, total.to(outputs_ptr.dtype.element_ty), mask=mask)


@kernel
def _sum_slots(
    outputs_ptr, weights_ptr, out_ptr, tokens,
    D: tl.constexpr, SLOTS: tl.constexpr, WITH_SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum of weight * output over its slots, in their order; the shared expert's output last."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = outputs_ptr + (token * SLOTS + slot) * D + columns
        part = tl.load(row, mask=inside, other=0.0).to(tl.float32) * tl.load(weights_ptr + token * SLOTS + slot)
        total = part if slot == 0 else total + part
    if WITH_SHARED:
        row = outputs_ptr + (tokens.to(tl.int64) * SLOTS + token) * D + columns
        total += tl.load(row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


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
    """See ops/moe.py. A shared expert of the same width and format as the others is one more group of their
    launches; another one has launches of its own."""
    tokens, slots = weights.shape
    width, inner_width, experts = x.shape[1], down.shape[2], down.shape[0]
    up_weights, down_weights = Weights.of("expert_mlp", gate_up), Weights.of("expert_mlp", down)
    with_shared = shared_gate_up is not None and shared_down is not None
    together = with_shared and _alike(up_weights, shared_gate_up) and _alike(down_weights, shared_down)
    rows = tokens * slots + (tokens if with_shared else 0)
    inner, outputs = x.new_empty(rows, inner_width), x.new_empty(rows, width)
    pointer = POINTER[x.dtype]

    def run(
        configuration: Configuration, chosen: Tile, across: int, first: dict[str, Tensor], *matrices: Any
    ) -> None:
        tiles = most_tiles(tokens, slots, experts, chosen.block_t, together)
        shared = pointers(matrices[1], "shared_") if together else {}
        grid = (tiles * triton.cdiv(across, chosen.block_n),)
        launch(configuration, grid, **first, **pointers(matrices[0]), **shared, tokens=tokens)

    groups = {"order_ptr": order, "starts_ptr": starts}
    chosen = tile(up_weights, pointer, True, tokens * slots // experts)
    stride = row_stride("expert_mlp", "x", x)
    configuration = gate_up_configuration(pointer, up_weights, chosen, experts, slots, together, stride)
    run(configuration, chosen, inner_width, {"x_ptr": x, "inner_ptr": inner, **groups}, gate_up, shared_gate_up)
    chosen = tile(down_weights, pointer, False, tokens * slots // experts)
    configuration = down_configuration(pointer, down_weights, chosen, experts, slots, together)
    run(configuration, chosen, width, {"inner_ptr": inner, "outputs_ptr": outputs, **groups}, down, shared_down)
    if shared_gate_up is not None and shared_down is not None and not together:
        gated_mlp_into(x, shared_gate_up, shared_down, outputs[tokens * slots :])
    out = x.new_empty(x.shape)
    grid = (tokens, triton.cdiv(width, SUM_BLOCK))
    configuration = sum_configuration(pointer, width, slots, with_shared)
    launch(configuration, grid, outputs_ptr=outputs, weights_ptr=weights, out_ptr=out, tokens=tokens)
    return out


def most_tiles(tokens: int, slots: int, experts: int, block_t: int, shared: bool) -> int:
    """How many tiles the rows can make at most, however the tokens choose."""
    pairs = tokens * slots
    used = min(experts, pairs)
    return used + (pairs - used) // block_t + (triton.cdiv(tokens, block_t) if shared else 0)


def _alike(weights: Weights, shared: Matrix | None) -> bool:
    """Whether one kernel reads both: the shared expert's strides matter only within it."""
    if shared is None:
        return False
    other = Weights.of("expert_mlp", shared)
    fields = ("format", "pointer", "rows", "k", "row_stride", "scale_block")
    return all(getattr(weights, field) == getattr(other, field) for field in fields)


def gate_up_configuration(
    pointer: str, weights: Weights, chosen: Tile, experts: int, slots: int, shared: bool, stride: int
) -> Configuration:
    """pointer: of the activations. stride: of their rows."""
    types = {"x_ptr": pointer, "inner_ptr": pointer}
    return _grouped(_expert_gate_up, types, weights, chosen, experts, slots, shared, {"X_STRIDE": stride})


def down_configuration(
    pointer: str, weights: Weights, chosen: Tile, experts: int, slots: int, shared: bool
) -> Configuration:
    """pointer: of the activations."""
    types = {"inner_ptr": pointer, "outputs_ptr": pointer}
    return _grouped(_expert_down, types, weights, chosen, experts, slots, shared, {})


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
    )


def sum_configuration(pointer: str, width: int, slots: int, shared: bool) -> Configuration:
    """pointer: of the activations."""
    types = {"outputs_ptr": pointer, "weights_ptr": "*fp32", "out_ptr": pointer, "tokens": "i32"}
    block = min(SUM_BLOCK, triton.next_power_of_2(width))
    constants = {"D": width, "SLOTS": slots, "WITH_SHARED": shared, "BLOCK": block}
    return Configuration(_sum_slots, types, constants, num_warps=4)


def configurations() -> Iterator[tuple[str, Configuration]]:
    """What serving Small 4 launches here, by format."""
    width, inner_width, experts, slots = 4096, 2048, 128, 4
    for format in ("bf16", "fp8", "nvfp4"):
        # fp8: a scale an expert for the rows of gate and of up
        up = Weights.stored(format, 2 * inner_width, width, (inner_width, width))
        down = Weights.stored(format, width, inner_width, (width, inner_width))
        chosen = tile(up, "*bf16", paired=True)
        yield (
            f"small4 expert_gate_up {format}",
            gate_up_configuration("*bf16", up, chosen, experts, slots, True, width),
        )
        chosen = tile(down, "*bf16", paired=False)
        yield f"small4 expert_down {format}", down_configuration("*bf16", down, chosen, experts, slots, True)
    yield "small4 sum_slots bf16", sum_configuration("*bf16", width, slots, True)
