"""Expansion of latents to keys or values of every head: rows [C, R+...] times a matrix [N, R], N = heads * width.

A program computes a tile of ROWS tokens and COLUMNS values; each value is one chain of products over R in order, so
the number of tokens does not change it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch

ROWS, COLUMNS, DEPTH = 128, 128, 64


@kernel
def _expand(
    latents_ptr, weight_ptr, out_ptr, num_rows,
    STRIDE: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < num_rows)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, R, DEPTH):
        inner = tl.arange(0, DEPTH)
        deep = (depth + inner < R if R % DEPTH != 0 else inner < DEPTH)[None, :]
        left = tl.load(latents_ptr + rows[:, None] * STRIDE + depth + inner[None, :], mask=live & deep, other=0.0)
        inside = (columns < N)[:, None] & deep
        right = tl.load(weight_ptr + columns[:, None] * R + depth + inner[None, :], mask=inside, other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
    out = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live & (columns < N)[None, :])


def expand(latents: Tensor, weight: Tensor) -> Tensor:
    """Expand latents [C,R+...], of which columns past R are ignored, by a contiguous weight [H,n,R] -> [C,H,n]."""
    heads, width, rank = weight.shape
    out = torch.empty(len(latents), heads, width, dtype=weight.dtype, device=weight.device)
    launch(
        expand_configuration(POINTER[weight.dtype], rank, heads * width, latents.stride(0)),
        (divide_up(heads * width, COLUMNS), divide_up(len(latents), ROWS)),
        latents_ptr=latents,
        weight_ptr=weight,
        out_ptr=out,
        num_rows=len(latents),
    )
    return out


@kept
def expand_configuration(pointer: str, rank: int, columns: int, stride: int) -> Configuration:
    """columns: N. stride: of the latents' rows, in values."""
    types = dict.fromkeys(("latents_ptr", "weight_ptr", "out_ptr"), pointer) | {"num_rows": "i32"}
    constants = {"STRIDE": stride, "R": rank, "N": columns, "ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    return Configuration(_expand, types, constants, num_warps=8)
