"""A tile of x @ weight^T, for weights in any format: the step that dense products and experts share.

    x [tokens, K]        rows anywhere, values of a row contiguous
    weights [ROWS, K]    of one expert; `paired`: ROWS = 2F, gate above up, and the tile is silu(gate) * up

One program computes BLOCK_T tokens times BLOCK_N outputs, and walks K, or a part of it, in steps of BLOCK_K, in
order: an output is one chain of MMA instructions, or the sum of a few chains (linear.py), and no other row enters
it. Weights are converted to the dtype of the activations in registers, without rounding if that is bf16
(formats/device.py); those of 4 bits have a loop of their own (four_bit.py). Scales of whole rows multiply the
finished sum, scales of blocks of k the sum of their steps.

e4m3 activations (formats/activations.py) and e4m3 weights are multiplied without conversion. Hopper's FP8 MMA
accumulates in fewer bits than fp32 has (about 14, by published measurements), so each step of BLOCK_K = 128 columns
is a chain of its own, whose sum is added to the fp32 total, for every size of a tile alike.

DESCRIBED: weights, and contiguous rows of x, are read through tensor descriptors, by Hopper's TMA: one thread
requests a tile, and addresses take no registers. The values and their MMA instructions are the same.

TOKENS_ON_M: which operand is on M. Hopper's MMA has 64 rows, M, and 8 to 256 columns, N: with weights on M a tile
may have fewer than 64 tokens, down to 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.device import GROUP, DeviceMatrix
from cierzo.kernels.formats.four_bit import WORD, stretched
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.triton.eight_bit import woven_weights
from cierzo.kernels.triton.four_bit import in_order, sums_in_order
from cierzo.kernels.triton.launch import ALIGNMENT, POINTER, kept, kernel

LARGEST_MATRIX = 1 << 31  # weights of one expert at most: their offsets are 32 bits wide


@kernel
def product(
    x_ptr, x_rows, x_inside, x_scales, codes_ptr, scales_ptr, row_scales_ptr, expert, n_start, k_start, k_end,
    PAIRED: tl.constexpr, DESCRIBED: tl.constexpr, X_DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """The tile, fp32 [BLOCK_T, BLOCK_N], over k_start .. k_end - 1 of k; k_start is a multiple of BLOCK_K.

    x_rows int64 [BLOCK_T]: where rows of x start, in values; those that are not x_inside start at some row of x,
    and their results are undefined. x_scales fp32 [BLOCK_T]: scales of e4m3 rows; else None. expert: int64.
    n_start: the tile's first output; outputs past the last one are undefined. DESCRIBED: codes_ptr is a descriptor
    [experts * ROWS, K]. X_DESCRIBED: x_ptr is a descriptor and x_rows its first row."""
    if in_order(FORMAT):
        result, up = sums_in_order(
            x_ptr, x_rows, codes_ptr, scales_ptr, row_scales_ptr, expert, n_start, k_start, k_end,
            PAIRED, FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    else:
        result, up = _sums(
            x_ptr, x_rows, x_inside, codes_ptr, scales_ptr, expert, n_start, k_start, k_end,
            PAIRED, DESCRIBED, X_DESCRIBED,
            FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
        )  # fmt: skip
    if x_scales is not None:
        result *= x_scales[:, None]
    if PAIRED:
        if x_scales is not None:
            up *= x_scales[:, None]
        decay = tl.exp(-tl.abs(result))  # at most 1, so nothing overflows
        result = result * tl.where(result >= 0, 1.0, decay) / (1.0 + decay) * up
    return result


@kernel
def _sums(
    x_ptr, x_rows, x_inside, codes_ptr, scales_ptr, expert, n_start, k_start, k_end,
    PAIRED: tl.constexpr, DESCRIBED: tl.constexpr, X_DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's outputs, fp32 [BLOCK_T, BLOCK_N], and where PAIRED those of the matrix below."""
    TOTAL: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    rows = tl.minimum(n_start + tl.arange(0, BLOCK_N), TOTAL - 1)
    row = expert.to(tl.int32) * ROWS + n_start  # of a descriptor
    if not DESCRIBED:
        codes_ptr += expert * EXPERT_STRIDE
    if FORMAT != "plain":
        scales_ptr += expert * (tl.cdiv(ROWS, SCALE_N) * tl.cdiv(K, SCALE_K))
    first = tl.zeros((BLOCK_T, BLOCK_N) if TOKENS_ON_M else (BLOCK_N, BLOCK_T), tl.float32)
    second = first
    for k in range(k_start, k_end, BLOCK_K):
        if X_DESCRIBED:
            x = x_ptr.load([x_rows, k])
        else:
            columns = k + tl.arange(0, BLOCK_K)
            mask = x_inside[:, None] if K % BLOCK_K == 0 else x_inside[:, None] & (columns < K)[None, :]
            x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=mask, other=0.0)
        first = _step(
            first, x, codes_ptr, scales_ptr, rows, row, k,
            DESCRIBED, FORMAT, K, ROW_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_K, TOKENS_ON_M,
        )  # fmt: skip
        if PAIRED:
            second = _step(
                second, x, codes_ptr, scales_ptr, rows + TOTAL, row + TOTAL, k,
                DESCRIBED, FORMAT, K, ROW_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_K, TOKENS_ON_M,
            )  # fmt: skip
    first = _finished(first, scales_ptr, rows, FORMAT, K, SCALE_N, SCALE_K, TOKENS_ON_M)
    second = (
        _finished(second, scales_ptr, rows + TOTAL, FORMAT, K, SCALE_N, SCALE_K, TOKENS_ON_M) if PAIRED else first
    )
    return first, second


