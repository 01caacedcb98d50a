"""Choice of a tile for a product: pure functions of the weights' sizes, their format and the card.

A row's bits must not depend on the rows beside it, so the number of tokens decides only between forms that add the
same products in the same order.

A narrow tile for few tokens and a wide one for many would be faster at both ends. MMA instructions of 16 and of 64
columns, and with exchanged operands, very likely add the products of an output in the same order, and K is walked
in the same steps; but only a test on a card can prove it. Until one finds the bits equal, WIDTH_KEEPS_BITS stays
False, and one tile serves every number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats.device import GROUP
from cierzo.kernels.triton.launch import ALIGNMENT
from cierzo.kernels.triton.product import Weights

WIDTH_KEEPS_BITS = False  # see above: to be set once a test on a card has shown it
FEW_TOKENS = 16  # at most so many tokens of a product, or of an expert on average, take a narrow tile


@dataclass(frozen=True, slots=True)
class Tile:
    """Size and form of what one program computes; see product.py."""

    block_n: int
    block_t: int
    block_k: int
    tokens_on_m: bool = False
    num_warps: int = 4
    num_stages: int = 4
    described: bool = False  # weights, and contiguous rows of x, are read through tensor descriptors

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a kernel."""
        blocks = {"BLOCK_N": self.block_n, "BLOCK_T": self.block_t, "BLOCK_K": self.block_k}
        return {**blocks, "TOKENS_ON_M": self.tokens_on_m, "DESCRIBED": self.described}

    def weight_block(self, format: str) -> tuple[int, int]:
        """Rows and columns of codes, in their elements, that one load through a descriptor brings."""
        return self.block_n, self.block_k // 2 if format in GROUP else self.block_k


# (format, paired) -> tile, chosen by the code that the compiler generates for sm_90, not yet by timing. bf16
# weights are on M. Widened codes could be too, from registers, but then the compiler copies the codes in pieces of
# 8 or 4 bytes, laid out for the MMA; with tokens on M it copies 16 bytes at a time and needs fewer registers. A
# step of a 4-bit format is 128 columns of k: the scales of 64 would be less than 4 bytes a thread, and would not be
# copied ahead. fp32 is for tests and runs without tensor cores.
TILES = {
    ("bf16", False): Tile(block_n=128, block_t=64, block_k=64),
    ("bf16", True): Tile(block_n=64, block_t=64, block_k=64),
    ("fp8", False): Tile(block_n=128, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8", True): Tile(block_n=64, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8 x fp8", False): Tile(block_n=128, block_t=128, block_k=128, tokens_on_m=True, num_warps=8, num_stages=4),
    ("fp8 x fp8", True): Tile(block_n=64, block_t=128, block_k=128, tokens_on_m=True, num_warps=8, num_stages=4),
    ("nvfp4", False): Tile(block_n=128, block_t=64, block_k=128, tokens_on_m=True, num_stages=3),
    ("nvfp4", True): Tile(block_n=64, block_t=64, block_k=128, tokens_on_m=True, num_stages=3),
    ("mxfp4", False): Tile(block_n=128, block_t=64, block_k=128, tokens_on_m=True, num_stages=3),
    ("mxfp4", True): Tile(block_n=64, block_t=64, block_k=128, tokens_on_m=True, num_stages=3),
    ("fp32", False): Tile(block_n=32, block_t=32, block_k=32),
    ("fp32", True): Tile(block_n=32, block_t=32, block_k=32),
}
NARROW = 16  # tokens of a narrow tile


