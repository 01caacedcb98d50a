"""Dense products, and those of each head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.triton.activations import empty_rows, quantise_rows, scale_types, store_tile
from cierzo.kernels.triton.heuristics import Tile, tile
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.product import Weights, pointers, product, row_stride

TOGETHER = tl.constexpr(8)  # tiles of tokens whose programs follow each other, so that they share weights in L2


@kernel
def _linear(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, out_ptr, static_ptr, out_scales_ptr, tokens,
    X_STRIDE: tl.constexpr, X_HEAD: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_HEAD: tl.constexpr,
    COPIED: tl.constexpr, COPY_BLOCK: tl.constexpr, PAIRED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """out[t, head] = x[t, head] @ weight[head]^T, then COPIED values of x, those that follow its first K. x and out
    may be e4m3, each with scales of its rows: of x the quantised rows, of out by *static_ptr."""
    N: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    head = tl.program_id(1).to(tl.int64)
    tile_n, tile_t = _tile(tl.program_id(0), tokens, N, BLOCK_N, BLOCK_T)
    token = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    x_rows = token.to(tl.int64) * X_STRIDE + head * X_HEAD
    out_rows = token.to(tl.int64) * OUT_STRIDE + head * OUT_HEAD
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_scales = None
    if x_scales_ptr is not None:
        x_scales = tl.load(x_scales_ptr + token, mask=inside, other=0.0)
    total = product(
        x_ptr, x_rows, inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, head, outputs, PAIRED,
        FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
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
    strides = (row_stride(operation, "x", x), x.stride(1)) if x.dim() == 3 else (row_stride(operation, "x", x), 0)
    out_strides = (out.stride(0) if tokens != 1 else out[0].numel(), out.stride(1) if x.dim() == 3 else 0)
    chosen = tile(weights, POINTER[x.dtype], paired, tokens)
    types = POINTER[x.dtype], POINTER[out.dtype]
    configuration = linear_configuration(types, weights, chosen, strides, out_strides, paired, copied)
    outputs = weights.rows // 2 if paired else weights.rows
    tiles = triton.cdiv(tokens, chosen.block_t) * triton.cdiv(outputs, chosen.block_n)
    heads = x.shape[1] if x.dim() == 3 else 1
    scales = {"x_scales_ptr": x_scales, "static_ptr": static, "out_scales_ptr": out_scales}
    present = {name: tensor for name, tensor in scales.items() if tensor is not None}
    launch(configuration, (tiles, heads), x_ptr=x, out_ptr=out, tokens=tokens, **present, **pointers(matrix))
    return out


def linear_configuration(
    types: tuple[str, str],
    weights: Weights,
    chosen: Tile,
    strides: tuple[int, int],
    out_strides: tuple[int, int],
    paired: bool = False,
    copied: int = 0,
) -> Configuration:
    """types: of x and of the result. strides: of a token and of a head, in values."""
    scaled = {**scale_types(["x_scales_ptr"], types[0]), **scale_types(["static_ptr", "out_scales_ptr"], types[1])}
    return Configuration(
        _linear,
        {"x_ptr": types[0], **weights.types(), "out_ptr": types[1], **scaled, "tokens": "i32"},
        {
            **weights.without(),
            **dict.fromkeys({"x_scales_ptr", "static_ptr", "out_scales_ptr"} - scaled.keys()),
            **weights.constants,
            **chosen.constants,
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
    )


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
            strides = (k, 0), (outputs // 2 if paired else outputs, 0)
            chosen = tile(weights, types[0], paired)
            label = f"{model} {name} {format}" + (" x fp8" if in_fp8 else "")
            yield label, linear_configuration(types, weights, chosen, *strides, paired)
            if in_fp8 and paired:
                types = types[0], "*fp8e4nv"
                yield f"{label}, static", linear_configuration(types, weights, chosen, *strides, paired)
    absorb, unabsorb = Weights.stored("bf16", 256, 64), Weights.stored("bf16", 128, 256)
    for name, weights, width, copied in (("absorb", absorb, 128, 64), ("unabsorb", unabsorb, 256, 0)):
        out = weights.rows + copied
        strides = (32 * width, width), (32 * out, out)
        chosen = tile(weights, "*bf16", paired=False)
        types = "*bf16", "*bf16"
        yield f"small4 {name} bf16", linear_configuration(types, weights, chosen, *strides, copied=copied)
