"""RMS normalisation: one program a row, which it holds whole, so that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import triton.language as tl
from torch import Tensor

from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.triton.activations import (
    code_types,
    empty_rows,
    row_constants,
    row_pointers,
    row_warps,
    store_row,
)
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch


@kernel
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps,
    X_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Into out, or where CODES into codes and scales."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    value = _normed(x, weight_ptr, eps, columns, inside, D)
    if CODES:
        store_row(value.to(tl.float32), static_ptr, codes_ptr, scales_ptr, row, columns, inside, D, STATIC)
    else:
        tl.store(out_ptr + row * D + columns, value, mask=inside)


@kernel
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, static_ptr, codes_ptr, scales_ptr, eps,
    X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    CODES: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """The same of the sum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    residual_row = residual_ptr + row * RESIDUAL_STRIDE + columns
    total = x + tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    total = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_row, total, mask=inside)
    value = _normed(total.to(tl.float32), weight_ptr, eps, columns, inside, D)
    if CODES:
        store_row(value.to(tl.float32), static_ptr, codes_ptr, scales_ptr, row, columns, inside, D, STATIC)
    else:
        tl.store(out_ptr + row * D + columns, value, mask=inside)


@kernel
def _normed(x, weight_ptr, eps, columns, inside, D: tl.constexpr):
    """fp32 row -> its norm times the weight, in the weight's dtype; rounded before it meets the weight."""
    dtype = weight_ptr.dtype.element_ty
    scaled = (x * tl.rsqrt(tl.sum(x * x) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return (scaled * weight).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    out = x.new_empty(x.shape)
    configuration = rms_norm_configuration(POINTER[x.dtype], x.shape[1], x.stride(0))
    launch(configuration, (len(x),), x_ptr=x, weight_ptr=weight, out_ptr=out, eps=eps)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> QuantisedRows:
    """See ops/norm.py."""
    rows = empty_rows(x, *x.shape)
    configuration = rms_norm_configuration(POINTER[x.dtype], x.shape[1], x.stride(0), _scaled(scale))
    launch(configuration, (len(x),), x_ptr=x, weight_ptr=weight, eps=eps, **row_pointers(rows, scale))
    return rows


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    out = x.new_empty(x.shape)
    configuration = add_rms_norm_configuration(POINTER[x.dtype], x.shape[1], x.stride(0), residual.stride(0))
    launch(configuration, (len(x),), x_ptr=x, residual_ptr=residual, weight_ptr=weight, out_ptr=out, eps=eps)
    return out


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None
) -> QuantisedRows:
    """See ops/norm.py."""
    rows = empty_rows(x, *x.shape)
    strides = x.stride(0), residual.stride(0)
    configuration = add_rms_norm_configuration(POINTER[x.dtype], x.shape[1], *strides, _scaled(scale))
    tensors = {"x_ptr": x, "residual_ptr": residual, "weight_ptr": weight}
    launch(configuration, (len(x),), eps=eps, **tensors, **row_pointers(rows, scale))
    return rows


Codes = Literal["", "static", "by row"]  # what is written: values, or codes by one scale or the rows' own


def _scaled(scale: Tensor | None) -> Codes:
    return "by row" if scale is None else "static"


def rms_norm_configuration(pointer: str, width: int, stride: int, codes: Codes = "") -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    types = dict.fromkeys(("x_ptr", "weight_ptr"), pointer)
    return _configuration(_rms_norm, types, {"X_STRIDE": stride}, width, codes)


def add_rms_norm_configuration(
    pointer: str, width: int, stride: int, residual_stride: int, codes: Codes = ""
) -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), pointer)
    return _configuration(
        _add_rms_norm, types, {"X_STRIDE": stride, "RESIDUAL_STRIDE": residual_stride}, width, codes
    )


def _configuration(
    of: Any, types: dict[str, str], constants: dict[str, Any], width: int, codes: Codes
) -> Configuration:
    static = codes == "static"
    written = code_types(static) if codes else {"out_ptr": types["x_ptr"]}
    missing = dict.fromkeys({"out_ptr", "static_ptr", "codes_ptr", "scales_ptr"} - written.keys())
    constants = {**constants, **row_constants(width), **missing, "CODES": bool(codes), "STATIC": static}
    return Configuration(of, {**types, **written, "eps": "fp32"}, constants, num_warps=row_warps(width))


def configurations() -> Iterator[tuple[str, Configuration]]:
    """What Small 4 and Small 3 run: hidden rows, and the latent queries that lie beside latent keys."""
    for codes in get_args(Codes):
        suffix = f" fp8 {codes}" if codes else ""
        for model, hidden in (("small4", 4096), ("small3", 5120)):
            yield f"{model} hidden{suffix}", rms_norm_configuration("*bf16", hidden, hidden, codes)
            yield f"{model} hidden{suffix}", add_rms_norm_configuration("*bf16", hidden, hidden, hidden, codes)
        yield f"small4 query latent{suffix}", rms_norm_configuration("*bf16", 1024, 1024 + 320, codes)
