"""Dense products, and those of each head.

Where the outputs are too narrow to occupy a card, k is cut in parts (heuristics.parts): each is a chain of products
that begins at zero, and the parts are added in order, in fp32.

    few tokens     a program for each part writes its chain to parts [P,T,N]; `_sum_parts` adds them up
    many tokens    one program computes the parts one after another, and adds up each as it is done
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.triton.activations import empty_rows, quantise_rows, scale_types, store_tile
from cierzo.kernels.triton.heuristics import APART_TOKENS, MULTIPROCESSORS, Parts, Tile, narrow, reading, tile
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.product import Weights, pointers, product, row_stride

SUM_BLOCK = 512  # outputs of a token that one program adds up
TOGETHER = tl.constexpr(8)  # tiles of tokens whose programs follow each other, so that they share weights in L2


@kernel
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
    """out[t, head] = x[t, head] @ weight[head]^T, then COPIED values of x, those that follow its first K. x and out
    may be e4m3, each with scales of its rows: of x the quantised rows, of out by *static_ptr.

    APART: out is parts [P,T,N], of which the third index of the program is P's."""
    N: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    head = tl.program_id(1).to(tl.int64)
    tile_n, tile_t = _tile(tl.program_id(0), tokens, N, BLOCK_N, BLOCK_T)
    token = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    x_rows = tile_t * BLOCK_T if DESCRIBED else token.to(tl.int64) * X_STRIDE + head * X_HEAD
    out_rows = token.to(tl.int64) * OUT_STRIDE + head * OUT_HEAD
    n_start = tile_n * BLOCK_N
    outputs = n_start + tl.arange(0, BLOCK_N)
    x_scales = None
    if x_scales_ptr is not None:
        x_scales = tl.load(x_scales_ptr + token, mask=inside, other=0.0)
    if APART or PARTS == 1:
        k_start = tl.program_id(2) * PART_K if APART else 0
        k_end = tl.minimum(k_start + PART_K, K) if APART else K
        total = product(
            x_ptr, x_rows, inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, head, n_start, k_start, k_end,
            PAIRED, DESCRIBED, DESCRIBED,
            FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
        )  # fmt: skip
        if APART:
            out_rows += tl.program_id(2).to(tl.int64) * tokens * OUT_STRIDE
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
    """Which of the tiles is this program's: TOGETHER tiles of tokens by all tiles of outputs, then the next."""
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # tl.cdiv of constants is none before Triton 3.9
    down = tl.cdiv(tokens, BLOCK_T)
    first = program // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    within = program % (TOGETHER * across)
    return within // height, first + within % height


@kernel
def _sum_parts(parts_ptr, out_ptr, tokens, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of parts[p,t], fp32, in the order of p: as `_linear` adds them that has them all."""
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
    return _multiply("linear", x, weight, _empty(x, weight.shape[0]))


def lm_head(hidden: Tensor, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    out = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    return _multiply("lm_head", hidden, weight, out)


def gated_mlp(x: Rows, gate_up: Matrix, down: Matrix) -> Tensor:
    """See ops/linear.py."""
    return gated_mlp_into(x, gate_up, down, _empty(x, x.shape[1]))


def gated_mlp_into(x: Rows, gate_up: Matrix, down: Matrix, out: Tensor) -> Tensor:
    """gated_mlp, written to rows of out. By a static scale, the first product writes what the second takes."""
    static, inner = static_scales(down), _empty(x, down.shape[1])
    if static is None:
        _multiply("gated_mlp", x, gate_up, inner, paired=True)
        return _multiply("gated_mlp", inner, down, out)
    rows = empty_rows(x, *inner.shape)
    _multiply("gated_mlp", x, gate_up, rows.codes, paired=True, static=static, out_scales=rows.scales)
    return _multiply("gated_mlp", rows, down, out)


def _empty(x: Rows, width: int) -> Tensor:
    return torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)


def mla_absorb(q: Tensor, w_uk_t: Matrix) -> Tensor:
    """See ops/attention.py."""
    heads, rank, nope = w_uk_t.shape
    rope = q.shape[2] - nope
    return _multiply("mla_absorb", q, w_uk_t, q.new_empty(q.shape[0], heads, rank + rope), copied=rope)


def mla_unabsorb(latents: Tensor, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    return _multiply("mla_unabsorb", latents, w_uv, latents.new_empty(latents.shape[0], *w_uv.shape[:2]))


def _multiply(
    operation: str,
    x: Rows,
    matrix: Matrix,
    out: Tensor,
    paired: bool = False,
    copied: int = 0,
    static: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> Tensor:
    """static, out_scales: of an e4m3 out, the scale that it is made by and the rows' copies of it."""
    weights = Weights.of(operation, matrix)
    tokens = x.shape[0]
    if isinstance(x, Tensor) and takes_fp8(matrix):
        if x.dim() == 3:
            raise ArgumentError(f"{operation}: heads are multiplied in 16 bits, the matrix takes FP8")
        x = quantise_rows(x, static_scales(matrix))
    x, x_scales = (x, None) if isinstance(x, Tensor) else (x.codes, x.scales)
    by_heads = x.dim() == 3
    strides = row_stride(operation, "x", x), x.stride(1) if by_heads else 0
    out_strides = out.stride(0) if tokens != 1 else out[0].numel(), out.stride(1) if by_heads else 0
    chosen, cut = tile(weights, POINTER[x.dtype], paired, tokens), Parts(1, weights.k)
    if not (paired or by_heads):  # those are wide, or many
        chosen, cut = narrow(weights, chosen, tokens, multiprocessors(x.device))
    if not by_heads:
        chosen = reading(chosen, weights, tokens, strides[0] * x.element_size())
    # Made anew in each call: torch keeps what a recorded graph uses in the graph's own pool.
    target = out.new_empty(cut.count, *out.shape, dtype=torch.float32) if cut.apart else out
    types = POINTER[x.dtype], POINTER[target.dtype]
    configuration = linear_configuration(types, weights, chosen, strides, out_strides, paired, copied, cut)
    outputs = weights.rows // 2 if paired else weights.rows
    tiles = triton.cdiv(tokens, chosen.block_t) * triton.cdiv(outputs, chosen.block_n)
    grid = (tiles, x.shape[1] if by_heads else 1, cut.count if cut.apart else 1)
    scales = {"x_scales_ptr": x_scales, "static_ptr": static, "out_scales_ptr": out_scales}
    present = {name: tensor for name, tensor in scales.items() if tensor is not None}
    present |= pointers(matrix, chosen.described)
    launch(configuration, grid, x_ptr=x, out_ptr=target, tokens=tokens, **present)
    if cut.apart:
        configuration = sum_configuration(POINTER[out.dtype], weights.rows, cut.count)
        sums = (tokens, triton.cdiv(weights.rows, SUM_BLOCK))
        launch(configuration, sums, parts_ptr=target, out_ptr=out, tokens=tokens)
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the card; in the interpreter, of the one that the kernels are compiled for."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
    """types: of x and of the result, or of its parts. strides: of a token and of a head, in values."""
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
        blocks={"x_ptr": (chosen.block_t, chosen.block_k), "codes_ptr": chosen.weight_block(weights.format)}
        if chosen.described
        else {},
    )


