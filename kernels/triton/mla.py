"""Multi-head latent attention: decoding in absorbed form, prompts in expanded form.

Absorbed: all heads share the key [latent | rope key] and the value latent, so a program holds many heads of a few
query tokens, and reads a tile of tokens once: the latent's 256 columns are both key and value. The R + P = 320
columns of a key are two products of 256 and 64, since the sides of a tile are powers of two. Sequences that begin
with the same blocks share programs (prefix.py).

Expanded: the latents of the context become keys and values of every head in a workspace (flash.py), one stretch at
a time.
"""

from __future__ import annotations

from typing import cast

import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import split
from cierzo.kernels.triton.expand import expand
from cierzo.kernels.triton.flash import Flash, Operands, gather, rounds
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel
from cierzo.kernels.triton.paged import load_tile, page_rows, require_attention, tile_width, value_bits
from cierzo.kernels.triton.prefix import guests, lent, prefixes
from cierzo.kernels.triton.softmax import LOG2_E, masked, softmax_step
from cierzo.kernels.triton.split import Shape, load_item, round_items, store_partial

# Bits of a cached value -> tokens of a tile (a split is a multiple of them), and stages of the pipeline. Two
# programs of 64 rows then fit into the memory of a multiprocessor: the softmax of one hides behind the products of
# the other.
TILES = {8: (64, 2), 16: (32, 3), 32: (32, 2)}


@kernel
def _mla_attend(
    q_ptr, pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr, items_ptr, firsts_ptr,
    mates_ptr, members_ptr, partials_ptr, maxima_ptr, sums_ptr,
    segment_start, segment_end, tile_start, tile_end, table_stride, factor,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    begin, end = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, 0,
    )  # fmt: skip
    if begin + slot >= end:
        return
    segment, first_row, start, length, context, begin, end, split_end = load_item(
        items_ptr, begin + slot, query_starts_ptr, context_lengths_ptr, H, ROWS, SHORT, SHORTS, LONG
    )
    if begin >= end:  # no row of this tile sees so far
        return
    if TOGETHER > 1:  # noqa: SIM102 (decided when it is compiled)
        if lent(mates_ptr, segment, segment_start, split_end):
            return  # these rows are in the leader's tile

    dtype = q_ptr.dtype.element_ty
    rows = first_row + tl.arange(0, ROWS)
    token = tl.where(rows < length * H, rows // H, 0)  # a row that is not there repeats another, and is not stored
    sees = context - length + token + 1
    query = start + token
    present = 0
    nth = tl.arange(0, ROWS) // H if ROWS % H == 0 else rows // H - first_row // H  # query token of this tile
    if TOGETHER > 1:
        BITS: tl.constexpr = 32 if ROWS < 32 * H else 64
        places = tl.arange(0, BITS)
        _, found = guests(mates_ptr, members_ptr, segment, segment_end, length, places, split_end, TOGETHER)
        joined = tl.sum(found.to(tl.int32 if BITS == 32 else tl.int64) << places, 0)
        joins = (joined >> nth) & 1 != 0
        guest = tl.load(members_ptr + segment * TOGETHER + nth, mask=joins, other=0)
        query = tl.where(joins, tl.load(query_starts_ptr + guest, mask=joins, other=0), query)
        # A bit for each query token of the tile, set if there is one. Which rows are stored is found from this word
        # after the loop, which has no registers to spare for their masks.
        own = first_row // H + places < length
        present = tl.sum((own | found).to(joined.dtype) << places, 0)
    every = tl.full((ROWS,), True, tl.int1)
    q_row = query.to(tl.int64) * Q_TOKEN + rows % H * Q_HEAD
    latent_columns = tl.arange(0, BLOCK_R)
    rope_columns = tl.arange(0, BLOCK_P)
    q_latent = load_tile(q_ptr, q_row, every, latent_columns, 1, R, BLOCK_R)
    q_rope = load_tile(q_ptr + R, q_row, every, rope_columns, 1, P, BLOCK_P)
    table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_R), tl.float32)
    for position in range(begin, end, TOKENS):
        positions = position + tl.arange(0, TOKENS)
        live = positions < end
        page_row = page_rows(table, positions, live, S)
        latents = load_tile(pages_ptr, page_row, live, latent_columns, R + P, R, BLOCK_R).to(dtype)
        ropes = load_tile(pages_ptr + R, page_row, live, rope_columns, R + P, P, BLOCK_P).to(dtype)
        scores = tl.dot(q_latent, latents.T, input_precision="ieee")
        scores = tl.dot(q_rope, ropes.T, scores, input_precision="ieee") * factor
        scores = masked(scores, positions, sees, 0)
        acc, largest, total = softmax_step(scores, latents, acc, largest, total, True)
    inside = rows < length * H
    if TOGETHER > 1:
        inside = (present >> nth) & 1 != 0
    place = slot.to(tl.int64)
    store_partial(partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside, ROWS, R, BLOCK_R)


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    require_attention("mla_decode", q, pages=pages)
    num_rows, heads, width = q.shape
    shape = Shape(kv_heads=1, group=heads, width=rank)
    together = shape.rows // heads
    mates = prefixes(queries, pages.shape[1], together)
    configuration = decode_configuration(
        POINTER[q.dtype],
        POINTER[pages.dtype],
        shape,
        width - rank,
        pages.shape[1],
        (q.stride(0), q.stride(1)),
        together if mates else 1,
    )
    out = q.new_empty(num_rows, heads, rank)
    # Without mates their tables are not read.
    tables = (mates.mates, mates.members) if mates else (queries.query_starts, queries.query_starts)
    arguments = {"q_ptr": q, "pages_ptr": pages, "mates_ptr": tables[0], "members_ptr": tables[1]}
    split.decode(configuration, out, queries, shape, scale, mates=mates, **arguments)
    return out


def mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Matrix, w_uv: Matrix, queries: PagedQueries, scale: float
) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn; w_uk, w_uv contiguous tensors.

    The workspace holds the keys and values of flash.WORKSPACE_TOKENS tokens at a time.
    """
    require_attention("mla_prefill", q, pages=pages)
    weights = []
    for name, weight in (("w_uk", w_uk), ("w_uv", w_uv)):
        check.require("mla_prefill", isinstance(weight, Tensor), f"{name} is packed; on a GPU it must be a tensor")
        weights.append(cast(Tensor, weight).contiguous())
    nope, rank = weights[0].shape[1:]
    out = q.new_empty(*q.shape[:2], weights[1].shape[1])
    flash = Flash(q, out, queries, scale * LOG2_E)
    for part in rounds(queries):
        latents = gather(pages[:, :, None], rank, None, queries, part, q.dtype)[0][:, 0]
        keys, values = (expand(latents, weight) for weight in weights)
        flash.attend(part, Operands(keys, latents, rank, q.shape[2] - nope, values))
    return out


def decode_configuration(
    pointer: str,
    pages: str,
    shape: Shape,
    rope: int,
    block_tokens: int,
    strides: tuple[int, int],
    together: int = 1,
) -> Configuration:
    """pointer, pages: to queries and to pages, such as "*bf16". strides: of q's tokens and heads, in values.
    together: sequences that may share a program."""
    types = {"q_ptr": pointer, "pages_ptr": pages, "mates_ptr": "*i32", "members_ptr": "*i32", **split.ATTEND_TYPES}
    tokens, stages = TILES[value_bits(pages)]
    constants = {
        "H": shape.group,
        "R": shape.width,
        "P": rope,
        "S": block_tokens,
        "Q_TOKEN": strides[0],
        "Q_HEAD": strides[1],
        "ROWS": shape.rows,
        "TOKENS": tokens,
        "BLOCK_R": tile_width(shape.width),
        "BLOCK_P": tile_width(rope),
        **split.SPLITS.constants(),
        "TOGETHER": together,
    }
    return Configuration(_mla_attend, types, constants, num_warps=4, num_stages=stages)
