"""Quantisation of rows of activations to e4m3 codes with a scale each (formats/activations.py), one program a row.

Products read codes. If they quantised rows as they load them, every tile of outputs would quantise the same row
again, and the scale of a row is not known before its end. Kernels that write rows can write codes instead: norms
(norm.py), and a product whose result has a static scale (`store_tile`); their bits are those of the kernels here.

The rows of experts are written in the order in which they are multiplied (moe.py): a token that goes to four
experts has four rows, each quantised by its expert's scale, and the product reads contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from cierzo.kernels.formats.activations import QuantisedRows, Rows
from cierzo.kernels.formats.device import E4M3, LARGEST_E4M3, SMALLEST
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.product import row_stride

LARGEST = tl.constexpr(LARGEST_E4M3)
LEAST_PEAK = tl.constexpr(SMALLEST)


@kernel
def e4m3(values, scales):
    """Codes of fp32 values, by fp32 scales of the same shape. div_rn rounds to nearest; `/` on a GPU does not."""
    quotients = tl.div_rn(values, scales)
    return tl.clamp(quotients, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@kernel
def row_scale(values):
    """Scale of one fp32 row: its largest magnitude, NaN left out, becomes the largest code."""
    peak = tl.max(tl.where(values == values, tl.abs(values), 0.0))
    return tl.where(peak >= LEAST_PEAK, tl.div_rn(peak, LARGEST), 1.0)


@kernel
def store_row(
    values, static_ptr, codes_ptr, scales_ptr, row, columns, inside, D: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Store the codes and the scale of one fp32 row [BLOCK], zeros where not `inside`. STATIC: by *static_ptr."""
    if STATIC:
        scale = tl.load(static_ptr)
    else:
        scale = row_scale(values)
    tl.store(codes_ptr + row * D + columns, e4m3(values, tl.broadcast_to(scale, values.shape)), mask=inside)
    tl.store(scales_ptr + row, scale)


