"""RMS normalisation: one program holds a whole row, so that no other row changes its bits. What is added to a
residual may come as terms (terms.py)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.triton.activations import (
    code_types,
    empty_rows,
    row_constants,
    row_pointers,
    row_warps,
    store_row,
)
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.heuristics import decided
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.terms import Layout, arguments, form, layout, load_rows


@kernel
def normed(x, weight_ptr, eps, columns, inside, D: tl.constexpr):
    """Norm of an fp32 row, rounded to the weight's dtype, then multiplied by the weight and rounded again."""
    dtype = weight_ptr.dtype.element_ty
    scaled = (x * tl.rsqrt(tl.sum(x * x) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return (scaled * weight).to(dtype)


@kernel
def _store_normed(
    x, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, row, columns, inside,
    D: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """The norm of a row x, fp32, into out; where CODES, quantised into codes and scales."""
    value = normed(x, weight_ptr, eps, columns, inside, D)
    if CODES:
        store_row(value.to(tl.float32), static_ptr, codes_ptr, scales_ptr, row, columns, inside, D, STATIC)
    else:
        tl.store(out_ptr + row * D + columns, value, mask=inside)


@chained
def _rms_norm(
    x_ptr, shares_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    after_others()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    x = load_rows(x_ptr, shares_ptr, row, columns, inside, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype)
    _store_normed(
        x, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, row, columns, inside, D, CODES, STATIC
    )


@chained
def _add_rms_norm(
    x_ptr, shares_ptr, residual_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """_rms_norm of x + residual, which becomes the residual."""
    after_others()
    add_and_norm_row(
        tl.program_id(0).to(tl.int64),
        x_ptr, shares_ptr, residual_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
        X_STRIDE, PARTS, SLOTS, SHARED, RESIDUAL_STRIDE, D, BLOCK, CODES, STATIC,
    )  # fmt: skip


@kernel
def add_and_norm_row(
    row,
    x_ptr, shares_ptr, residual_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """A row of `_add_rms_norm`."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    x = load_rows(x_ptr, shares_ptr, row, columns, inside, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype)
    residual_row = residual_ptr + row * RESIDUAL_STRIDE + columns
    total = (x + tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(residual_row, total, mask=inside)
    x = total.to(tl.float32)
    _store_normed(
        x, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps, row, columns, inside, D, CODES, STATIC
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    out = x.new_empty(*x.shape)
    _launch(x, None, weight, eps, "", out_ptr=out)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> QuantisedRows:
    """See ops/norm.py."""
    rows = empty_rows(x, *x.shape)
    _launch(x, None, weight, eps, "by row" if scale is None else "static", **row_pointers(rows, scale))
    return rows


def add_rms_norm(x: Summands, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    out = residual.new_empty(*residual.shape)
    _launch(x, residual, weight, eps, "", out_ptr=out)
    return out


def add_rms_norm_fp8(
    x: Summands, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None
) -> QuantisedRows:
    """See ops/norm.py."""
    rows = empty_rows(residual, *residual.shape)
    _launch(x, residual, weight, eps, "by row" if scale is None else "static", **row_pointers(rows, scale))
    return rows


Codes = Literal["", "static", "by row"]  # values as they are, or e4m3 by a static scale or by each row's own


def _launch(
    x: Summands, residual: Tensor | None, weight: Tensor, eps: float, codes: Codes, **written: Tensor
) -> None:
    stride = None if residual is None else residual.stride(0)
    configuration, grid = _planned(x.dtype, x.shape, form(x), codes, stride)
    if residual is not None:
        written["residual_ptr"] = residual
    launch(configuration, grid, eps=eps, weight_ptr=weight, **arguments(x), **written)


@decided
def _planned(
    dtype: torch.dtype, shape: torch.Size, of: tuple[Any, ...], codes: Codes, stride: int | None
) -> tuple[Configuration, tuple[int]]:
    """The launch of a norm of rows with this form. stride: of the residual's rows."""
    return norm_configuration(POINTER[dtype], shape[1], layout(*of), codes, stride), (shape[0],)


def norm_warps(width: int, codes: Codes = "") -> int:
    """Warps for a row: no more than those of a product that reads it in the same launch (latent_products.py). With
    four, divisions by a static scale, which are calls, would put registers into local memory."""
    return row_warps(width) if codes == "static" else min(4, row_warps(width))


@kept
def norm_configuration(
    pointer: str, width: int, layout: Layout, codes: Codes = "", residual_stride: int | None = None
) -> Configuration:
    """pointer: to the normed values, such as "*bf16". Strides: of rows, in values; None without a residual."""
    types = {**layout.types, "weight_ptr": pointer}
    constants: dict[str, Any] = {**layout.constants, **row_constants(width)}
    if residual_stride is not None:
        types["residual_ptr"] = pointer
        constants["RESIDUAL_STRIDE"] = residual_stride
    static = codes == "static"
    types |= code_types(static) if codes else {"out_ptr": pointer}
    constants |= dict.fromkeys({"out_ptr", "static_ptr", "codes_ptr", "scales_ptr"} - types.keys())
    constants |= {"CODES": bool(codes), "STATIC": static}
    function = _rms_norm if residual_stride is None else _add_rms_norm
    return Configuration(function, {**types, "eps": "fp32"}, constants, num_warps=norm_warps(width, codes))
