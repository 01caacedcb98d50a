"""Multi-head latent attention: decoding in absorbed form, prompts in expanded form.

Absorbed: all heads share the key [latent | rope key] and the value latent, so a program holds many heads of a few
query tokens, and reads a tile of tokens once: the latent's 256 columns are both key and value. The R + P = 320
columns of a key are two products of 256 and 64, since the sides of a tile are powers of two. Sequences that begin
with the same blocks share programs (prefix.py).

Expanded: the latents of the context become keys and values of every head in a workspace (flash.py), one stretch at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.derived import derived
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import split
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.combine import combine_rows
from cierzo.kernels.triton.expand import expand
from cierzo.kernels.triton.flash import Flash, Operands, gather, rounds
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel
from cierzo.kernels.triton.paged import anew, load_tile, page_rows, require_attention, tile_width, value_bits
from cierzo.kernels.triton.prefix import Prefixes, guests, lent, prefixes
from cierzo.kernels.triton.softmax import LOG2_E, masked, softmax_step
from cierzo.kernels.triton.split import Shape, add_partial, load_item, round_items, store_partial
from cierzo.kernels.triton.widen import DOWN, LIFT, UNFOLD, UP, folded, widened

# Bits of a cached value -> tokens of a tile (a split is a multiple of them, and a page by default on a GPU is one),
# and stages of the pipeline. With 8 bits two programs of 64 rows fit into the memory of a multiprocessor: the
# softmax of one hides behind the products of the other. With 16 bits one does, and has a stage more under way.
TILES = {8: (64, 2), 16: (64, 3), 32: (32, 2)}


@kernel
def _step(
    q_latent, q_rope, pages_ptr, table, position, end, sees, acc, largest, total, factor,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tile of tokens at `position` for the rows of a program; not MASKED: all of them see all of it, and
    neither `end` nor `sees` counts."""
    places = tl.arange(0, TOKENS)
    live = position + places < end if MASKED else tl.full((TOKENS,), True, tl.int1)
    latent_columns = tl.arange(0, BLOCK_R)
    rope_columns = tl.arange(0, BLOCK_P)
    if S % TOKENS == 0:  # the tile lies in one page
        page = tl.load(table + position // S).to(tl.int64) * S
        if S > TOKENS:
            page += position % S
        page_row = places
        pages_ptr += page * (R + P)
    else:
        page_row = page_rows(table, position + places, live, S)
    latents = load_tile(pages_ptr, page_row, live, latent_columns, R + P, R, BLOCK_R)
    ropes = load_tile(pages_ptr + R, page_row, live, rope_columns, R + P, P, BLOCK_P)
    latents = widened(latents, q_latent.dtype, FOLDED)
    ropes = widened(ropes, q_latent.dtype, FOLDED)
    scores = tl.dot(q_latent, latents.T, input_precision="ieee")
    scores = tl.dot(q_rope, ropes.T, scores, input_precision="ieee")
    if MASKED:
        scores = masked(scores, position + places, sees, 0)
    return softmax_step(scores, factor, latents, acc, largest, total, True, LIFT if FOLDED else 0)


@kernel
def _guests(
    mates_ptr, members_ptr, segment, segment_end, first_row, length, split_end,
    H: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Two words with a bit for each query token of a tile: set if it is another segment's, and if there is one."""
    BITS: tl.constexpr = 32 if ROWS < 32 * H else 64
    places = tl.arange(0, BITS)
    _, found = guests(mates_ptr, members_ptr, segment, segment_end, length, places, split_end, TOGETHER)
    own = first_row // H + places < length
    kind: tl.constexpr = tl.int32 if BITS == 32 else tl.int64
    return tl.sum(found.to(kind) << places, 0), tl.sum((own | found).to(kind) << places, 0)


@kernel
def _load_part(
    items_ptr, firsts_ptr, query_starts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
    nth, H: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr,
    SHORT_PARTS: tl.constexpr, LONG_PARTS: tl.constexpr,
):  # fmt: skip
    """load_item for the nth part of the program's split. Nothing that it reads is kept from earlier reads."""
    first, _ = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, anew(segment_start), segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, 0,
    )  # fmt: skip
    segment, first_row, _, length, context, begin, end, split_end = load_item(
        items_ptr, first + tl.program_id(0), query_starts_ptr, context_lengths_ptr, H, ROWS, SHORT, SHORTS, LONG
    )
    if SHORT_PARTS > 1 or LONG_PARTS > 1:
        size = tl.where(begin < SHORT * SHORTS, SHORT // SHORT_PARTS, LONG // LONG_PARTS)
        begin += nth * size
        end = tl.minimum(end, begin + size)
    return segment, first_row, length, context, begin, end, split_end


@kernel
def _part(
    q_latent, q_rope, pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr,
    items_ptr, firsts_ptr, mates_ptr, members_ptr, partials_ptr, maxima_ptr, sums_ptr,
    segment_start, segment_end, tile_start, tile_end, table_stride, factor, nth,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, TOGETHER: tl.constexpr, FOLDED: tl.constexpr,
    SHORT_PARTS: tl.constexpr, LONG_PARTS: tl.constexpr,
):  # fmt: skip
    """Attend to the nth part of the program's split, and add its partial result to that of the parts before."""
    segment, first_row, length, context, begin, end, _ = _load_part(
        items_ptr, firsts_ptr, query_starts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start,
        tile_end, nth, H, ROWS, SHORT, SHORTS, LONG, SHORT_PARTS, LONG_PARTS,
    )  # fmt: skip
    if begin < end:
        table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_R), tl.float32)
        # Before this position every row sees every token, and no load and no score needs a mask.
        all_see = begin + (tl.minimum(end, context - length + first_row // H + 1) - begin) // TOKENS * TOKENS
        for position in range(begin, all_see, TOKENS):
            acc, largest, total = _step(
                q_latent, q_rope, pages_ptr, table, position, end, end, acc, largest, total, factor,
                R, P, S, TOKENS, BLOCK_R, BLOCK_P, FOLDED, False,
            )  # fmt: skip
        segment, first_row, length, context, begin, end, _ = _load_part(
            items_ptr, firsts_ptr, query_starts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start,
            tile_end, nth, H, ROWS, SHORT, SHORTS, LONG, SHORT_PARTS, LONG_PARTS,
        )  # fmt: skip
        table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride
        rows = first_row + tl.arange(0, ROWS)
        sees = context - length + tl.where(rows < length * H, rows // H, 0) + 1
        all_see = begin + (tl.minimum(end, context - length + first_row // H + 1) - begin) // TOKENS * TOKENS
        for position in tl.range(tl.maximum(begin, all_see), end, TOKENS, num_stages=2, disable_licm=True):
            acc, largest, total = _step(
                q_latent, q_rope, pages_ptr, table, position, end, sees, acc, largest, total, factor,
                R, P, S, TOKENS, BLOCK_R, BLOCK_P, FOLDED, True,
            )  # fmt: skip
        if FOLDED:
            acc *= UP
            total *= DOWN
        segment, first_row, length, context, begin, end, split_end = _load_part(
            items_ptr, firsts_ptr, query_starts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start,
            tile_end, nth, H, ROWS, SHORT, SHORTS, LONG, SHORT_PARTS, LONG_PARTS,
        )  # fmt: skip
        inside = tl.arange(0, ROWS) < length * H - first_row
        if TOGETHER > 1:
            _, present = _guests(
                mates_ptr, members_ptr, segment, segment_end, first_row, length, split_end, H, ROWS, TOGETHER
            )
            inside = (present >> ((first_row + tl.arange(0, ROWS)) // H - first_row // H)) & 1 != 0
        place = anew(tl.program_id(0)).to(tl.int64)
        if SHORT_PARTS > 1 or LONG_PARTS > 1:
            add_partial(
                partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside, nth > 0, ROWS, R, BLOCK_R
            )
        else:
            store_partial(partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside, ROWS, R, BLOCK_R)


@chained
def _mla_attend(
    q_ptr, pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr, items_ptr, firsts_ptr,
    mates_ptr, members_ptr, partials_ptr, maxima_ptr, sums_ptr,
    segment_start, segment_end, tile_start, tile_end, table_stride, factor,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, TOGETHER: tl.constexpr, FOLDED: tl.constexpr,
    SHORT_PARTS: tl.constexpr, LONG_PARTS: tl.constexpr,
):  # fmt: skip
    after_others()
    first, last = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, 0,
    )  # fmt: skip
    if first + tl.program_id(0) >= last:
        return
    segment, first_row, start, length, _, begin, end, split_end = load_item(
        items_ptr, first + tl.program_id(0), query_starts_ptr, context_lengths_ptr, H, ROWS, SHORT, SHORTS, LONG
    )
    if begin >= end:  # no row of this tile sees so far
        return
    if TOGETHER > 1:  # noqa: SIM102 (decided when it is compiled)
        if lent(mates_ptr, segment, segment_start, split_end):
            return  # these rows are in the leader's tile

    rows = first_row + tl.arange(0, ROWS)
    token = tl.where(rows < length * H, rows // H, 0)  # a row that is not there repeats another, and is not stored
    query = start + token
    if TOGETHER > 1:
        joined, _ = _guests(
            mates_ptr, members_ptr, segment, segment_end, first_row, length, split_end, H, ROWS, TOGETHER
        )
        nth = rows // H - first_row // H  # query token of this tile
        joins = (joined >> nth) & 1 != 0
        guest = tl.load(members_ptr + segment * TOGETHER + nth, mask=joins, other=0)
        query = tl.where(joins, tl.load(query_starts_ptr + guest, mask=joins, other=0), query)
    every = tl.full((ROWS,), True, tl.int1)
    q_row = query.to(tl.int64) * Q_TOKEN + rows % H * Q_HEAD
    q_latent = load_tile(q_ptr, q_row, every, tl.arange(0, BLOCK_R), 1, R, BLOCK_R)
    q_rope = load_tile(q_ptr + R, q_row, every, tl.arange(0, BLOCK_P), 1, P, BLOCK_P)

    if SHORT_PARTS == 1 and LONG_PARTS == 1:
        _part(
            q_latent, q_rope, pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr,
            items_ptr, firsts_ptr, mates_ptr, members_ptr, partials_ptr, maxima_ptr, sums_ptr,
            segment_start, segment_end, tile_start, tile_end, table_stride, factor, 0,
            H, R, P, S, ROWS, TOKENS, BLOCK_R, BLOCK_P, SHORT, SHORTS, LONG, TOGETHER, FOLDED, 1, 1,
        )  # fmt: skip
    else:
        # What a turn needs it makes anew: kept from turn to turn, it would not fit into registers beside `acc`.
        for nth in tl.range(max(SHORT_PARTS, LONG_PARTS), disable_licm=True):
            _part(
                q_latent, q_rope, pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr,
                items_ptr, firsts_ptr, mates_ptr, members_ptr, partials_ptr, maxima_ptr, sums_ptr,
                segment_start, segment_end, tile_start, tile_end, table_stride, factor, nth,
                H, R, P, S, ROWS, TOKENS, BLOCK_R, BLOCK_P, SHORT, SHORTS, LONG, TOGETHER, FOLDED,
                SHORT_PARTS, LONG_PARTS,
            )  # fmt: skip


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, rank)
    decode_into(out, q, pages, queries, scale, rank, combine_rows, (POINTER[q.dtype], tokens, heads), {})
    return out


def decode_into(
    out: Tensor,
    q: Tensor,
    pages: Tensor,
    queries: PagedQueries,
    scale: float,
    rank: int,
    finish: Callable[..., tuple[Configuration, tuple[int, ...]]],
    sizes: tuple[Any, ...],
    own: Mapping[str, Any],
) -> None:
    """mla_decode into out; finish: gives what adds up the partial results of a shape, of so many sequences that may
    share a program, and `sizes`, with its grid; own: arguments of that."""
    require_attention("mla_decode", q, pages=pages)
    found = _decoding(queries, q.dtype, q.shape, q.stride(), pages.dtype, pages.shape[1], rank, finish, sizes)
    factor = scale * LOG2_E * found.unfold
    added = split.Finish(*found.finish, own)
    split.decode(
        found.configuration,
        out,
        found.plan,
        found.shape,
        factor,
        added,
        found.mates,
        q_ptr=q,
        pages_ptr=pages,
        mates_ptr=found.tables[0],
        members_ptr=found.tables[1],
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A step's decoding, whose choices are made. tables: of mates and members. finish: what adds up partial
    results, and its grid."""

    shape: Shape
    configuration: Configuration
    plan: split.Plan
    mates: Prefixes | None
    tables: tuple[Tensor, Tensor]
    unfold: float
    finish: tuple[Configuration, tuple[int, ...]]


@derived
def _decoding(
    queries: PagedQueries,
    dtype: torch.dtype,
    size: torch.Size,
    strides: tuple[int, ...],
    of_pages: torch.dtype,
    block_tokens: int,
    rank: int,
    finish: Callable[..., tuple[Configuration, tuple[int, ...]]],
    sizes: tuple[Any, ...],
) -> _Decoding:
    """The decoding of this step, made once for all layers. dtype, size, strides: of the queries."""
    (tokens, heads, width), pointers = size, (POINTER[dtype], POINTER[of_pages])
    shape = split.walked(queries, Shape(kv_heads=1, group=heads, width=rank, cut=split.WALKED))
    together = shape.rows // heads
    mates = prefixes(queries, block_tokens, together)
    configuration = decode_configuration(
        *pointers, shape, width - rank, block_tokens, (strides[0], strides[1]), together if mates else 1
    )
    # Without mates their tables are not read.
    tables = (mates.mates, mates.members) if mates else (queries.query_starts, queries.query_starts)
    shared, unfold = mates.together if mates else 1, UNFOLD if folded(*pointers) else 1.0
    made = split.plan(queries, shape, tokens)
    return _Decoding(shape, configuration, made, mates, tables, unfold, finish(shape, shared, *sizes))


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


@kept
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
    if folded(pointer, pages) and shape.group < 32:
        tokens = 32  # of a shard's heads 64 would spill 16 bytes with Triton 3.6
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
        **shape.cut.constants(),
        "TOGETHER": together,
        "FOLDED": folded(pointer, pages),
        "SHORT_PARTS": shape.cut.walked[0],
        "LONG_PARTS": shape.cut.walked[1],
    }
    return Configuration(_mla_attend, types, constants, num_warps=4, num_stages=stages)
