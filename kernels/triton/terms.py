"""Rows that are loaded whole, or as the terms that make them up (ops/terms.py), which are added while loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.ops.terms import Summands, Terms
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch

SUM_BLOCK = 1024  # values of a row that one program adds up


@kernel
def load_rows(
    x_ptr, shares_ptr, row, columns, inside, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Values of row `row` (int64) at `columns`, zeros where not `inside`: fp32, rounded to `dtype`. PARTS, SLOTS:
    the number of terms, else 0; SLOTS: by the weights shares_ptr [tokens,SLOTS], then the SHARED one."""
    if PARTS > 0:
        total = columns * 0.0
        for part in tl.static_range(PARTS):
            start = (part * tokens.to(tl.int64) + row) * X_STRIDE
            total += tl.load(x_ptr + start + columns, mask=inside, other=0.0)
        return total.to(dtype).to(tl.float32)
    if SLOTS > 0:
        start = x_ptr + row * (SLOTS * X_STRIDE)
        total = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32) * tl.load(shares_ptr + row * SLOTS)
        for slot in tl.static_range(1, SLOTS):
            value = tl.load(start + slot * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(shares_ptr + row * SLOTS + slot)
        if SHARED:
            start = x_ptr + (tokens.to(tl.int64) * SLOTS + row) * X_STRIDE
            total += tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
        return total.to(dtype).to(tl.float32)
    return tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)


@chained
def _sum_terms(
    x_ptr, shares_ptr, out_ptr, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    after_others()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = load_rows(x_ptr, shares_ptr, row, columns, columns < D, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype)
    tl.store(out_ptr + row * D + columns, total.to(dtype), mask=columns < D)


def sum_terms(terms: Terms) -> Tensor:
    """See ops/terms.py."""
    rows, width = terms.shape
    out = terms.values.new_empty(rows, width, dtype=terms.dtype)
    configuration = sum_configuration(POINTER[terms.dtype], layout(*form(terms)), width)
    grid = (rows, divide_up(width, configuration.constants["BLOCK"]))
    launch(configuration, grid, out_ptr=out, **arguments(terms))
    return out


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows lie in memory. pointer: to the values, such as "*bf16". stride: from a row, or a term of it, to the
    next, in values. parts, slots, shared: as in Terms; none for rows."""

    pointer: str
    stride: int
    parts: int = 0
    slots: int = 0
    shared: bool = False

    @classmethod
    def of(cls, rows: Summands) -> Layout:
        """Layout of rows or terms."""
        return layout(*form(rows))

    @property
    def types(self) -> dict[str, str]:
        """Types of the arguments of load_rows."""
        types = {"x_ptr": self.pointer} | ({"tokens": "i32"} if self.parts or self.slots else {})
        return types | ({"shares_ptr": "*fp32"} if self.slots else {})

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of load_rows."""
        missing = dict.fromkeys(sorted({"shares_ptr", "tokens"} - self.types.keys()))
        sizes = {"X_STRIDE": self.stride, "PARTS": self.parts, "SLOTS": self.slots, "SHARED": self.shared}
        return {**sizes, **missing}


def form(rows: Summands) -> tuple[Any, ...]:
    """Arguments of `layout`: dtype and shape of the values, and their stride, or their weights' shape."""
    if isinstance(rows, Tensor):
        return rows.dtype, rows.shape, rows.stride(0)
    values, weights = rows.values, rows.weights
    return values.dtype, values.shape, None if weights is None else weights.shape


@kept
def layout(dtype: torch.dtype, shape: torch.Size, more: int | torch.Size | None) -> Layout:
    """The layout of what has this form."""
    pointer, width = POINTER[dtype], shape[-1]
    if isinstance(more, int):
        return Layout(pointer, more)
    if more is None:
        return Layout(pointer, width, parts=shape[0])
    return Layout(pointer, width, slots=more[1], shared=shape[0] > more.numel())


def arguments(rows: Summands) -> dict[str, Any]:
    """Arguments that Layout.types names."""
    if isinstance(rows, Tensor):
        return {"x_ptr": rows}
    if rows.weights is None:
        return {"x_ptr": rows.values, "tokens": rows.values.shape[1]}
    return {"x_ptr": rows.values, "tokens": rows.weights.shape[0], "shares_ptr": rows.weights}


@kept
def sum_configuration(pointer: str, layout: Layout, width: int) -> Configuration:
    """pointer: to the sums, such as "*bf16"."""
    block = min(SUM_BLOCK, triton.next_power_of_2(width))
    constants = {**layout.constants, "D": width, "BLOCK": block}
    return Configuration(_sum_terms, {**layout.types, "out_ptr": pointer}, constants, num_warps=4)
