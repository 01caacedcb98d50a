"""Multi-head latent attention: generated tokens in absorbed form, prompt tokens in expanded form.

Absorbed: all heads share the key [latent | rope key] and the value latent, so a program holds many heads of a few
query tokens, and a tile of tokens is read once: the latent's 256 columns are key and value both. The key's R + P =
320 columns are two products of 256 and 64, since a tile's sides are powers of two. Sequences that begin with the
same blocks share programs (prefix.py).

Expanded: the context's latents become every head's keys and values in a workspace (flash.py), a stretch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import split
from cierzo.kernels.triton.expand import expand, expand_configuration
from cierzo.kernels.triton.flash import Flash, Operands, flash_configuration, gather, gather_configuration, rounds
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.paged import (
    BLOCK_TOKENS,
    LOG2_E,
    NOPE,
    PAGES,
    RANK,
    ROPE,
    SMALL4_HEADS,
    VALUE,
    load_tile,
    page_rows,
    require_pages,
    tile_width,
    value_bits,
)
from cierzo.kernels.triton.prefix import guests, lent, prefixes, prefixes_configuration
from cierzo.kernels.triton.split import Partials, Shape, round_items, split_start

# Tokens of a tile (a split is a multiple of it) and tiles under way, by the bits of a cached value: what lets two
# programs of 64 rows share a multiprocessor's memory, so that one's softmax hides behind the other's products.
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
    item = begin + slot
    if item >= end:
        return
    segment = tl.load(items_ptr + item * 4)
    first_row = tl.load(items_ptr + item * 4 + 1)
    split = tl.load(items_ptr + item * 4 + 2)
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    context = tl.load(context_lengths_ptr + segment)
    last_token = tl.minimum(first_row + ROWS - 1, length * H - 1) // H
    begin = split_start(split, SHORT, SHORTS, LONG)
    end = tl.minimum(split_start(split + 1, SHORT, SHORTS, LONG), context - length + last_token + 1)
    if begin >= end:  # no row of this tile sees so far
        return
    split_end = split_start(split + 1, SHORT, SHORTS, LONG)
    if TOGETHER > 1:  # noqa: SIM102 (decided when it is compiled)
        if lent(mates_ptr, segment, segment_start, split_end):
            return  # its leader's program has these rows

    dtype = q_ptr.dtype.element_ty
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length * H
    token = tl.where(inside, rows // H, 0)
    sees = context - length + token + 1
    query = start + token
    if TOGETHER > 1:
        places = rows // H
        guest, joins = guests(mates_ptr, members_ptr, segment, segment_end, length, places, split_end, TOGETHER)
        query = tl.where(joins, tl.load(query_starts_ptr + guest, mask=joins, other=0), query)
        inside = inside | joins
    q_row = query.to(tl.int64) * Q_TOKEN + rows % H * Q_HEAD
    latent_columns = tl.arange(0, BLOCK_R)
    rope_columns = tl.arange(0, BLOCK_P)
    q_latent = load_tile(q_ptr, q_row, inside, latent_columns, 1, R, BLOCK_R)
    q_rope = load_tile(q_ptr + R, q_row, inside, rope_columns, 1, P, BLOCK_P)
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
        scores = tl.where(positions[None, :] < sees[:, None], scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), latents, acc * fade[:, None], input_precision="ieee")
        largest = peak

    out = slot.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(maxima_ptr + out, largest, mask=inside)
    tl.store(sums_ptr + out, total, mask=inside)
    stored = inside[:, None]
    if R < BLOCK_R:
        stored = stored & (latent_columns < R)[None, :]
    tl.store(partials_ptr + out[:, None] * R + latent_columns[None, :], acc, mask=stored)


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    require_pages("mla_decode", pages=pages)
    check.require("mla_decode", q.stride(2) == 1, f"the values of a head must be contiguous, strides {q.stride()}")
    num_rows, heads, width = q.shape
    out = q.new_empty(num_rows, heads, rank)
    shape = Shape(kv_heads=1, group=heads, width=rank)
    plan = split.plan(queries, shape, num_rows)
    partials = Partials.empty(plan, shape)
    together = shape.rows // heads
    mates = prefixes(queries, pages.shape[1], together)
    strides = (q.stride(0), q.stride(1))
    configuration = decode_configuration(
        POINTER[q.dtype],
        POINTER[pages.dtype],
        shape,
        width - rank,
        pages.shape[1],
        strides,
        together if mates else 1,
    )
    for part in plan.rounds:
        launch(
            configuration,
            (part.capacity,),
            q_ptr=q,
            pages_ptr=pages,
            query_starts_ptr=queries.query_starts,
            context_lengths_ptr=queries.context_lengths,
            table_rows_ptr=queries.table_rows,
            tables_ptr=queries.block_tables,
            items_ptr=plan.items,
            firsts_ptr=plan.firsts,
            mates_ptr=mates.mates if mates else plan.firsts,  # without them neither is read
            members_ptr=mates.members if mates else plan.firsts,
            partials_ptr=partials.values,
            maxima_ptr=partials.maxima,
            sums_ptr=partials.sums,
            table_stride=queries.block_tables.stride(0),
            factor=scale * LOG2_E,
            **part.arguments(),
        )
        split.combine(out, partials, queries, plan, shape, part, mates=mates)
    return out


def mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Matrix, w_uv: Matrix, queries: PagedQueries, scale: float
) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn; w_uk, w_uv contiguous tensors.

    The workspace holds the keys and values of flash.WORKSPACE_TOKENS tokens at a time.
    """
    require_pages("mla_prefill", pages=pages)
    check.require("mla_prefill", q.stride(2) == 1, f"the values of a head must be contiguous, strides {q.stride()}")
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
    """pointer, pages: of the queries and of the pages, such as "*bf16"; strides: of q's tokens and heads; together:
    sequences that may share a program."""
    tables = (
        *("query_starts_ptr", "context_lengths_ptr", "table_rows_ptr", "tables_ptr", "items_ptr", "firsts_ptr"),
        *("mates_ptr", "members_ptr"),
    )
    types = (
        {"q_ptr": pointer, "pages_ptr": pages}
        | dict.fromkeys(tables, "*i32")
        | dict.fromkeys(("partials_ptr", "maxima_ptr", "sums_ptr"), "*fp32")
        | dict.fromkeys(("segment_start", "segment_end", "tile_start", "tile_end", "table_stride"), "i32")
        | {"factor": "fp32"}
    )
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


