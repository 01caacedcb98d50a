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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, TypeVar

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.device import GROUP
from cierzo.kernels.formats.four_bit import STRETCH
from cierzo.kernels.triton.launch import ALIGNMENT, KEPT_RESULTS
from cierzo.kernels.triton.product import Weights

WIDTH_KEEPS_BITS = True  # see above; widths.py sets it
_forced: Tile | None = None  # instead of any other
_Chooser = TypeVar("_Chooser", bound=Callable[..., Any])


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
    together_n: int = 64  # outputs where a program adds up parts of k: registers hold a part's sum beside the total

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a kernel."""
        blocks = {"BLOCK_N": self.block_n, "BLOCK_T": self.block_t, "BLOCK_K": self.block_k}
        return {**blocks, "TOKENS_ON_M": self.tokens_on_m, "DESCRIBED": self.described}

    def blocks(self, format: str, codes: Sequence[str], rows: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Rows and columns that one load through a descriptor brings, in their elements, by the pointers' names:
        those to codes, and those to activations. Empty without descriptors."""
        if not self.described:
            return {}
        columns = self.block_k // (fp8.WORD if format == "fp8 woven" else 1)
        return dict.fromkeys(codes, (self.block_n, columns)) | dict.fromkeys(rows, (self.block_t, self.block_k))