def sum_configuration(pointer: str, outputs: int, count: int) -> Configuration:
    """pointer: of the result."""
    types = {"parts_ptr": "*fp32", "out_ptr": pointer, "tokens": "i32"}
    return Configuration(_sum_parts, types, {"N": outputs, "PARTS": count, "BLOCK": SUM_BLOCK})


# Where Small 4 and Small 3 multiply: (model, operation, outputs, k)
SIZES = (
    ("small4", "q_kv_down", 1344, 4096),
    ("small4", "q_up", 4096, 1024),
    ("small4", "o_proj", 4096, 4096),
    ("small4", "shared_gate_up", 4096, 4096),
    ("small4", "lm_head", 131072, 4096),
    ("small3", "qkv", 6144, 5120),
    ("small3", "o_proj", 5120, 4096),
    ("small3", "gate_up", 65536, 5120),
    ("small3", "down", 5120, 32768),
    ("small3", "lm_head", 131072, 5120),
)


def configurations() -> Iterator[tuple[str, Configuration]]:
    """What serving Small 4 and Small 3 launches here, by model, operation and format."""
    for format, of_x in (("bf16", "bf16"), ("fp8", "bf16"), ("nvfp4", "bf16"), ("fp8", "fp8")):
        for model, name, outputs, k in SIZES:
            if name == "lm_head" and format != "bf16":
                continue  # no published checkpoint quantises it
            paired = name.endswith("gate_up")
            weights = Weights.stored(format, outputs, k)
            in_fp8 = of_x == "fp8"
            types = "*fp8e4nv" if in_fp8 else "*bf16", "*fp32" if name == "lm_head" else "*bf16"
            strides = [(k, 0), (outputs // 2 if paired else outputs, 0)]
            label = format + (" x fp8" if in_fp8 else "")
            yield from _forms(f"{model} {name}", label, types, weights, strides, paired)
            if in_fp8 and paired:
                types = types[0], "*fp8e4nv"
                yield from _forms(f"{model} {name}", f"{label}, static", types, weights, strides, paired)
    absorb, unabsorb = Weights.stored("bf16", 256, 64), Weights.stored("bf16", 128, 256)
    for name, weights, width, copied in (("absorb", absorb, 128, 64), ("unabsorb", unabsorb, 256, 0)):
        out = weights.rows + copied
        by_heads = (32 * width, width), (32 * out, out)
        chosen = tile(weights, "*bf16", paired=False)
        types = "*bf16", "*bf16"
        yield f"small4 {name} bf16", linear_configuration(types, weights, chosen, *by_heads, copied=copied)


def _forms(
    name: str, format: str, types: tuple[str, str], weights: Weights, strides: list[tuple[int, int]], paired: bool
) -> Iterator[tuple[str, Configuration]]:
    """Of few tokens, where its parts are apart, and of many, read by pointers and through descriptors."""
    wide = tile(weights, types[0], paired)
    for tokens, described in ((1, False), (APART_TOKENS + 1, False), (APART_TOKENS + 1, True)):
        chosen, cut = (wide, Parts(1, weights.k)) if paired else narrow(weights, wide, tokens)
        if not cut.apart and tokens == 1:
            continue
        chosen = replace(chosen, described=described)
        target = types[0], "*fp32" if cut.apart else types[1]
        configuration = linear_configuration(target, weights, chosen, strides[0], strides[1], paired, 0, cut)
        yield f"{name} {format}{', apart' if cut.apart else ''}{', TMA' if described else ''}", configuration
        if cut.apart and format == "bf16":  # the same for all formats
            yield f"{name}, sum of parts", sum_configuration(types[1], weights.rows, cut.count)
