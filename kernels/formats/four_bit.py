"""Order of 4-bit weights on a GPU: words of 8 codes, which shifts and masks widen to pairs of bf16 numbers.

A word holds the e2m1 codes of 8 columns, 0 to 7, as four pairs; a pair has its even column in the low half of the
word and its odd one in the high half. Where the four bits of a code lie in its half (s: sign, m: the other three):

    bit      15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    pair 0    s                           m   m   m
    pair 1                s                           m   m   m
    pair 2                        s                               m   m   m
    pair 3        s   m*      m   m                                           *: the last of the three

Bits 15 and 8 .. 6 of a bf16 number are its sign, the low two bits of its exponent and the first of its mantissa:
e2m1's own. So word, word << 3 and word << 6, masked, are pairs 0 to 2, and pair 3 takes three shifts. The numbers
are e2m1 * 2^-126; 0.5 is subnormal.

Words lie along k as the columns do. A row is filled up with zero codes to whole stretches of STRETCH columns, which
kernels multiply in an order of their own (kernels/triton/four_bit.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cierzo.kernels.formats import e2m1

STRETCH = 128
WORD = 8  # codes
SMALL = 2.0**-126  # of a code's bf16 number


def stretched(columns: int) -> int:
    """Columns with those that fill up the last stretch."""
    return -(-columns // STRETCH) * STRETCH


def to_words(octets: Tensor) -> Tensor:
    """Pairs of codes, uint8 [..., k/2], k a multiple of 8 -> int32 [..., stretched(k)/8]."""
    k = 2 * octets.shape[-1]
    natural = pad(octets, (0, (stretched(k) - k) // 2)).contiguous().view(torch.int32)
    words = torch.zeros_like(natural)
    for pair in range(4):
        for half in range(2):
            words |= _placed(natural >> (8 * pair + 4 * half) & 15, pair) << 16 * half
    return words


def to_octets(words: Tensor, k: int) -> Tensor:
    """The reverse of to_words -> uint8 [..., k/2]."""
    natural = torch.zeros_like(words)
    for pair in range(4):
        for half in range(2):
            natural |= _taken(words >> 16 * half & 0xFFFF, pair) << (8 * pair + 4 * half)
    return natural.view(torch.uint8)[..., : k // 2].contiguous()


def codes_as_numbers(words: Tensor, k: int) -> Tensor:
    """Numbers that the codes of words stand for, times SMALL: float32 [..., k]."""
    return e2m1.widen(to_octets(words, k)) * SMALL


def bf16_numbers(bits: Tensor) -> Tensor:
    """bf16 numbers of int32 bits, 0 .. 0x7FFF, as float32."""
    return (bits << 16).view(torch.float32)


def _placed(codes: Tensor, pair: int) -> Tensor:
    """Codes in the low half of a word."""
    if pair == 3:
        return (codes & 8) << 11 | (codes & 6) << 9 | (codes & 1) << 13
    return ((codes & 8) << 12 | (codes & 7) << 6) >> 3 * pair


def _taken(half: Tensor, pair: int) -> Tensor:
    """The codes of a pair."""
    if pair == 3:
        return half >> 11 & 8 | half >> 9 & 6 | half >> 13 & 1
    return half << 3 * pair >> 12 & 8 | half << 3 * pair >> 6 & 7