def configurations() -> Iterator[tuple[str, Configuration]]:
    """Of Small 4 and its shards."""
    for heads in SMALL4_HEADS:
        shape = Shape(kv_heads=1, group=heads, width=RANK)
        strides, together = (heads * (RANK + ROPE), RANK + ROPE), shape.rows // heads
        for kind, pages in PAGES.items():
            for name, sequences in (("", 1), (", prefixes", together)):
                attend = decode_configuration("*bf16", pages, shape, ROPE, BLOCK_TOKENS, strides, sequences)
                yield f"mla_decode {heads} heads, {kind} pages{name}", attend
        yield f"mla_decode {heads} heads, find prefixes", prefixes_configuration(BLOCK_TOKENS, together)
        yield f"mla_decode {heads} heads, plan", split.plan_configuration(shape)
        for name, sequences in (("", 1), (", prefixes", together)):
            combine = split.combine_configuration("*bf16", shape, together=sequences)
            yield f"mla_decode {heads} heads, combine{name}", combine
        for name, width in (("keys", NOPE), ("values", VALUE)):
            yield (
                f"mla_prefill {heads} heads, expand {name}",
                expand_configuration("*bf16", RANK, heads * width, RANK + ROPE),
            )
        for carried in (False, True):
            widths, strides = (NOPE, ROPE, VALUE), (heads * (NOPE + ROPE), NOPE + ROPE)
            yield (
                f"mla_prefill {heads} heads, flash" + (", carried" if carried else ""),
                flash_configuration("*bf16", (heads, heads), widths, strides, (RANK + ROPE, RANK), carried),
            )
    for kind, pages in PAGES.items():
        gathered = gather_configuration("*bf16", pages, 1, RANK + ROPE, RANK, False, BLOCK_TOKENS)
        yield f"mla_prefill gather, {kind} pages", gathered
