"""Attention of an image's patches, which all see one another, and GELU.

A program of attention computes ROWS patches of one head over all of the image's, TOKENS at a time; every patch
meets the same tiles in the same order.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.paged import load_tile, tile_width
from cierzo.kernels.triton.softmax import LOG2_E, softmax_step

ROWS, TOKENS = 128, 64  # patches of a program, and of a tile that it reads
GELU_VALUES = 1024  # of a program


@kernel
def _image_attend(
    q_ptr, keys_ptr, values_ptr, out_ptr, count, factor,
    H: tl.constexpr, D: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * D
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    columns = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr + head, rows, inside, columns, Q_STRIDE, D, BLOCK_D)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for position in range(0, count, TOKENS):
        tokens = position + tl.arange(0, TOKENS)
        live = tokens < count
        tokens = tokens.to(tl.int64)
        keys = load_tile(keys_ptr + head, tokens, live, columns, K_STRIDE, D, BLOCK_D)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        scores = tl.where(live[None, :], scores, float("-inf"))
        values = load_tile(values_ptr + head, tokens, live, columns, V_STRIDE, D, BLOCK_D)
        acc, largest, total = softmax_step(scores, factor, values, acc, largest, total, False)
    kept = inside[:, None] & (columns < D)[None, :]
    place = rows[:, None] * (H * D) + head + columns[None, :]
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@kernel
def _gelu(x_ptr, out_ptr, X_STRIDE: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out_ptr + row * N + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


def image_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """See ops/vision.py."""
    count, heads, width = q.shape
    out = q.new_empty(q.shape)
    constants = {
        "H": heads,
        "D": width,
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": keys.stride(0),
        "V_STRIDE": values.stride(0),
        "ROWS": ROWS,
        "TOKENS": TOKENS,
        "BLOCK_D": tile_width(width),
    }
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), POINTER[q.dtype])
    configuration = Configuration(
        _image_attend, {**types, "count": "i32", "factor": "fp32"}, constants, num_warps=8, num_stages=2
    )
    tensors = {"q_ptr": q, "keys_ptr": keys, "values_ptr": values, "out_ptr": out}
    launch(configuration, (-(-count // ROWS), heads), count=count, factor=scale * LOG2_E, **tensors)
    return out


def gelu(x: Tensor) -> Tensor:
    """See ops/vision.py."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape)
    width = x.shape[1]
    constants = {"X_STRIDE": x.stride(0), "N": width, "BLOCK": GELU_VALUES}
    configuration = Configuration(_gelu, dict.fromkeys(("x_ptr", "out_ptr"), POINTER[x.dtype]), constants)
    launch(configuration, (len(x), -(-width // GELU_VALUES)), x_ptr=x, out_ptr=out)
    return out