# (format, paired) -> tile, chosen by the code that the compiler generates for sm_90, not yet by timing. Weights of
# bf16, woven fp8 and 4 bits are on M. Codes of natural order could be too, from registers, but then the compiler
# copies them in pieces of 8 or 4 bytes, laid out for the MMA; with tokens on M it copies 16 bytes at a time. fp32
# is for tests and runs without tensor cores.
TILES = {
    ("bf16", False): Tile(block_n=128, block_t=64, block_k=64),
    ("bf16", True): Tile(block_n=64, block_t=64, block_k=64),
    ("fp8", False): Tile(block_n=128, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8", True): Tile(block_n=64, block_t=64, block_k=64, tokens_on_m=True),
    ("fp8 woven", False): Tile(block_n=128, block_t=64, block_k=128, num_stages=3),
    ("fp8 woven", True): Tile(block_n=64, block_t=64, block_k=128, num_stages=3),
    ("fp8 woven by blocks", False): Tile(block_n=128, block_t=32, block_k=128),
    ("fp8 woven by blocks", True): Tile(block_n=64, block_t=32, block_k=128),
    ("fp8 x fp8", False): Tile(block_n=128, block_t=128, block_k=128, num_warps=8),
    ("fp8 x fp8", True): Tile(block_n=64, block_t=128, block_k=128, num_warps=8),
    ("nvfp4", False): Tile(block_n=128, block_t=32, block_k=128),
    ("nvfp4", True): Tile(block_n=64, block_t=32, block_k=128),
    ("mxfp4", False): Tile(block_n=128, block_t=32, block_k=128),
    ("mxfp4", True): Tile(block_n=64, block_t=32, block_k=128),
    ("fp32", False): Tile(block_n=32, block_t=32, block_k=32),
    ("fp32", True): Tile(block_n=32, block_t=32, block_k=32),
}


def _sizes(block_n: int, block_k: int) -> tuple[Tile, ...]:
    """Tiles of 16, 32 and 64 tokens, of four warps."""
    stages = {16: 4, 32: 4, 64: 3}
    return tuple(Tile(block_n, tokens, block_k, num_stages=number) for tokens, number in stages.items())


def _wide(block_n: int, block_k: int, num_stages: int = 4, together_n: int = 64) -> Tile:
    """A tile of 128 tokens, of eight warps."""
    return Tile(block_n, 128, block_k, num_warps=8, num_stages=num_stages, together_n=together_n)


# The same by number of tokens: the first tile that holds them, else the last. Tiles of a row add the same products
# in the same order: weights on M, k in one order; where each step is a chain of its own (fp8 x fp8, scales of
# blocks) steps are of one size. Of eight warps, four and four share the tokens where block_n is 64, and each four
# widen all weights.
SIZED = {
    ("bf16", False): (*_sizes(128, 64), _wide(128, 64, together_n=128)),
    ("bf16", True): (*_sizes(64, 64), _wide(128, 64)),
    ("fp8 woven", False): (*_sizes(128, 128), _wide(128, 64, together_n=128)),
    ("fp8 woven", True): (*_sizes(64, 128), _wide(128, 64, num_stages=3)),
    # A tile of 64 tokens would spill: the sum of a step stands beside the total.
    ("fp8 woven by blocks", False): (*_sizes(128, 128)[:2], _wide(128, 128, num_stages=3)),
    ("fp8 woven by blocks", True): (*_sizes(64, 128)[:2], _wide(64, 128, num_stages=3)),
    ("fp8 x fp8", False): (*_sizes(128, 128), _wide(128, 128)),
    ("fp8 x fp8", True): (*_sizes(64, 128), _wide(64, 128)),
    ("nvfp4", False): (*_sizes(128, STRETCH), _wide(128, STRETCH, num_stages=3)),
    ("nvfp4", True): (*_sizes(64, STRETCH), _wide(64, STRETCH, num_stages=3)),
    # With eight warps the scales would be 2 bytes a thread, and would not be copied ahead.
    ("mxfp4", False): _sizes(128, STRETCH),
    ("mxfp4", True): _sizes(64, STRETCH),
}


def sizes(weights: Weights, activations: str, paired: bool) -> tuple[Tile, ...]:
    """Tiles of one row of SIZED: those for weights, and for activations of a type such as "*bf16"."""
    return SIZED.get((family(weights, activations), paired), ())


def family(weights: Weights, activations: str) -> str:
    """First part of a key of TILES and SIZED."""
    if activations == "*fp32":
        return "fp32"
    format = "bf16" if weights.format == "plain" else weights.format
    if activations == "*fp8e4nv":
        return f"{format} x fp8"
    by_blocks = format == "fp8 woven" and weights.scale_block[1] < weights.k
    return f"{format} by blocks" if by_blocks else format


def tile(weights: Weights, activations: str, paired: bool, tokens: int = 0) -> Tile:
    """Tile for weights, and for activations of a type such as "*bf16". tokens: of one product, at most or nearly
    so. Raises ArgumentError for scales whose columns are not whole steps of a tile."""
    kind, format, block_k = family(weights, activations), weights.format, weights.scale_block[1]
    chosen = TILES[kind, paired]
    by_blocks = format in ("fp8", "fp8 woven") and block_k < weights.k
    if by_blocks and block_k % chosen.block_k:
        raise ArgumentError(
            f"fp8 scales of {block_k} columns: kernels take multiples of {chosen.block_k}, or all of k"
        )
    if activations == "*fp32":
        if format == "fp8 woven":
            raise ArgumentError("fp8 weights are woven for activations in bf16, got fp32")
        return replace(chosen, block_k=STRETCH) if format in GROUP else chosen
    if _forced is not None:
        return _forced
    if WIDTH_KEEPS_BITS and (known := sizes(weights, activations, paired)):
        return next((one for one in known if tokens <= one.block_t), known[-1])
    return chosen


@contextmanager
def forced(chosen: Tile) -> Iterator[None]:
    """Within, products of 16-bit activations have this tile, and k is not cut."""
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
NARROW_N = 64  # outputs of a tile where they are narrow: 1344 make 21 tiles, 4096 make 64
NARROW_TOKENS = 64  # up to so many tokens outputs that do not occupy the card are in tiles of NARROW_N
PART_COLUMNS = 128  # k is cut between steps of a tile, whichever its size
LEAST_COLUMNS = 512  # of a part: the pipeline loads some of them ahead
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
    So a product whose outputs occupy half of the card or less is cut along k. The number of parts decides the bits
    and follows from the weights' sizes and the card alone: so many that there is a program for 10 in 11
    multiprocessors, 120 of 132. With many tokens there are enough programs, and parts in memory would be more bytes
    than the weights: then the parts are not apart. Outputs that occupy more are in narrow tiles too for few tokens:
    how many outputs a tile has does not change their bits. A tile that is `forced` stays as it is.
    """
    if wide is _forced:
        return wide, Parts(1, weights.k)
    tiles, pieces = -(-weights.rows // NARROW_N), -(-weights.k // PART_COLUMNS)
    narrowed = replace(wide, block_n=min(wide.block_n, NARROW_N))
    count = min(-(-multiprocessors * 10 // (11 * tiles)), weights.k // LEAST_COLUMNS)
    if 2 * tiles > multiprocessors or count < 2:
        few = tokens <= NARROW_TOKENS and -(-weights.rows // wide.block_n) < multiprocessors
        return narrowed if few else wide, Parts(1, weights.k)
    each = -(-pieces // count) * PART_COLUMNS
    apart = tokens <= APART_TOKENS
    chosen = narrowed if apart else replace(wide, block_n=min(wide.block_n, wide.together_n))
    if weights.format in GROUP and not (apart and wide.num_warps == 4):  # registers for two sums
        chosen = replace(wide, block_t=min(wide.block_t, 64), num_warps=8)
    return chosen, Parts(-(-weights.k // each), each, apart)


def thresholds() -> list[int]:
    """Numbers of tokens above which a choice of this file is another one."""
    widths = {one.block_t for sizes in SIZED.values() for one in sizes}
    described = [] if DESCRIBED_TOKENS is None else [DESCRIBED_TOKENS - 1]
    return [NARROW_TOKENS, *sorted(widths), APART_TOKENS, *described]


# --- choices that are kept ---------------------------------------------------------------------------------

_before: tuple[Any, ...] = ()
_changes = 0


def decided(choose: _Chooser) -> _Chooser:
    """Keep what a function chooses for arguments, all hashable and given by position, while this file's settings
    are as they were. Numbers of tokens may be among them: steps of a decode have few, and find theirs again."""

    @lru_cache(maxsize=KEPT_RESULTS, typed=True)
    def found(_: int, *arguments: Any) -> Any:
        return choose(*arguments)

    @wraps(choose)
    def find(*arguments: Any) -> Any:
        return found(_settings(), *arguments)

    return find  # type: ignore[return-value]  # its arguments are those of `choose`


def _settings() -> int:
    """How often what choices depend on beside their arguments has changed."""
    global _before, _changes
    now = (WIDTH_KEEPS_BITS, DESCRIBED_TOKENS, _forced, TILES, SIZED, APART_TOKENS, LEAST_COLUMNS)
    if now != _before:
        _before, _changes = now, _changes + 1
    return _changes