@kernel
def store_tile(
    values, out_ptr, out_rows, outputs, mask, static_ptr, scales_ptr, rows, inside, first,
):  # fmt: skip
    """Store the fp32 tile [BLOCK_T, BLOCK_N] of a product in the dtype of out. e4m3 codes are made by the scale
    *static_ptr, and the `first` tile of a row, along its outputs, also stores the row's scale."""
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        scale = tl.load(static_ptr)
        values = e4m3(values, tl.broadcast_to(scale, values.shape))
        if first:
            tl.store(scales_ptr + rows, tl.broadcast_to(scale, rows.shape), mask=inside)
    tl.store(out_ptr + out_rows[:, None] + outputs[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def _quantise_rows(
    x_ptr, static_ptr, codes_ptr, scales_ptr,
    X_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    store_row(x, static_ptr, codes_ptr, scales_ptr, row, columns, inside, D, STATIC)


@kernel
def pair_of(order_ptr, rows, inside, tokens, SLOTS: tl.constexpr):
    """Rows in the order of moe.py -> pairs, token * SLOTS + slot; a row of the shared expert is its own number."""
    routed = rows < tokens.to(tl.int64) * SLOTS
    return tl.where(routed, tl.load(order_ptr + rows, mask=inside & routed, other=0), rows)


@kernel
def token_of(order_ptr, rows, inside, tokens, SLOTS: tl.constexpr):
    """Rows in the order of moe.py -> their tokens, int64."""
    pairs = tokens.to(tl.int64) * SLOTS
    return tl.where(rows < pairs, pair_of(order_ptr, rows, inside, tokens, SLOTS) // SLOTS, rows - pairs)


@kernel
def _quantise_pairs(
    x_ptr, order_ptr, starts_ptr, static_ptr, shared_static_ptr, codes_ptr, scales_ptr, tokens,
    X_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, STATIC: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Quantise rows in the order of moe.py. STATIC: by the scale of each row's expert."""
    row = tl.program_id(0).to(tl.int64)
    token = token_of(order_ptr, row, True, tokens, SLOTS)
    if STATIC:
        expert = tl.arange(0, LANES)
        ends = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
        found = tl.sum(((ends <= row) & (expert < E)).to(tl.int64), 0)  # experts that end before the row
        static_ptr += tl.minimum(found, E - 1)
        if SHARED:  # noqa: SIM102 (joined, the rest would be compiled without a shared expert too)
            if row >= tokens.to(tl.int64) * SLOTS:
                static_ptr = shared_static_ptr
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + token * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    store_row(x, static_ptr, codes_ptr, scales_ptr, row, columns, inside, D, STATIC)


def quantise_rows(x: Tensor, scale: Tensor | None) -> QuantisedRows:
    """See formats/activations.py; x [T,D], whose rows may be strided."""
    rows = empty_rows(x, *x.shape)
    stride = row_stride("quantise_rows", "x", x)
    configuration = rows_configuration(POINTER[x.dtype], x.shape[1], stride, scale is not None)
    launch(configuration, (x.shape[0],), x_ptr=x, **row_pointers(rows, scale))
    return rows


def quantise_pairs(
    x: Tensor, order: Tensor, starts: Tensor, slots: int, scales: tuple[Tensor | None, Tensor | None], shared: bool
) -> QuantisedRows:
    """Rows [T*K + T, D] of x [T,D] in the order of moe.py, without the last T if not `shared`. scales: static
    scales of the experts, fp32 [E], and of the shared expert, [1]; both or neither."""
    tokens, width, experts = x.shape[0], x.shape[1], len(starts) - 1
    rows = empty_rows(x, tokens * slots + (tokens if shared else 0), width)
    stride = row_stride("quantise_pairs", "x", x)
    static = scales[0] is not None
    configuration = pairs_configuration(POINTER[x.dtype], width, stride, experts, slots, static, shared)
    arguments = {"x_ptr": x, "order_ptr": order, "starts_ptr": starts, "shared_static_ptr": scales[1]}
    arguments = {name: value for name, value in arguments.items() if name in configuration.types}
    launch(configuration, (len(rows.codes),), tokens=tokens, **arguments, **row_pointers(rows, scales[0]))
    return rows


def empty_rows(like: Rows, count: int, width: int) -> QuantisedRows:
    """Uninitialised rows [count, width], on the device of `like` and for its dtype."""
    codes = torch.empty(count, width, dtype=E4M3, device=like.device)
    return QuantisedRows(codes, codes.new_empty(count, dtype=torch.float32), like.dtype)


def row_pointers(rows: QuantisedRows, scale: Tensor | None) -> dict[str, Tensor]:
    """Arguments that code_types names."""
    static = {} if scale is None else {"static_ptr": scale}
    return {"codes_ptr": rows.codes, "scales_ptr": rows.scales, **static}


@kept
def rows_configuration(pointer: str, width: int, stride: int, static: bool) -> Configuration:
    """pointer: to the values, such as "*bf16". stride: of x's rows, in values."""
    constants: dict[str, Any] = {"X_STRIDE": stride, **row_constants(width), "STATIC": static}
    constants |= {} if static else {"static_ptr": None}
    types = {"x_ptr": pointer, **code_types(static)}
    return Configuration(_quantise_rows, types, constants, num_warps=row_warps(width))


@kept
def pairs_configuration(
    pointer: str, width: int, stride: int, experts: int, slots: int, static: bool, shared: bool
) -> Configuration:
    """pointer: to the values, such as "*bf16". stride: of x's rows, in values."""
    types = {"x_ptr": pointer, "order_ptr": "*i64", **code_types(static), "tokens": "i32"}
    types |= {"starts_ptr": "*i64"} if static else {}
    types |= {"shared_static_ptr": "*fp32"} if static and shared else {}
    missing = dict.fromkeys(sorted({"static_ptr", "starts_ptr", "shared_static_ptr"} - types.keys()))
    sizes = {"E": experts, "LANES": next_power_of_2(experts), "SLOTS": slots}
    constants = {"X_STRIDE": stride, **row_constants(width), **missing, **sizes, "STATIC": static, "SHARED": shared}
    return Configuration(_quantise_pairs, types, constants, num_warps=row_warps(width))


def code_types(static: bool) -> dict[str, str]:
    """Types of the pointers to quantised rows that a kernel writes, and to the static scale."""
    return {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", **({"static_ptr": "*fp32"} if static else {})}


def scale_types(names: Iterable[str], pointer: str) -> dict[str, str]:
    """Types of the pointers `names` to scales of rows, if `pointer` is to e4m3 rows; others have none."""
    return dict.fromkeys(names, "*fp32") if pointer == "*fp8e4nv" else {}


def row_constants(width: int) -> dict[str, int]:
    """Constants of a kernel that holds a whole row."""
    return {"D": width, "BLOCK": next_power_of_2(width)}


def row_warps(width: int) -> int:
    """Warps for a row: eight values a thread, 16 bytes of bf16."""
    return min(16, max(1, next_power_of_2(width) // 256))
