"""Dense products, and products of each head with a matrix of its own.

Where the outputs are too narrow to occupy a card, k is cut into parts (heuristics.narrow): each is a chain of
products that begins at zero, and the parts are added in order, in fp32.

    few tokens     a program for each part writes its sum to parts [P,T,N]; `_sum_parts` adds them up
    many tokens    one program computes the parts one after another, and adds each to the total
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands, Terms
from cierzo.kernels.triton.activations import empty_rows, quantise_rows, scale_types, store_tile
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.heuristics import MULTIPROCESSORS, Parts, Tile, decided, narrow, reading, tile
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.product import Weights, pointers, product, row_stride

SUM_BLOCK = 512  # outputs of a token that one program adds up
TOGETHER = tl.constexpr(8)  # tiles of tokens with consecutive programs, which then share weights in L2


@chained
def _linear(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, out_ptr, static_ptr, out_scales_ptr, tokens,
    X_STRIDE: tl.constexpr, X_HEAD: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_HEAD: tl.constexpr,
    COPIED: tl.constexpr, COPY_BLOCK: tl.constexpr, PAIRED: tl.constexpr,
    PARTS: tl.constexpr, PART_K: tl.constexpr, APART: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out[t, head] = x[t, head] @ weight[head]^T, followed by the COPIED values of x that follow its first K.

    e4m3 x has a scale for each row; e4m3 out is quantised by the static scale *static_ptr, and gets that as the
    scale of its rows. APART: out is parts [P,T,N], and the third index of the program is the part."""
    after_others()
    linear_tile(
        tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2),
        x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, out_ptr, static_ptr, out_scales_ptr, tokens,
        X_STRIDE, X_HEAD, OUT_STRIDE, OUT_HEAD, COPIED, COPY_BLOCK, PAIRED, PARTS, PART_K, APART,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
        DESCRIBED,
    )  # fmt: skip


