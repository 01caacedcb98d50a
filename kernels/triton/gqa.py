"""Grouped-query attention over pages [B,S,Hk,d]: decoding in splits of the context, prompts through a workspace.

A program of decoding holds the query heads of one key-value head, for a few query tokens of one segment. Splits,
tiles and stretches that end before a sliding window are left out, and the tokens of a tile that are outside the
window are masked. A sink is one more logit in the softmax: it enters the sum of the splits in decoding, and the
first tile of a prompt.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import split
from cierzo.kernels.triton.combine import into_rows
from cierzo.kernels.triton.flash import Flash, Operands, gather, rounds
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel
from cierzo.kernels.triton.paged import load_tile, page_rows, require_attention, tile_width
from cierzo.kernels.triton.softmax import LOG2_E, masked, softmax_step
from cierzo.kernels.triton.split import Shape, load_item, round_items, store_partial

TOKENS = 64  # tokens of a tile; a split is a multiple of them


@kernel
def _gqa_attend(
    q_ptr, k_pages_ptr, v_pages_ptr, query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr, items_ptr,
    firsts_ptr, partials_ptr, maxima_ptr, sums_ptr, segment_start, segment_end, tile_start, tile_end, table_stride,
    factor,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    begin, end = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, WINDOW,
    )  # fmt: skip
    if begin + slot >= end:
        return
    segment, first_row, start, length, context, begin, end, _ = load_item(
        items_ptr, begin + slot, query_starts_ptr, context_lengths_ptr, G, ROWS, SHORT, SHORTS, LONG
    )
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(context - length + first_row // G + 1 - WINDOW, 0)
        begin = tl.maximum(begin, first_seen // TOKENS * TOKENS)
    if begin >= end:  # no row of this tile sees so far
        return

    dtype = q_ptr.dtype.element_ty
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length * G
    token = tl.where(inside, rows // G, 0)
    sees = context - length + token + 1
    columns = tl.arange(0, BLOCK_D)
    q_row = (start + token).to(tl.int64) * Q_TOKEN + (kv_head * G + rows % G) * Q_HEAD
    q = load_tile(q_ptr, q_row, inside, columns, 1, D, BLOCK_D)
    table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for position in range(begin, end, TOKENS):
        positions = position + tl.arange(0, TOKENS)
        live = positions < end
        if WINDOW > 0:
            live = live & (positions >= first_seen)  # the pages before may be another sequence's
        page_row = page_rows(table, positions, live, S) * HK + kv_head
        keys = load_tile(k_pages_ptr, page_row, live, columns, D, D, BLOCK_D).to(dtype)
        values = load_tile(v_pages_ptr, page_row, live, columns, D, D, BLOCK_D).to(dtype)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        scores = masked(scores, positions, sees, WINDOW)
        acc, largest, total = softmax_step(scores, factor, values, acc, largest, total, True)
    place = slot.to(tl.int64) * HK + kv_head
    store_partial(partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside, ROWS, D, BLOCK_D)


def gqa_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    require_attention("gqa_decode", q, k_pages=k_pages, v_pages=v_pages)
    _, heads, width = q.shape
    shared = k_pages.shape[2]
    shape = Shape(kv_heads=shared, group=heads // shared, width=width, window=window or 0)
    configuration = decode_configuration(
        POINTER[q.dtype], POINTER[k_pages.dtype], shape, k_pages.shape[1], (q.stride(0), q.stride(1))
    )
    out = q.new_empty(q.shape)
    finish = into_rows(out, shape, sinks)
    made = split.plan(queries, shape, out.shape[0])
    factor = scale * LOG2_E
    split.decode(configuration, out, made, shape, factor, finish, q_ptr=q, k_pages_ptr=k_pages, v_pages_ptr=v_pages)
    return out


def gqa_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py. Pages of q's dtype or of float8_e4m3fn."""
    require_attention("gqa_prefill", q, k_pages=k_pages, v_pages=v_pages)
    out = q.new_empty(q.shape)
    flash = Flash(q, out, queries, scale * LOG2_E, window or 0, sinks)
    for part in rounds(queries, window or 0):
        values, keys = gather(v_pages, q.shape[2], k_pages, queries, part, q.dtype)
        flash.attend(part, Operands(keys, keys, 0, 0, values))
    return out


@kept
def decode_configuration(
    pointer: str, pages: str, shape: Shape, block_tokens: int, strides: tuple[int, int]
) -> Configuration:
    """pointer, pages: to queries and to pages, such as "*bf16". strides: of q's tokens and heads, in values."""
    types = {"q_ptr": pointer, "k_pages_ptr": pages, "v_pages_ptr": pages, **split.ATTEND_TYPES}
    constants = {
        "HK": shape.kv_heads,
        "G": shape.group,
        "D": shape.width,
        "S": block_tokens,
        "Q_TOKEN": strides[0],
        "Q_HEAD": strides[1],
        "ROWS": shape.rows,
        "TOKENS": TOKENS,
        "BLOCK_D": tile_width(shape.width),
        **shape.cut.constants(),
        "WINDOW": shape.window,
    }
    return Configuration(_gqa_attend, types, constants, num_warps=4, num_stages=2)
