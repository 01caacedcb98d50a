"""4-bit weights (formats/four_bit.py) in registers as bf16, from where the MMA takes them as its operand on M.

A word of 8 codes becomes four registers of two bf16 numbers, each times the scale of its group: 11 integer
operations and 4 multiplications, all of them exact. Nothing goes back to shared memory.

Hopper's MMA wants of a thread, in each 16 columns of k, the pairs 2c, 2c + 1 and 2c + 8, 2c + 9 of its row, c
being one of four. So 128 columns of k are multiplied in an order in which those of a thread are the 32 neighbours
that lie in four words, 16 bytes, of its row, under one scale or two:

    place in the order    |  s  s  s  s  |  c  c  |  j  |        7 bits
    column                |  c  c  |  s  s  s  s  |  j  |

The tile of x is read in that order, by pairs of columns: the same number of bytes, in pieces of 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cierzo.kernels.formats import four_bit, mxfp4, nvfp4
from cierzo.kernels.triton.launch import kernel
from cierzo.kernels.triton.widen import even, odd

STRETCH = tl.constexpr(four_bit.STRETCH)
WORD = tl.constexpr(four_bit.WORD)
THREAD = tl.constexpr(four_bit.STRETCH // 4)  # columns of a thread, which have one number of `scales`
WORDS = tl.constexpr(four_bit.STRETCH // 4 // four_bit.WORD)  # of a thread
TWICE = 0x10001  # a number in both halves of a word
NVFP4_STEP, NVFP4_BASE = tl.constexpr(nvfp4.SCALE_STEP * TWICE), tl.constexpr(nvfp4.SCALE_BASE * TWICE)
MXFP4_STEP = tl.constexpr(mxfp4.SCALE_STEP * TWICE)
# $0 .. $3: pairs of the word $4, times the pair of scales $5.
PAIRS = tl.constexpr("""{
    .reg .b32 a, b, c;
    and.b32 a, $4, 0x81c081c0;
    mul.rn.bf16x2 $0, a, $5;
    shl.b32 a, $4, 3;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $1, a, $5;
    shl.b32 a, $4, 6;
    and.b32 a, a, 0x81c081c0;
    mul.rn.bf16x2 $2, a, $5;
    shl.b32 a, $4, 1;
    shr.u32 b, $4, 3;
    shr.u32 c, $4, 7;
    and.b32 a, a, 0x80008000;
    lop3.b32 a, b, 0x01800180, a, 0xea;
    lop3.b32 a, c, 0x00400040, a, 0xea;
    mul.rn.bf16x2 $3, a, $5;
}""")


@triton.constexpr_function
def in_order(format):
    """Whether a tile of weights of this format, and the one of x, are in the order below."""
    return format in ("nvfp4", "mxfp4")


@kernel
def columns_in_order(BLOCK_K: tl.constexpr):
    """The columns of a tile in the order in which they are multiplied, int32 [BLOCK_K]; two neighbours stay so."""
    place = tl.arange(0, BLOCK_K).to(tl.int64)
    within = (place // 2 % 4) * THREAD + (place // 8 % 8) * 2 + (place // 64 % 2) * 16 + place % 2
    return tl.max_contiguous(tl.multiple_of(place // STRETCH * STRETCH + within, 2), 2)


@kernel
def sums_in_order(
    x_ptr, x_rows, codes_ptr, scales_ptr, row_scales_ptr, expert, n_start, k_start, k_end,
    PAIRED: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's outputs, fp32 [BLOCK_T, BLOCK_N], and where PAIRED those of the matrix below: a tile of
    weights has rows of both then. `product` has the arguments. Columns past K have zero codes, and zeros for x."""
    TOTAL: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    TALL: tl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
    places = tl.arange(0, TALL)
    rows = tl.minimum(n_start + places % BLOCK_N, TOTAL - 1) + places // BLOCK_N * TOTAL
    codes_ptr += expert * EXPERT_STRIDE
    scales_ptr += expert * (EXPERT_STRIDE // WORDS)
    row_scales_ptr += expert * ROWS
    columns = columns_in_order(BLOCK_K)
    x_at = x_rows[:, None] + columns[None, :]
    codes_at = rows[:, None] * ROW_STRIDE + tl.arange(0, BLOCK_K // WORD)[None, :]
    scales_at = rows[:, None] * (ROW_STRIDE // WORDS) + tl.arange(0, BLOCK_K // THREAD)[None, :]
    total = tl.zeros((TALL, BLOCK_T), tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptr + k + x_at)
        else:
            x = tl.load(x_ptr + k + x_at, mask=(k + columns < K)[None, :], other=0.0)
        codes = tl.load(codes_ptr + k // WORD + codes_at)
        scales = tl.load(scales_ptr + k // THREAD + scales_at)
        weights = weights_in_order(codes.to(tl.uint32, bitcast=True), scales, FORMAT, TALL, BLOCK_K)
        total = tl.dot(weights.to(x.dtype), tl.trans(x), total, input_precision="ieee")
    total *= tl.load(row_scales_ptr + rows)[:, None]
    if PAIRED:
        first, second = tl.split(tl.trans(tl.reshape(total, (2, BLOCK_N, BLOCK_T)), 2, 1, 0))
    else:
        first = tl.trans(total)
        second = first
    return first, second


@kernel
def weights_in_order(codes, scales, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words uint32 [N, K/8] and scales [N, K/32] -> bf16 [N, K], in order; N, K: BLOCK_N, BLOCK_K."""
    codes = tl.reshape(codes, (BLOCK_N, BLOCK_K // THREAD, 2, 2))
    pairs = scales_of_pairs(scales, FORMAT)[:, :, :, None]
    p0, p1, p2, p3 = tl.inline_asm_elementwise(
        PAIRS, "=r,=r,=r,=r,r,r", [codes, tl.broadcast_to(pairs, codes.shape)],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
    )  # fmt: skip
    evens = tl.join(tl.join(even(p0), even(p2)), tl.join(even(p1), even(p3)))
    odds = tl.join(tl.join(odd(p0), odd(p2)), tl.join(odd(p1), odd(p3)))
    found = tl.reshape(tl.join(evens, odds), (BLOCK_N, BLOCK_K // STRETCH, 4, 16, 2))
    return tl.reshape(tl.trans(found, 0, 1, 3, 2, 4), (BLOCK_N, BLOCK_K))


@kernel
def scales_of_pairs(scales, FORMAT: tl.constexpr):
    """Scales [N, G], of 32 columns each -> uint32 [N, G, 2]: of 16 columns, as a bf16 number in both halves."""
    if FORMAT == "nvfp4":
        both = scales.to(tl.uint16, bitcast=True).to(tl.uint32)
        return tl.join((both & 255) * NVFP4_STEP + NVFP4_BASE, (both >> 8) * NVFP4_STEP + NVFP4_BASE)
    one = scales.to(tl.uint32) * MXFP4_STEP
    return tl.join(one, one)