def tile(weights: Weights, activations: str, paired: bool, tokens: int = 0) -> Tile:
    """Tile for weights, and for activations of a type such as "*bf16". tokens: of one product; ignored until the
    width of a tile is known to keep the bits. Raises ArgumentError for scales whose columns are not whole steps of
    a tile."""
    kind = format = "bf16" if weights.format == "plain" else weights.format
    if activations == "*fp8e4nv":
        kind = f"{format} x fp8"
    chosen = TILES["fp32" if activations == "*fp32" else kind, paired]
    block_k = weights.scale_block[1]
    if format == "fp8" and block_k < weights.k and block_k % chosen.block_k:
        raise ArgumentError(
            f"fp8 scales of {block_k} columns: kernels take multiples of {chosen.block_k}, or all of k"
        )
    if activations == "*fp32":
        return chosen
    if WIDTH_KEEPS_BITS and tokens <= FEW_TOKENS:
        return replace(chosen, block_t=NARROW, tokens_on_m=False)
    return chosen


# --- tensor descriptors ------------------------------------------------------------------------------------

# Steps of at least so many tokens read tiles through descriptors; None: no step does. The bits are the same (same
# tile, same instructions in the same order; tests compare both forms, and so does bench.gpu on a card), so the
# number of tokens may decide: with few, the host's work for a descriptor counts. Until bench.gpu has timed both
# forms on a card ("described" in its results), tiles are read by pointers.
DESCRIBED_TOKENS: int | None = None


def reading(chosen: Tile, weights: Weights, tokens: int, row_bytes: int) -> Tile:
    """The tile, read through descriptors or not. row_bytes: from one row of activations to the next."""
    if DESCRIBED_TOKENS is None or tokens < DESCRIBED_TOKENS:
        return chosen
    return replace(chosen, described=weights.has_descriptor and row_bytes % ALIGNMENT == 0)


# --- parts of k --------------------------------------------------------------------------------------------

MULTIPROCESSORS = 132  # of H100 SXM and H200
FEW_TILES = 8  # outputs are narrow if their tiles would occupy at most 1 in 8 multiprocessors
NARROW_N = 64  # outputs of a tile then: 1344 make 21 tiles, and registers hold a part's sum beside the total
PART_STEPS = 4  # steps of k in a part, at least: as many as the pipeline loads ahead
APART_TOKENS = 128  # up to so many tokens each part has a program of its own


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of a sum over k: `count` chains of k columns each (the last may have fewer), added in order.

    apart: each part has a program of its own, whose sum goes through memory; else one program computes all of them.
    The chains, their instructions and the order of their sum are the same, and so are the bits, so the number of
    tokens may decide.
    """

    count: int
    k: int
    apart: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a kernel."""
        return {"PARTS": self.count, "PART_K": self.k, "APART": self.apart}


def narrow(weights: Weights, wide: Tile, tokens: int, multiprocessors: int = MULTIPROCESSORS) -> tuple[Tile, Parts]:
    """Tile and parts of a product, given the tile `wide` for it.

    A decode step's time is that of reading weights, and one multiprocessor has a limited number of loads under way.
    So a product whose outputs are too narrow to occupy the card is cut along k. The number of parts decides the
    bits and follows from the weights' sizes, their format and the card alone: the largest power of two with no more
    programs than multiprocessors. With many tokens there are enough programs, and parts in memory would be more
    bytes than the weights: then the parts are not apart.
    """
    if -(-weights.rows // wide.block_n) * FEW_TILES > multiprocessors:
        return wide, Parts(1, weights.k)
    chosen = replace(wide, block_n=min(wide.block_n, NARROW_N))
    tiles, steps = -(-weights.rows // chosen.block_n), -(-weights.k // chosen.block_k)
    count = 1
    while tiles * 2 * count <= multiprocessors and steps >= PART_STEPS * 2 * count:
        count *= 2
    if count == 1:
        return wide, Parts(1, weights.k)
    each = -(-steps // count) * chosen.block_k
    return chosen, Parts(-(-weights.k // each), each, tokens <= APART_TOKENS)


def thresholds() -> list[int]:
    """Numbers of tokens above which a choice of this file is another one."""
    return [FEW_TOKENS, APART_TOKENS, *([] if DESCRIBED_TOKENS is None else [DESCRIBED_TOKENS - 1])]
