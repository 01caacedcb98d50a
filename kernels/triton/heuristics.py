"""Problem -> tile. Pure functions: of the weights' sizes, their format and the card, so that a row's bits are its
own. The number of tokens decides only between forms that add the same products in the same order.

Two tiles for one matrix, a narrow one for few tokens and a wide one for many, would be faster at both ends. MMA
instructions of 16 columns and of 64, and with operands exchanged, very likely add the products of an output in the
same order, and K is walked in the same steps; but "very likely" is not a proof, and there is none without the card.
Until a test on it finds the bits equal, WIDTH_KEEPS_BITS stays False, and one tile serves every number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats.device import GROUP
from cierzo.kernels.triton.launch import ALIGNMENT
from cierzo.kernels.triton.product import Weights

WIDTH_KEEPS_BITS = False  # see above: set it where tests on a card have shown it
FEW_TOKENS = 16  # of one product, or of one expert on average


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and with what. See product.py."""

    block_n: int
    block_t: int
    block_k: int
    tokens_on_m: bool = False
    num_warps: int = 4
    num_stages: int = 4
    described: bool = False  # weights, and rows of x that lie side by side, are read through tensor descriptors

    @property
    def constants(self) -> dict[str, Any]:
        """Of a kernel."""
        blocks = {"BLOCK_N": self.block_n, "BLOCK_T": self.block_t, "BLOCK_K": self.block_k}
        return {**blocks, "TOKENS_ON_M": self.tokens_on_m, "DESCRIBED": self.described}

    def weight_block(self, format: str) -> tuple[int, int]:
        """Of codes, in their elements: what one load through a descriptor brings."""
        return self.block_n, self.block_k // 2 if format in GROUP else self.block_k


# (format, paired) -> tile, chosen by what the compiler makes of it for sm_90, not yet by timing. bf16 weights stand
# on M. Widened codes could too, from registers, but then the compiler copies the codes in pieces of 8 or 4 bytes,
# laid out for the MMA; with tokens on M it copies 16 bytes at a time and needs fewer registers. Of 4-bit formats a
# step is 128 of k: the scales of 64 are fewer than the 4 bytes a thread from which on they are copied ahead.
# fp32, which tests use, runs without tensor cores.
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
NARROW = 16  # tokens of the second form's tile


def tile(weights: Weights, activations: str, paired: bool, tokens: int = 0) -> Tile:
    """For weights, and activations of a type such as "*bf16". tokens: of one product; it counts only where the
    width of a tile has been shown to keep the bits. Raises ArgumentError for scales whose columns are not whole
    steps of a tile."""
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

# From how many tokens of a step on, tiles are read through descriptors; None: never. The bits are the same (the
# same tile, the same instructions in the same order; tests compare both, and so does bench.gpu on a card), so the
# number of tokens may decide. With few, the host's work for a descriptor counts. Until bench.gpu has timed both on
# a card ("described" in its results), the form that reads by pointers stays.
DESCRIBED_TOKENS: int | None = None


def reading(chosen: Tile, weights: Weights, tokens: int, row_bytes: int) -> Tile:
    """The tile, with the form that reads it. row_bytes: from one row of activations to the next."""
    if DESCRIBED_TOKENS is None or tokens < DESCRIBED_TOKENS:
        return chosen
    return replace(chosen, described=weights.has_descriptor and row_bytes % ALIGNMENT == 0)


# --- parts of k --------------------------------------------------------------------------------------------

MULTIPROCESSORS = 132  # of H100 SXM and H200
FEW_TILES = 8  # outputs are narrow if their tiles would be at most one multiprocessor in so many
NARROW_N = 64  # outputs of a tile then: 1344 are 21 such, and a part's sum fits beside the total in registers
PART_STEPS = 4  # of k, in a part at least: as many as are on their way at a time
APART_TOKENS = 128  # up to here a part has a program of its own


@dataclass(frozen=True, slots=True)
class Parts:
    """The sum over k is that of `count` chains of products, of k columns each (the last may have fewer), in order.

    apart: each is a program of its own, whose sum goes through memory, and not a step of one program. The chains,
    their instructions and the order of their sum are the same, and so are the bits: the number of tokens decides.
    """

    count: int
    k: int
    apart: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        """Of a kernel."""
        return {"PARTS": self.count, "PART_K": self.k, "APART": self.apart}


def narrow(weights: Weights, wide: Tile, tokens: int, multiprocessors: int = MULTIPROCESSORS) -> tuple[Tile, Parts]:
    """The tile and the parts of a product that `wide` would be the tile of. Outputs too narrow to occupy the card
    are cut: reading weights is what takes a decode step's time, and one multiprocessor has only so much on its way.
    Into as many parts as the weights' sizes, their format and the card say, for that makes the bits: the largest
    power of two whose programs are no more than the multiprocessors. With many tokens there are programs enough,
    and parts in memory would be more bytes than the weights."""
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
