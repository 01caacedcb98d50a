"""e4m3 weights in registers as bf16, the MMA's operand on M: what formats/fp8.py wove, taken up again.

sm_90 converts one e4m3 value a thread, in two steps; four codes of a word become two registers of two bf16 numbers
by six integer operations and two multiplications:

    code           seeeemmm                  (-1)^s 2^(e - 7) (1 + m / 8), and 2^-6 m / 8 where e is 0
    with its sign  ssssssss seeeemmm         PRMT, of two codes at a time
    shifted        ssss seeeemmm 0000        by 4; the low four bits are the neighbour's
    masked         s0000eee emmm0000         the bf16 number 2^-120 times as large, subnormal where the code is
    multiplied     by 2^120                  exact: without .ftz, mul takes subnormal numbers as they are

The two codes that stand for NaN would become 480 and -480; `weave` refuses them.

Hopper's MMA wants of a thread, in each 16 columns of k, the pairs 2c, 2c + 1 and 2c + 8, 2c + 9 of its row, c being
one of four. A woven row holds what a thread wants of 64 columns side by side: a load of 16 bytes. So nothing goes
back to shared memory, and columns are multiplied in their natural order.
"""

from __future__ import annotations

import triton.language as tl

from cierzo.kernels.formats import fp8
from cierzo.kernels.triton.launch import kernel
from cierzo.kernels.triton.widen import even, odd

WORD = tl.constexpr(fp8.WORD)
WOVEN = tl.constexpr(fp8.WOVEN)
# $0, $1: pairs of the word $2. 0x7b80 is 2^120 in bf16.
WIDEN = tl.constexpr("""{
    .reg .b32 low, high, factor;
    mov.b32 factor, 0x7b807b80;
    prmt.b32 low, $2, 0, 0x9180;
    prmt.b32 high, $2, 0, 0xb3a2;
    shl.b32 low, low, 4;
    shl.b32 high, high, 4;
    and.b32 low, low, 0x87f087f0;
    and.b32 high, high, 0x87f087f0;
    mul.rn.bf16x2 $0, low, factor;
    mul.rn.bf16x2 $1, high, factor;
}""")


@kernel
def woven_weights(
    codes_ptr, rows, row, k, DESCRIBED: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights as bf16 [BLOCK_N, BLOCK_K], without their scales; `product` has the arguments."""
    if DESCRIBED:
        words = codes_ptr.load([row, k // WORD])
    else:
        columns = k // WORD + tl.arange(0, BLOCK_K // WORD)
        pointers = codes_ptr + rows[:, None] * ROW_STRIDE + columns[None, :]
        if K % BLOCK_K == 0:
            words = tl.load(pointers)
        else:
            words = tl.load(pointers, mask=(columns < K // WORD)[None, :], other=0)
    return woven_values(words.to(tl.uint32, bitcast=True), BLOCK_N, BLOCK_K)


@kernel
def woven_values(words, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Woven words, uint32 [BLOCK_N, BLOCK_K / 4] -> bf16 [BLOCK_N, BLOCK_K]."""
    low, high = tl.inline_asm_elementwise(
        WIDEN, "=r,=r,r", [words], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
    )
    values = tl.join(tl.join(even(low), even(high)), tl.join(odd(low), odd(high)))  # [.., word, half, pair]
    values = tl.reshape(values, (BLOCK_N, BLOCK_K // WOVEN, 4, 4, 2, 2))
    return tl.reshape(tl.trans(values, 0, 1, 3, 4, 2, 5), (BLOCK_N, BLOCK_K))
