"""RMS normalisation: one program a row, which it holds whole, so that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch


@kernel
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, X_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + columns, _normed(x, weight_ptr, eps, columns, inside, D), mask=inside)


@kernel
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps,
    X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    residual_row = residual_ptr + row * RESIDUAL_STRIDE + columns
    total = x + tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    total = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_row, total, mask=inside)
    value = _normed(total.to(tl.float32), weight_ptr, eps, columns, inside, D)
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
    rows, width = x.shape
    configuration = rms_norm_configuration(POINTER[x.dtype], width, x.stride(0))
    launch(configuration, (rows,), x_ptr=x, weight_ptr=weight, out_ptr=out, eps=eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    out = x.new_empty(x.shape)
    rows, width = x.shape
    configuration = add_rms_norm_configuration(POINTER[x.dtype], width, x.stride(0), residual.stride(0))
    launch(configuration, (rows,), x_ptr=x, residual_ptr=residual, weight_ptr=weight, out_ptr=out, eps=eps)
    return out


def rms_norm_configuration(pointer: str, width: int, stride: int) -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    types = {"x_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer, "eps": "fp32"}
    return Configuration(_rms_norm, types, {"X_STRIDE": stride, **_row(width)}, num_warps=_warps(width))


def add_rms_norm_configuration(pointer: str, width: int, stride: int, residual_stride: int) -> Configuration:
    """pointer: of the values, such as "*bf16"."""
    types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr"), pointer) | {"eps": "fp32"}
    constants = {"X_STRIDE": stride, "RESIDUAL_STRIDE": residual_stride, **_row(width)}
    return Configuration(_add_rms_norm, types, constants, num_warps=_warps(width))


def configurations() -> Iterator[tuple[str, Configuration]]:
    """What Small 4 and Small 3 run: hidden rows, and the latent queries that lie beside latent keys."""
    for model, hidden in (("small4", 4096), ("small3", 5120)):
        yield f"{model} hidden", rms_norm_configuration("*bf16", hidden, hidden)
        yield f"{model} hidden", add_rms_norm_configuration("*bf16", hidden, hidden, hidden)
    yield "small4 query latent", rms_norm_configuration("*bf16", 1024, 1024 + 320)


def _row(width: int) -> dict[str, int]:
    return {"D": width, "BLOCK": next_power_of_2(width)}


def _warps(width: int) -> int:
    """Eight values a thread: 16 bytes of bf16."""
    return min(16, max(1, next_power_of_2(width) // 256))
