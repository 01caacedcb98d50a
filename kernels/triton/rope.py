"""Rotary position embedding: the tables of a step, and the rotation of heads in place.

The rotation has the reference's bits: fp32 products and sums, none contracted, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch

ELEMENTS = 1024  # rotated values of a program, about


@kernel
def _rope_tables(
    positions_ptr, inv_freq_ptr, cos_ptr, sin_ptr, magnitude, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Cosines and sines of angles up to 262,144 radians, for which a GPU's fp32 sine is worthless. Quarter turns
    are subtracted in fp64, and the rest goes into the Taylor series, up to a term below 1e-14. All steps are sums
    and products, hence the same bits on any machine."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < F
    position = tl.load(positions_ptr + row).to(tl.float32)
    angle = (position * tl.load(inv_freq_ptr + columns, mask=inside, other=0.0)).to(tl.float64)
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarter turns
    # pi / 2 in two parts: the first has 30 bits, so that its product with 20 bits of turns is exact
    rest = angle - turns * 1.570796325802803
    rest = rest - turns * 9.920935796805404e-10
    square = rest * rest
    sine = -7.647163731819816e-13 * square + 1.6059043836821613e-10
    sine = sine * square - 2.505210838544172e-08
    sine = sine * square + 2.7557319223985893e-06
    sine = sine * square - 0.0001984126984126984
    sine = sine * square + 0.008333333333333333
    sine = sine * square - 0.16666666666666666
    sine = rest + rest * square * sine
    cosine = 4.779477332387385e-14 * square - 1.1470745597729725e-11
    cosine = cosine * square + 2.08767569878681e-09
    cosine = cosine * square - 2.755731922398589e-07
    cosine = cosine * square + 2.48015873015873e-05
    cosine = cosine * square - 0.001388888888888889
    cosine = cosine * square + 0.041666666666666664
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    quarter = turns.to(tl.int64) & 3
    swapped = (quarter & 1) == 1
    cos = tl.where(swapped, sine, cosine)
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos).to(tl.float32)
    sin = tl.where(quarter >= 2, -sin, sin).to(tl.float32)
    tl.store(cos_ptr + row * F + columns, cos * magnitude, mask=inside)
    tl.store(sin_ptr + row * F + columns, sin * magnitude, mask=inside)


@kernel
def rotated(first, second, cos_ptr, sin_ptr, token, F: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Members of pairs, fp32 [..,BLOCK], rotated by the angles of `token` (int64), in `dtype`."""
    pairs = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + token * F + pairs, mask=pairs < F, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * F + pairs, mask=pairs < F, other=0.0)[None, :]
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@kernel
def rotated_pairs(
    pointer, live, cos_ptr, sin_ptr, token,
    F: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """First and second members [HEADS,BLOCK] of pairs, rotated by the angles of `token` (int64), in the pointer's
    dtype. pointer, live [HEADS,1]: each head's first rotated value, and whether there is such a head. Interleaved
    pairs are taken apart in registers, so that loads stay wide."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(pointer + columns, mask=live & (columns < 2 * F), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (HEADS, BLOCK, 2)))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        first = tl.load(pointer + columns, mask=live & (columns < F), other=0.0).to(tl.float32)
        second = tl.load(pointer + F + columns, mask=live & (columns < F), other=0.0).to(tl.float32)
    return rotated(first, second, cos_ptr, sin_ptr, token, F, BLOCK, pointer.dtype.element_ty)


@kernel
def store_pairs(
    pointer, live, first, second,
    F: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Store members of pairs, in the pointer's dtype, where rotated_pairs loads them."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), (HEADS, 2 * BLOCK))
        tl.store(pointer + columns, both, mask=live & (columns < 2 * F))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        tl.store(pointer + columns, first, mask=live & (columns < F))
        tl.store(pointer + F + columns, second, mask=live & (columns < F))


@kernel
def _apply_rope(
    x_ptr, cos_ptr, sin_ptr, scale_ptr,
    X_TOKEN: tl.constexpr, X_HEAD: tl.constexpr, H: tl.constexpr, W: tl.constexpr, F: tl.constexpr,
    INTERLEAVED: tl.constexpr, SCALED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dtype = x_ptr.dtype.element_ty
    row = x_ptr + token * X_TOKEN + heads[:, None] * X_HEAD
    live = (heads < H)[:, None]
    first, second = rotated_pairs(row + (W - 2 * F), live, cos_ptr, sin_ptr, token, F, HEADS, BLOCK_F, INTERLEAVED)
    if SCALED:
        scale = tl.load(scale_ptr + token)
        first, second = (first.to(tl.float32) * scale).to(dtype), (second.to(tl.float32) * scale).to(dtype)
        if W > 2 * F:
            rest = tl.arange(0, BLOCK_REST)[None, :]
            outside = live & (rest < W - 2 * F)
            kept = tl.load(row + rest, mask=outside, other=0.0).to(tl.float32)
            tl.store(row + rest, (kept * scale).to(dtype), mask=outside)
    store_pairs(row + (W - 2 * F), live, first, second, F, HEADS, BLOCK_F, INTERLEAVED)


def rope_tables(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See ops/rope.py."""
    rows, pairs = positions.shape[0], inv_freq.shape[0]
    cos, sin = (inv_freq.new_empty(rows, pairs) for _ in range(2))
    launch(
        tables_configuration(pairs),
        (rows,),
        positions_ptr=positions.contiguous(),
        inv_freq_ptr=inv_freq.contiguous(),
        cos_ptr=cos,
        sin_ptr=sin,
        magnitude=magnitude,
    )
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None) -> None:
    """See ops/rope.py."""
    tokens, heads, width = x.shape
    configuration = rope_configuration(
        POINTER[x.dtype], heads, width, cos.shape[1], (x.stride(0), x.stride(1)), interleaved, scale is not None
    )
    launch(
        configuration,
        (tokens, divide_up(heads, configuration.constants["HEADS"])),
        x_ptr=x,
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        scale_ptr=cos if scale is None else scale.contiguous(),
    )


@kept
def tables_configuration(pairs: int) -> Configuration:
    """pairs: F, the rotated pairs of a head."""
    types = {"positions_ptr": "*i64"} | dict.fromkeys(("inv_freq_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    constants = {"F": pairs, "BLOCK": triton.next_power_of_2(pairs)}
    return Configuration(_rope_tables, types | {"magnitude": "fp32"}, constants, num_warps=1)


@kept
def rope_configuration(
    pointer: str, heads: int, width: int, pairs: int, strides: tuple[int, int], interleaved: bool, scaled: bool
) -> Configuration:
    """pointer: to the heads, such as "*bf16". strides: of tokens and heads, in values."""
    block = triton.next_power_of_2(pairs)
    together = max(1, min(triton.next_power_of_2(heads), ELEMENTS // (2 * block)))
    constants = {
        "X_TOKEN": strides[0],
        "X_HEAD": strides[1],
        "H": heads,
        "W": width,
        "F": pairs,
        "INTERLEAVED": interleaved,
        "SCALED": scaled,
        "HEADS": together,
        "BLOCK_F": block,
        "BLOCK_REST": triton.next_power_of_2(max(1, width - 2 * pairs)),
    }
    types = {"x_ptr": pointer} | dict.fromkeys(("cos_ptr", "sin_ptr", "scale_ptr"), "*fp32")
    return Configuration(
        _apply_rope, types, constants, num_warps=max(1, together * block // 128)
    )  # 8 values a thread