@kernel
def _step(
    total, x, codes_ptr, scales_ptr, rows, row, k, DESCRIBED: tl.constexpr,
    FORMAT: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """Add the products of columns k .. k + BLOCK_K - 1 to `total`. row: the first of `rows`, for a descriptor."""
    if FORMAT == "fp8 woven":
        weights = woven_weights(codes_ptr, rows, row, k, DESCRIBED, K, ROW_STRIDE, BLOCK_N, BLOCK_K)
    elif DESCRIBED:
        weights = codes_ptr.load([row, k])
    else:
        columns = k + tl.arange(0, BLOCK_K)
        pointers = codes_ptr + rows[:, None] * ROW_STRIDE + columns[None, :]
        if K % BLOCK_K == 0:
            weights = tl.load(pointers)
        else:
            weights = tl.load(pointers, mask=(columns < K)[None, :], other=0.0)
    weights = weights.to(x.dtype)
    BY_BLOCKS: tl.constexpr = (FORMAT == "fp8" or FORMAT == "fp8 woven") and SCALE_K < K
    if BY_BLOCKS or x.dtype == tl.float8e4nv:
        if TOKENS_ON_M:
            part = tl.dot(x, tl.trans(weights), input_precision="ieee")
        else:
            part = tl.dot(weights, tl.trans(x), input_precision="ieee")
        if BY_BLOCKS:
            tl.static_assert(SCALE_K % BLOCK_K == 0)
            scales = tl.load(scales_ptr + rows // SCALE_N * tl.cdiv(K, SCALE_K) + k // SCALE_K)
            part *= scales[None, :] if TOKENS_ON_M else scales[:, None]
        total += part
    elif TOKENS_ON_M:
        total = tl.dot(x, tl.trans(weights), total, input_precision="ieee")
    else:
        total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
    return total


@kernel
def _finished(
    total, scales_ptr, rows,
    FORMAT: tl.constexpr, K: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
):  # fmt: skip
    """Sums as [BLOCK_T, BLOCK_N], times the scales of whole rows."""
    if not TOKENS_ON_M:
        total = tl.trans(total)
    if (FORMAT == "fp8" or FORMAT == "fp8 woven") and SCALE_K >= K:
        total *= tl.load(scales_ptr + rows // SCALE_N)[None, :]
    return total


@dataclass(frozen=True, slots=True)
class Weights:
    """Layout of a matrix in memory, for which a kernel is compiled.

    rows, k: of one expert. Strides of a row and of an expert: in elements of the codes (words, for 4-bit formats
    and woven fp8). scale_block: rows and columns that share a scale.
    """

    format: str  # "plain", or a DeviceMatrix's layout
    pointer: str  # of the codes, such as "*bf16"
    rows: int
    k: int
    row_stride: int
    expert_stride: int
    scale_block: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, operation: str, matrix: Matrix) -> Weights:
        """Layout of a matrix. Raises ArgumentError if it is packed for a CPU, or its rows are not contiguous."""
        if isinstance(matrix, DeviceMatrix):
            return cls.stored(matrix.layout, matrix.shape[-2], matrix.shape[-1], matrix.block)
        if not isinstance(matrix, Tensor):
            raise ArgumentError(f"{operation}: weights of format {matrix.format} are packed for a CPU")
        *_, rows, k = matrix.shape
        if matrix.dtype not in (torch.bfloat16, torch.float32) or (matrix.stride(-1) != 1 and k > 1):
            raise ArgumentError(
                f"{operation}: weights are bfloat16 or float32 with a row's values side by side, "
                f"got {matrix.dtype} with strides {list(matrix.stride())}"
            )
        if (rows - 1) * matrix.stride(-2) + k > LARGEST_MATRIX:
            raise ArgumentError(f"{operation}: one matrix of {list(matrix.shape)} is more than 2^31 values wide")
        expert_stride = matrix.stride(0) if matrix.dim() == 3 else 0
        return cls("plain", POINTER[matrix.dtype], rows, k, matrix.stride(-2), expert_stride)

    @classmethod
    @kept
    def stored(cls, format: str, rows: int, k: int, block: tuple[int, int] | None = None) -> Weights:
        """Layout of contiguous weights in a format: "bf16", "float32", or a DeviceMatrix's. block: rows and columns
        of an fp8 scale, by default one row."""
        if format in ("bf16", "float32"):
            return cls("plain", "*bf16" if format == "bf16" else "*fp32", rows, k, k, rows * k)
        if format == "fp8":
            return cls(format, "*fp8e4nv", rows, k, k, rows * k, block or (1, k))
        if format == "fp8 woven":
            return cls(format, "*i32", rows, k, k // fp8.WORD, rows * k // fp8.WORD, block or (1, k))
        words = stretched(k) // WORD
        return cls(format, "*i32", rows, k, words, rows * words, (1, GROUP[format]))

    @property
    def has_descriptor(self) -> bool:
        """Whether one tensor descriptor [experts * rows, k] can hold all experts: rows start at multiples of 16
        bytes, and each expert starts where the one before it ends. 4-bit formats have none: a tile of gate and up
        is one of them (four_bit.py)."""
        if self.format in GROUP:
            return False
        bits = {"*bf16": 16, "*fp32": 32, "*i32": 32}.get(self.pointer, 8)
        aligned = self.row_stride * bits % (8 * ALIGNMENT) == 0
        return aligned and self.expert_stride in (0, self.rows * self.row_stride)

    def types(self, prefix: str = "") -> dict[str, str]:
        """Types of the pointers that a kernel takes for the matrix."""
        types = {f"{prefix}codes_ptr": self.pointer}
        if self.format != "plain":
            kinds = {"fp8": "*fp32", "fp8 woven": "*fp32", "nvfp4": "*i16", "mxfp4": "*u8"}
            types[f"{prefix}scales_ptr"] = kinds[self.format]
        if self.format in GROUP:
            types[f"{prefix}row_scales_ptr"] = "*fp32"
        return types

    def without(self, prefix: str = "") -> dict[str, Any]:
        """None for each pointer that the format does not have, as constants of a kernel."""
        names = {f"{prefix}{name}_ptr" for name in ("codes", "scales", "row_scales")}
        return dict.fromkeys(sorted(names - self.types(prefix).keys()), None)

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a kernel."""
        block = {"SCALE_N": self.scale_block[0], "SCALE_K": self.scale_block[1]}
        strides = {"ROW_STRIDE": self.row_stride, "EXPERT_STRIDE": self.expert_stride}
        return {"FORMAT": self.format, "ROWS": self.rows, "K": self.k, **strides, **block}


def pointers(matrix: Matrix, described: bool, prefix: str = "") -> dict[str, Tensor]:
    """Arguments that Weights.types names. described: codes as two dimensions, the experts below each other."""
    codes = matrix if isinstance(matrix, Tensor) else matrix.codes  # type: ignore[union-attr]
    codes = codes.view(-1, codes.shape[-1]) if described else codes
    if isinstance(matrix, Tensor):
        return {f"{prefix}codes_ptr": codes}
    assert isinstance(matrix, DeviceMatrix), type(matrix)
    found = {f"{prefix}codes_ptr": codes, f"{prefix}scales_ptr": matrix.scales}
    if matrix.row_scales is not None:
        found[f"{prefix}row_scales_ptr"] = matrix.row_scales
    return found


def row_stride(operation: str, name: str, x: Tensor) -> int:
    """Stride between the rows of x [T,...], in values. Raises ArgumentError if a row is not contiguous."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ArgumentError(f"{operation}: {name} has strides {list(x.stride())}, a row's values are side by side")
    return x.stride(0) if x.shape[0] != 1 else x[0].numel()  # the stride of a single row may be anything
