"""Shared by the kernels that read or write pages: argument checks, page addresses, loads of a tile."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.triton.launch import kernel

SUPPORTED = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def require_pages(operation: str, **pages: Tensor) -> None:
    """Raise ArgumentError for pages of a dtype that no kernel reads, and for pages that are not contiguous."""
    for name, tensor in pages.items():
        if tensor.dtype in SUPPORTED and tensor.is_contiguous():
            continue  # words of a refusal take longer than all else
        known = ", ".join(str(dtype) for dtype in SUPPORTED)
        check.require(
            operation, tensor.dtype in SUPPORTED, f"{name} has dtype {tensor.dtype}; on a GPU pages are {known}"
        )
        check.require(operation, tensor.is_contiguous(), f"{name} {list(tensor.shape)} must be contiguous")


def require_attention(operation: str, q: Tensor, **pages: Tensor) -> None:
    """Raise ArgumentError for pages that no kernel reads, and for heads of q whose values are not contiguous."""
    require_pages(operation, **pages)
    if q.stride(2) != 1:
        check.require(operation, False, f"the values of a head must be contiguous, strides {q.stride()}")


def tile_width(width: int) -> int:
    """Columns of a tile that holds `width` columns: a power of two that a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def value_bits(pointer: str) -> int:
    """Bits of a value that a pointer such as "*bf16" points to."""
    return {"*fp8e4nv": 8, "*bf16": 16, "*fp16": 16, "*fp32": 32}[pointer]


@kernel
def page_rows(table_ptr, positions, live, S: tl.constexpr):
    """Positions of one sequence -> rows of the pages, int64; row 0 for positions that are not `live`.

    table_ptr: the sequence's row of the block tables, which is not read for positions that are not live.
    """
    blocks = tl.load(table_ptr + positions // S, mask=live, other=0).to(tl.int64)
    return tl.where(live, blocks * S + positions % S, 0)


@kernel
def load_tile(pointer, rows, live, columns, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tile [rows, columns] of a matrix of rows STRIDE apart; rows not `live` and columns past WIDTH are 0."""
    inside = live[:, None]
    if WIDTH < BLOCK:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@kernel
def anew(number):
    """An int32 as it is; what is made of it the compiler makes anew, and has kept no registers for."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)