@kernel
def linear_tile(
    program, head, part,
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, out_ptr, static_ptr, out_scales_ptr, tokens,
    X_STRIDE: tl.constexpr, X_HEAD: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_HEAD: tl.constexpr,
    COPIED: tl.constexpr, COPY_BLOCK: tl.constexpr, PAIRED: tl.constexpr,
    PARTS: tl.constexpr, PART_K: tl.constexpr, APART: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Tile number `program` of `_linear` for a head, and where APART for a part."""
    N: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    tile_n, tile_t = _tile(program, tokens, N, BLOCK_N, BLOCK_T)
    token = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    read = tl.minimum(token, tokens - 1).to(tl.int64)
    x_rows = tile_t * BLOCK_T if DESCRIBED else read * X_STRIDE + head * X_HEAD
    out_rows = token.to(tl.int64) * OUT_STRIDE + head * OUT_HEAD
    n_start = tile_n * BLOCK_N
    outputs = n_start + tl.arange(0, BLOCK_N)
    x_scales = None
    if x_scales_ptr is not None:
        x_scales = tl.load(x_scales_ptr + token, mask=inside, other=0.0)
    if APART or PARTS == 1:
        k_start = part * PART_K if APART else 0
        k_end = (k_start + PART_K if K % PART_K == 0 else tl.minimum(k_start + PART_K, K)) if APART else K
        total = product(
            x_ptr, x_rows, inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, head, n_start, k_start, k_end,
            PAIRED, DESCRIBED, DESCRIBED,
            FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
        )  # fmt: skip
        if APART:
            out_rows += part.to(tl.int64) * tokens * OUT_STRIDE
    else:
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k_start in range(0, K, PART_K):
            k_end = k_start + PART_K if K % PART_K == 0 else tl.minimum(k_start + PART_K, K)
            total += product(
                x_ptr, x_rows, inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, head, n_start,
                k_start, k_end, PAIRED, DESCRIBED, DESCRIBED,
                FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K,
                TOKENS_ON_M,
            )  # fmt: skip
    mask = inside[:, None] & (outputs < N)[None, :]
    first = tile_n == 0
    store_tile(total, out_ptr, out_rows, outputs, mask, static_ptr, out_scales_ptr, token, inside, first)
    if COPIED > 0:  # noqa: SIM102 (joined, the rest would be compiled for COPIED = 0 too)
        if tile_n == 0:
            columns = tl.arange(0, COPY_BLOCK)
            copy_mask = inside[:, None] & (columns < COPIED)[None, :]
            copied = tl.load(x_ptr + x_rows[:, None] + (K + columns)[None, :], mask=copy_mask, other=0.0)
            tl.store(out_ptr + out_rows[:, None] + (N + columns)[None, :], copied, mask=copy_mask)


@kernel
def _tile(program, tokens, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """(tile of outputs, tile of tokens) of a program: all tiles of outputs for TOGETHER tiles of tokens, then for
    the next ones."""
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # tl.cdiv of constants is none before Triton 3.9
    down = tl.cdiv(tokens, BLOCK_T)
    first = program // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    within = program % (TOGETHER * across)
    return within // height, first + within % height


@kernel
def _sum_parts(parts_ptr, out_ptr, tokens, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of parts[p,t], fp32, in the order of p, as `_linear` adds parts that are not apart."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        row = (part * tokens.to(tl.int64) + token) * N
        total += tl.load(parts_ptr + row + columns, mask=inside, other=0.0)
    tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear(x: Rows, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    found: Tensor = multiply("linear", x, weight, None)
    return found


def linear_terms(x: Rows, weight: Matrix) -> Summands:
    """See ops/linear.py."""
    return multiply("linear_terms", x, weight, None, terms=True)


def lm_head(hidden: Tensor, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    out = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    return multiply("lm_head", hidden, weight, out)


def gated_mlp(x: Rows, gate_up: Matrix, down: Matrix) -> Tensor:
    """See ops/linear.py."""
    return gated_mlp_into(x, gate_up, down, _empty(x, x.shape[1]))


def gated_mlp_into(x: Rows, gate_up: Matrix, down: Matrix, out: Tensor) -> Tensor:
    """gated_mlp, written to rows of out. With a static scale, the first product writes the codes that the second
    reads."""
    static, inner = static_scales(down), _empty(x, down.shape[1])
    if static is None:
        multiply("gated_mlp", x, gate_up, inner, paired=True)
        return multiply("gated_mlp", inner, down, out)
    rows = empty_rows(x, *inner.shape)
    multiply("gated_mlp", x, gate_up, rows.codes, paired=True, static=static, out_scales=rows.scales)
    return multiply("gated_mlp", rows, down, out)


def _empty(x: Rows, width: int) -> Tensor:
    return torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)


def mla_absorb(q: Tensor, w_uk_t: Matrix) -> Tensor:
    """See ops/attention.py."""
    heads, rank, nope = w_uk_t.shape
    rope = q.shape[2] - nope
    return multiply("mla_absorb", q, w_uk_t, q.new_empty(q.shape[0], heads, rank + rope), copied=rope)


def mla_unabsorb(latents: Tensor, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    return multiply("mla_unabsorb", latents, w_uv, latents.new_empty(latents.shape[0], *w_uv.shape[:2]))


def multiply(
    operation: str,
    x: Rows,
    matrix: Matrix,
    out: Tensor | None,
    paired: bool = False,
    copied: int = 0,
    static: Tensor | None = None,
    out_scales: Tensor | None = None,
    terms: bool = False,
) -> Any:
    """out = x @ matrix^T; paired: silu(gate) * up, of gate above up. static, out_scales: for e4m3 out, the scale to
    quantise by, and the rows' scales. terms: parts of k that are apart are given as they are, and out is not
    written. Without out, the result is in x's dtype."""
    if isinstance(x, Tensor) and takes_fp8(matrix):
        if x.dim() == 3:
            raise ArgumentError(f"{operation}: heads are multiplied in 16 bits, the matrix takes FP8")
        x = quantise_rows(x, static_scales(matrix))
    dtype = x.dtype
    x, x_scales = (x, None) if isinstance(x, Tensor) else (x.codes, x.scales)
    weights, tokens, by_heads = Weights.of(operation, matrix), x.shape[0], x.dim() == 3
    width = weights.rows if out is None else out.stride(0) if tokens != 1 else out[0].numel()
    planned = _product(
        weights,
        (x.dtype, dtype if out is None else out.dtype),
        (tokens, x.shape[1] if by_heads else 0),
        (row_stride(operation, "x", x), x.stride(1) if by_heads else 0),
        (width, out.stride(1) if by_heads and out is not None else 0),
        paired,
        copied,
        multiprocessors(x.device),
    )
    # Allocated in each call: torch keeps the memory of a captured graph in the graph's own pool.
    if planned.sum is not None:
        target = x.new_empty(planned.parts, tokens, weights.rows, dtype=torch.float32)
    else:
        target = out = x.new_empty(tokens, weights.rows, dtype=dtype) if out is None else out
    present = pointers(matrix, planned.described)
    if x_scales is not None:
        present["x_scales_ptr"] = x_scales
    if static is not None:
        present["static_ptr"] = static
    if out_scales is not None:
        present["out_scales_ptr"] = out_scales
    launch(planned.configuration, planned.grid, x_ptr=x, out_ptr=target, tokens=tokens, **present)
    if planned.sum is None:
        return out
    if terms:
        return Terms(target, None, dtype)
    out = x.new_empty(tokens, weights.rows, dtype=dtype) if out is None else out
    launch(planned.sum, (tokens, planned.sums), parts_ptr=target, out_ptr=out, tokens=tokens)
    return out


@dataclass(frozen=True, slots=True)
class _Planned:
    """A product whose choices are made. sum: the launch that adds up parts, if they have programs of their own, and
    its programs for a token."""

    configuration: Configuration
    grid: tuple[int, int, int]
    described: bool
    parts: int
    sum: Configuration | None
    sums: int


@decided
def _product(
    weights: Weights,
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: tuple[int, int],
    strides: tuple[int, int],
    out_strides: tuple[int, int],
    paired: bool,
    copied: int,
    processors: int,
) -> _Planned:
    """The launches of a product. dtypes: of x and of the result. rows: tokens, and heads or 0. Strides: of a token
    and of a head, in values."""
    (of_x, of_out), (tokens, heads) = (POINTER[dtype] for dtype in dtypes), rows
    chosen, cut = tile(weights, of_x, paired, tokens), Parts(1, weights.k)
    if not (paired or heads):  # gate and up are wide, and heads are many
        chosen, cut = narrow(weights, chosen, tokens, processors)
    if not heads:
        chosen = reading(chosen, weights, tokens, strides[0] * dtypes[0].itemsize)
    types = of_x, "*fp32" if cut.apart else of_out
    configuration = linear_configuration(types, weights, chosen, strides, out_strides, paired, copied, cut)
    outputs = weights.rows // 2 if paired else weights.rows
    tiles = divide_up(tokens, chosen.block_t) * divide_up(outputs, chosen.block_n)
    grid = (tiles, heads or 1, cut.count if cut.apart else 1)
    total = sum_parts_configuration(of_out, weights.rows, cut.count) if cut.apart else None
    sums = divide_up(weights.rows, SUM_BLOCK)
    return _Planned(configuration, grid, chosen.described, cut.count, total, sums)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the card; for meta tensors, of the card that there is; in the interpreter, and without a
    card, of that which kernels are compiled for."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@kept
def linear_configuration(
    types: tuple[str, str],
    weights: Weights,
    chosen: Tile,
    strides: tuple[int, int],
    out_strides: tuple[int, int],
    paired: bool = False,
    copied: int = 0,
    cut: Parts | None = None,
) -> Configuration:
    """types: of x, and of the result or its parts. strides, out_strides: of a token and of a head, in values."""
    scaled = {**scale_types(["x_scales_ptr"], types[0]), **scale_types(["static_ptr", "out_scales_ptr"], types[1])}
    return Configuration(
        _linear,
        {"x_ptr": types[0], **weights.types(), "out_ptr": types[1], **scaled, "tokens": "i32"},
        {
            **weights.without(),
            **dict.fromkeys({"x_scales_ptr", "static_ptr", "out_scales_ptr"} - scaled.keys()),
            **weights.constants,
            **chosen.constants,
            **(cut or Parts(1, weights.k)).constants,
            "X_STRIDE": strides[0],
            "X_HEAD": strides[1],
            "OUT_STRIDE": out_strides[0],
            "OUT_HEAD": out_strides[1],
            "COPIED": copied,
            "COPY_BLOCK": triton.next_power_of_2(copied),
            "PAIRED": paired,
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        blocks=chosen.blocks(weights.format, codes=["codes_ptr"], rows=["x_ptr"]),
    )


@kept
def sum_parts_configuration(pointer: str, outputs: int, count: int) -> Configuration:
    """pointer: to the result, such as "*bf16"."""
    types = {"parts_ptr": "*fp32", "out_ptr": pointer, "tokens": "i32"}
    return Configuration(_sum_parts, types, {"N": outputs, "PARTS": count, "BLOCK": SUM_BLOCK})
