"""Rows of activations into e4m3 codes, each row with its scale (formats/activations.py), a program a row.

Products take codes alone: quantising on load, every tile of outputs would do the same row again, and a row's own
scale is not known before its end. What writes rows can write codes: norms (norm.py), and a product whose result
meets a static scale (`store_tile`). The bits are those of the kernels here.

The experts' rows are put into the order in which they are multiplied (moe.py): a token that goes to four experts
has four rows, each by its expert's scale, and the product reads them side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from cierzo.kernels.formats.activations import QuantisedRows, Rows
from cierzo.kernels.formats.device import E4M3, LARGEST_E4M3, SMALLEST
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.product import row_stride

LARGEST = tl.constexpr(LARGEST_E4M3)
LEAST_PEAK = tl.constexpr(SMALLEST)


@kernel
def e4m3(values, scales):
    """fp32 values and scales of one shape -> codes. Rounded division: `/` is not, on a GPU."""
    quotients = tl.div_rn(values, scales)
    return tl.clamp(quotients, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@kernel
def row_scale(values):
    """Of one row, fp32; its NaN do not count."""
    peak = tl.max(tl.where(values == values, tl.abs(values), 0.0))
    return tl.where(peak >= LEAST_PEAK, tl.div_rn(peak, LARGEST), 1.0)


@kernel
def store_row(
    values, static_ptr, codes_ptr, scales_ptr, row, columns, inside, D: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """One row [BLOCK], fp32, zeros where it is not inside: its codes, and its scale, *static_ptr where STATIC."""
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
    """A product's tile [BLOCK_T, BLOCK_N], fp32, in the dtype of out; as codes by a static scale where those are
    e4m3, and then the `first` tile of a row, along its outputs, gives the row its scale."""
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
def _quantise_pairs(
    x_ptr, order_ptr, starts_ptr, static_ptr, shared_static_ptr, codes_ptr, scales_ptr, tokens,
    X_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, STATIC: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """codes[row] of the row's token, in the order of moe.py; the scale is that of the row's expert where STATIC."""
    row = tl.program_id(0).to(tl.int64)
    pairs = tokens.to(tl.int64) * SLOTS
    pair = tl.load(order_ptr + row, mask=row < pairs, other=0)
    token = tl.where(row < pairs, pair // SLOTS, row - pairs)
    if STATIC:
        expert = tl.arange(0, LANES)
        ends = tl.load(starts_ptr + expert + 1, mask=expert < E, other=0)
        found = tl.sum(((ends <= row) & (expert < E)).to(tl.int64), 0)  # experts that end before the row
        static_ptr += tl.minimum(found, E - 1)
        if SHARED:  # noqa: SIM102 (joined, the rest would be compiled without a shared expert too)
            if row >= pairs:
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
    """[T*K + T, D] in the order of moe.py; without the last T where there is no shared expert. scales: static ones
    of the experts, [E], and of the shared one, [1], both or neither."""
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
    """[count, width], of rows like those of `like`."""
    codes = torch.empty(count, width, dtype=E4M3, device=like.device)
    return QuantisedRows(codes, torch.empty(count, dtype=torch.float32, device=like.device), like.dtype)


def row_pointers(rows: QuantisedRows, scale: Tensor | None) -> dict[str, Tensor]:
    """The arguments that code_types names."""
    static = {} if scale is None else {"static_ptr": scale}
    return {"codes_ptr": rows.codes, "scales_ptr": rows.scales, **static}


def rows_configuration(pointer: str, width: int, stride: int, static: bool) -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    constants: dict[str, Any] = {"X_STRIDE": stride, **row_constants(width), "STATIC": static}
    constants |= {} if static else {"static_ptr": None}
    types = {"x_ptr": pointer, **code_types(static)}
    return Configuration(_quantise_rows, types, constants, num_warps=row_warps(width))


def pairs_configuration(
    pointer: str, width: int, stride: int, experts: int, slots: int, static: bool, shared: bool
) -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    types = {"x_ptr": pointer, "order_ptr": "*i64", **code_types(static), "tokens": "i32"}
    types |= {"starts_ptr": "*i64"} if static else {}
    types |= {"shared_static_ptr": "*fp32"} if static and shared else {}
    missing = dict.fromkeys(sorted({"static_ptr", "starts_ptr", "shared_static_ptr"} - types.keys()))
    sizes = {"E": experts, "LANES": next_power_of_2(experts), "SLOTS": slots}
    constants = {"X_STRIDE": stride, **row_constants(width), **missing, **sizes, "STATIC": static, "SHARED": shared}
    return Configuration(_quantise_pairs, types, constants, num_warps=row_warps(width))


def code_types(static: bool) -> dict[str, str]:
    """Of the pointers that a kernel writes rows to, and of the static scale."""
    return {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", **({"static_ptr": "*fp32"} if static else {})}


def scale_types(names: Iterable[str], pointer: str) -> dict[str, str]:
    """Of the pointers to scales that e4m3 rows have, and others have not."""
    return dict.fromkeys(names, "*fp32") if pointer == "*fp8e4nv" else {}


def row_constants(width: int) -> dict[str, int]:
    """Of a kernel that holds a row."""
    return {"D": width, "BLOCK": next_power_of_2(width)}


def row_warps(width: int) -> int:
    """Eight values a thread: 16 bytes of bf16."""
    return min(16, max(1, next_power_of_2(width) // 256))


def configurations() -> Iterator[tuple[str, Configuration]]:
    """What attention gives the output projections, and Small 4's experts."""
    for static in (True, False):
        kind = "static" if static else "by row"
        yield f"attention's output, {kind}", rows_configuration("*bf16", 4096, 4096, static)
        yield f"small4 experts, {kind}", pairs_configuration("*bf16", 4096, 4096, 128, 4, static, True)
    yield "small4 expert inner, by row", rows_configuration("*bf16", 2048, 2048, False)
    yield "small3 down, by row", rows_configuration("*bf16", 32768, 32768, False)
