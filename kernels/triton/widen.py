"""e4m3 codes of the cache as bf16 numbers, by integer operations: sm_90 converts one e4m3 value a thread, slowly.

    code          s eeee mmm                value (-1)^s 2^(e-7) (1 + m/8), or 2^-6 m/8 where e = 0
    sign bytes    ssssssss seeeemmm         PRMT: of two codes, each beside eight copies of its sign
    moved         sssss eeee mmm 0000       a shift by 4; the low four bits are those of the neighbour
    masked        s 0000eeee mmm0000        bf16, subnormal where the code is: 2^-120 times the value, exactly

Nothing multiplies the tile by 2^120: the factor of the scores does, and weights are 2^60 times what they are until
the sums are stored, times 2^60 more (softmax.py, mla.py). So the tensor cores must take subnormal numbers for what
they are, in bf16 and in fp32; `make gpu-kernels` would show if one did not. A product of a query and a key loses
what is below 2^-29.

The codes 0x7f and 0xff stand for NaN, and would come out as 480. Where there is one, the first two of the 16 (or 4)
codes that a thread takes at a time become NaN: they are of the same token, so rows that see it become NaN.
"""

from __future__ import annotations

import triton.language as tl

from cierzo.kernels.triton.launch import kernel

LIFT = tl.constexpr(60)  # the exponent by which weights are lifted: half of 120
UNFOLD = 2.0**120  # what the factor of the scores is multiplied by
UP, DOWN = tl.constexpr(2.0**60), tl.constexpr(2.0**-60)


def _widening(words: int) -> str:
    """PTX that widens so many registers of four codes each."""
    lines = [".reg .b32 low, high, nan;", ".reg .pred broken;"]
    for number in range(words):
        codes, least = f"${2 * words + number}", f"least{number}"
        lines += [f"prmt.b32 low, {codes}, 0, 0x9180;", f"prmt.b32 high, {codes}, 0, 0xb3a2;"]
        lines += ["shl.b32 low, low, 4;", "shl.b32 high, high, 4;"]
        lines += [f"and.b32 ${2 * number}, low, 0x87f087f0;", f"and.b32 ${2 * number + 1}, high, 0x87f087f0;"]
        lines += [f".reg .b32 {least};", f"and.b32 {least}, {codes}, 0x7f7f7f7f;"]
        lines += [f"add.u32 {least}, {least}, 0x01010101;"]  # the highest bit of a byte: it was 0x7f
    lines += [f"or.b32 least0, least0, least{number};" for number in range(1, words)]
    lines += ["and.b32 least0, least0, 0x80808080;", "setp.ne.u32 broken, least0, 0;"]
    lines += ["mov.b32 nan, 0x7fff7fff;", "selp.b32 $0, nan, $0, broken;"]
    return "{" + " ".join(lines) + "}"


def _constraints(words: int) -> str:
    return ",".join(["=&r"] * (2 * words) + ["r"] * words)


_ONE, _FOUR = tl.constexpr(_widening(1)), tl.constexpr(_widening(4))
_ONE_OF, _FOUR_OF = tl.constexpr(_constraints(1)), tl.constexpr(_constraints(4))


@kernel
def widened(tile, dtype: tl.constexpr, FOLDED: tl.constexpr):
    """A tile [TOKENS,W] of the cache in the dtype of a product; FOLDED: e4m3 as bf16 of 2^-120 times its values."""
    if not FOLDED:
        found = tile.to(dtype)
    else:
        codes = tile.to(tl.uint8, bitcast=True)
        if tile.shape[1] < 64:  # so few that a thread may have less than 16
            found = tl.inline_asm_elementwise(_ONE, _ONE_OF, [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            found = tl.inline_asm_elementwise(_FOUR, _FOUR_OF, [codes], dtype=tl.bfloat16, is_pure=True, pack=16)
    return found


@kernel
def even(pair):
    """bf16 number in the low half of a register of two, which lies at the lower column."""
    return pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@kernel
def odd(pair):
    """bf16 number in the high half."""
    return (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


def folded(pointer: str, pages: str) -> bool:
    """Whether tiles of these pages are 2^-120 times their values beside queries of this type; both as "*bf16"."""
    return (pointer, pages) == ("*bf16", "*fp8e4nv")
