"""MLA's decoding up to each head's value: the sum of a row's partial results and its product with W_UV together.

A program adds up the partial results (split.py) of some tokens of one head, rounds each sum to the dtype, as
mla_decode does, and multiplies the tile of TOKENS rows. A row is a column of that product, whatever is in the
others; how many tokens a program has, LIVE, follows from their number and changes no bits.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.combine import combine_configuration, combined
from cierzo.kernels.triton.launch import POINTER, Configuration, kept
from cierzo.kernels.triton.mla import decode_into
from cierzo.kernels.triton.paged import tile_width
from cierzo.kernels.triton.split import Shape

TOKENS = 16  # rows of the product: as few as the columns of an MMA can be
PROGRAMS = 512  # of a step, about: each reads a head's W_UV, so with more tokens a program has several


@chained
def _values(
    partials_ptr, maxima_ptr, sums_ptr, weight_ptr, out_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
    firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity, queries,
    HK: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, TOGETHER: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, TOKENS: tl.constexpr,
    LIVE: tl.constexpr, SHORT_JOINS: tl.constexpr, LONG_JOINS: tl.constexpr,
):  # fmt: skip
    after_others()
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_W)
    places = tl.arange(0, TOKENS)
    mixed = tl.zeros((TOKENS, BLOCK_W), tl.float32)
    stored = tl.zeros((TOKENS,), tl.int32)
    for nth in range(LIVE):
        query = tl.program_id(0) * LIVE + nth
        value, mine = combined(
            partials_ptr, maxima_ptr, sums_ptr, sums_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
            firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity,
            tl.minimum(query, queries - 1), head, columns,
            HK, G, ROWS, W, SHORT, SHORTS, LONG, WINDOW, CHUNK, SINKS, TOGETHER, SHORT_JOINS, LONG_JOINS,
        )  # fmt: skip
        mixed = tl.where((places == nth)[:, None], value[None, :], mixed)
        stored = tl.where((places == nth) & mine & (query < queries), 1, stored)
    outputs = tl.arange(0, BLOCK_V)
    inside = (outputs < V)[:, None] & (columns < W)[None, :]
    rows = (head * V + outputs)[:, None] * W
    weight = tl.load(weight_ptr + rows + columns[None, :], mask=inside, other=0.0)
    mixed = tl.where((columns < W)[None, :], mixed, 0.0).to(weight.dtype)
    total = tl.trans(tl.dot(weight, tl.trans(mixed), input_precision="ieee"))
    query = (tl.program_id(0) * LIVE + places).to(tl.int64)
    out = out_ptr + (query * (HK * G) + head)[:, None] * V + outputs[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(stored != 0)[:, None] & (outputs < V)[None, :])


def mla_values(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, w_uv: Matrix) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    if not isinstance(w_uv, Tensor):
        check.require("mla_values", False, "w_uv is packed; on a GPU it must be a tensor")
        raise AssertionError
    tokens, (heads, width, rank) = q.shape[0], w_uv.shape
    out = q.new_empty(tokens, heads, width)
    sizes = (POINTER[q.dtype], width, tokens, heads)
    own = {"weight_ptr": w_uv.contiguous(), "queries": tokens}
    decode_into(out, q, pages, queries, scale, rank, multiplied, sizes, own)
    return out


def multiplied(
    shape: Shape, together: int, pointer: str, width: int, tokens: int, heads: int
) -> tuple[Configuration, tuple[int, int]]:
    """The kernel that multiplies sums by W_UV, and its grid. pointer: to weights and values. width: V."""
    live = live_tokens(tokens, heads)
    return values_configuration(pointer, shape, width, live, together), (divide_up(tokens, live), heads)


def live_tokens(tokens: int, heads: int) -> int:
    """Tokens of a program."""
    wanted = max(1, divide_up(tokens * heads, PROGRAMS))
    return min(TOKENS, 1 << (wanted - 1).bit_length())


@kept
def values_configuration(pointer: str, shape: Shape, width: int, live: int, together: int = 1) -> Configuration:
    """pointer: to weights and values, such as "*bf16". width: V. live: tokens of a program."""
    combining = combine_configuration(pointer, shape, together=together)
    types = combining.types
    constants = {name: value for name, value in combining.constants.items() if name != "sinks_ptr"}
    constants |= {"V": width, "BLOCK_V": tile_width(width), "TOKENS": TOKENS}
    constants["LIVE"] = live
    return Configuration(_values, {**types, "weight_ptr": pointer, "queries": "i32"}, constants, num_warps=4)
