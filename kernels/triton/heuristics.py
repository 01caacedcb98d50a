"""Choice of a tile for a product: pure functions of the weights' sizes, their format and the card.

A row's bits must not depend on the rows beside it, so the number of tokens decides only between forms that add the
same products in the same order.

Tiles of few tokens and of many (SIZED) do: weights are on M, k is walked in one order, and a step deeper than
another does what two of the other's do. Whether MMA instructions of 16 and of 128 columns add alike is the card's
part: widths.py has it compute a product in every width when an engine starts, and where a bit differs,
WIDTH_KEEPS_BITS becomes False for the process and one tile serves every number of tokens. Without a card it is
taken for true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats.device import GROUP
from cierzo.kernels.formats.four_bit import STRETCH
from cierzo.kernels.triton.launch import ALIGNMENT
from cierzo.kernels.triton.product import Weights

WIDTH_KEEPS_BITS = True  # see above; widths.py sets it
_forced: Tile | None = None  # instead of any other


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

    def blocks(self, codes: Sequence[str], rows: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Rows and columns that one load through a descriptor brings, by the pointers' names: those to codes, and
        those to activations. Empty without descriptors."""
        if not self.described:
            return {}
        return dict.fromkeys(codes, (self.block_n, self.block_k)) | dict.fromkeys(
            rows, (self.block_t, self.block_k)
        )


# (format, paired) -> tile, chosen by the code that the compiler generates for sm_90, not yet by timing. bf16
# weights are on M, as are those of 4 bits, whose order is made for it (four_bit.py). Codes of fp8 could be too,
# from registers, but then the compiler copies them in pieces of 8 or 4 bytes, laid out for the MMA; with tokens on
# M it copies 16 bytes at a time and needs fewer registers. fp32 is for tests and runs without tensor cores.
TILES = {
    ("bf16", False): Tile(block_n=128, block_t=64, block_k=64),
    ("bf16", True): Tile(block_n=64, block_t=64, block_k=64),
    ("fp8", False): Tile(block_n=128, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8", True): Tile(block_n=64, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8 x fp8", False): Tile(block_n=128, block_t=128, block_k=128, tokens_on_m=True, num_warps=8, num_stages=4),
    ("fp8 x fp8", True): Tile(block_n=64, block_t=128, block_k=128, tokens_on_m=True, num_warps=8, num_stages=4),
    ("nvfp4", False): Tile(block_n=128, block_t=32, block_k=128, num_stages=4),
    ("nvfp4", True): Tile(block_n=64, block_t=32, block_k=128, num_stages=4),
    ("mxfp4", False): Tile(block_n=128, block_t=32, block_k=128, num_stages=4),
    ("mxfp4", True): Tile(block_n=64, block_t=32, block_k=128, num_stages=4),
    ("fp32", False): Tile(block_n=32, block_t=32, block_k=32),
    ("fp32", True): Tile(block_n=32, block_t=32, block_k=32),
}


def _four_bits(block_n: int) -> tuple[Tile, ...]:
    """Tiles of 16, 32 and 64 tokens."""
    stages = {16: 4, 32: 4, 64: 3}
    return tuple(Tile(block_n, tokens, STRETCH, num_stages=number) for tokens, number in stages.items())


def _wide(block_n: int) -> Tile:
    """A tile of 128 tokens: eight warps share its sums."""
    return Tile(block_n, 128, STRETCH, num_warps=8, num_stages=3)


# The same by number of tokens: the first tile that holds them, else the last. With eight warps the scales of MXFP4
# would be 2 bytes a thread, and would not be copied ahead.
SIZED = {
    ("nvfp4", False): (*_four_bits(128), _wide(128)),
    ("nvfp4", True): (*_four_bits(64), _wide(64)),
    ("mxfp4", False): _four_bits(128),
    ("mxfp4", True): _four_bits(64),
}


def sizes(weights: Weights, activations: str, paired: bool) -> tuple[Tile, ...]:
    """Tiles of one row of SIZED: those for weights, and for activations of a type such as "*bf16"."""
    return SIZED.get((_kind(weights, activations), paired), ())


def _kind(weights: Weights, activations: str) -> str:
    """First part of a key of TILES and SIZED."""
    if activations == "*fp32":
        return "fp32"
    format = "bf16" if weights.format == "plain" else weights.format
    return f"{format} x fp8" if activations == "*fp8e4nv" else format


def tile(weights: Weights, activations: str, paired: bool, tokens: int = 0) -> Tile:
    """Tile for weights, and for activations of a type such as "*bf16". tokens: of one product, at most or nearly
    so. Raises ArgumentError for scales whose columns are not whole steps of a tile."""
    chosen, format = TILES[_kind(weights, activations), paired], weights.format
    block_k = weights.scale_block[1]
    if format == "fp8" and block_k < weights.k and block_k % chosen.block_k:
        raise ArgumentError(
            f"fp8 scales of {block_k} columns: kernels take multiples of {chosen.block_k}, or all of k"
        )
    if activations == "*fp32":
        return replace(chosen, block_k=STRETCH) if format in GROUP else chosen
    if _forced is not None:
        return _forced
    if WIDTH_KEEPS_BITS and (known := sizes(weights, activations, paired)):
        return next((one for one in known if tokens <= one.block_t), known[-1])
    return chosen


@contextmanager
def forced(chosen: Tile) -> Iterator[None]:
    """Within, products of 16-bit activations have this tile."""
    global _forced
    before, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = before


# --- experts -----------------------------------------------------------------------------------------------

SPREAD = 2.4  # programs of a multiprocessor, at least, that 4-bit weights are read by


def rows_of_most(pairs: int, experts: int) -> int:
    """Rows that most experts have no more than, where they are chosen at random."""
    return 3 * pairs // (2 * experts)


def spread(chosen: Tile, weights: Weights, outputs: int, matrices: int, multiprocessors: int) -> Tile:
    """The tile where a product reads so few matrices that its programs would leave multiprocessors idle in the last
    round, and have too few bytes under way in all: half as many outputs, steps twice as deep."""
    programs = matrices * -(-outputs // chosen.block_n)
    deep = 2 * chosen.block_k
    if weights.format not in GROUP or chosen.block_t > 16 or weights.k % deep:
        return chosen
    few = programs < SPREAD * multiprocessors
    return replace(chosen, block_n=chosen.block_n // 2, block_k=deep) if few else chosen


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
    apart = tokens <= APART_TOKENS
    if weights.format in GROUP and not (apart and wide.num_warps == 4):  # registers for two sums
        chosen = replace(wide, block_t=min(wide.block_t, 64), num_warps=8)
    return chosen, Parts(-(-weights.k // each), each, apart)


def thresholds() -> list[int]:
    """Numbers of tokens above which a choice of this file is another one."""
    widths = {one.block_t for sizes in SIZED.values() for one in sizes}
    return [*sorted(widths), APART_TOKENS, *([] if DESCRIBED_TOKENS is None else [DESCRIBED_TOKENS - 1])]
