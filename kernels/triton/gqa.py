"""Grouped-query attention over pages [B,S,Hk,d]: decoding by splits of the context, prompts by way of a workspace.

A program of decoding holds the query heads of one key-value head, for a few query tokens of one segment.
A sliding window leaves out the splits, tiles and stretches before it; what a tile holds besides is masked. A sink
is one more logit of the sum: of the parts of a context in decoding, of the running sum in prompts.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import split
from cierzo.kernels.triton.flash import Flash, Operands, flash_configuration, gather, gather_configuration, rounds
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.paged import (
    BLOCK_TOKENS,
    GPT_OSS_HEADS,
    GPT_OSS_WIDTH,
    GPT_OSS_WINDOW,
    LOG2_E,
    PAGES,
    SMALL3_HEADS,
    SMALL3_WIDTH,
    load_tile,
    page_rows,
    require_pages,
    tile_width,
)
from cierzo.kernels.triton.split import Partials, Shape, round_items, split_start

TOKENS = 64  # of a tile; a split is a multiple of it


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
    item = begin + slot
    if item >= end:
        return
    segment = tl.load(items_ptr + item * 4)
    first_row = tl.load(items_ptr + item * 4 + 1)
    split = tl.load(items_ptr + item * 4 + 2)
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    context = tl.load(context_lengths_ptr + segment)
    last_token = tl.minimum(first_row + ROWS - 1, length * G - 1) // G
    begin = split_start(split, SHORT, SHORTS, LONG)
    end = tl.minimum(split_start(split + 1, SHORT, SHORTS, LONG), context - length + last_token + 1)
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
        scores = tl.dot(q, keys.T, input_precision="ieee") * factor
        scores = tl.where(positions[None, :] < sees[:, None], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(positions[None, :] < sees[:, None] - WINDOW, float("-inf"), scores)
        peak = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), values, acc * fade[:, None], input_precision="ieee")
        largest = peak

    out = (slot.to(tl.int64) * HK + kv_head) * ROWS + tl.arange(0, ROWS)
    tl.store(maxima_ptr + out, largest, mask=inside)
    tl.store(sums_ptr + out, total, mask=inside)
    stored = inside[:, None]
    if D < BLOCK_D:
        stored = stored & (columns < D)[None, :]
    tl.store(partials_ptr + out[:, None] * D + columns[None, :], acc, mask=stored)


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
    _check("gqa_decode", q, k_pages, v_pages)
    out = q.new_empty(q.shape)
    num_rows, heads, width = q.shape
    shared = k_pages.shape[2]
    shape = Shape(kv_heads=shared, group=heads // shared, width=width, window=window or 0)
    plan = split.plan(queries, shape, num_rows)
    partials = Partials.empty(plan, shape)
    configuration = decode_configuration(
        POINTER[q.dtype], POINTER[k_pages.dtype], shape, k_pages.shape[1], (q.stride(0), q.stride(1))
    )
    for part in plan.rounds:
        launch(
            configuration,
            (part.capacity, shared),
            q_ptr=q,
            k_pages_ptr=k_pages,
            v_pages_ptr=v_pages,
            query_starts_ptr=queries.query_starts,
            context_lengths_ptr=queries.context_lengths,
            table_rows_ptr=queries.table_rows,
            tables_ptr=queries.block_tables,
            items_ptr=plan.items,
            firsts_ptr=plan.firsts,
            partials_ptr=partials.values,
            maxima_ptr=partials.maxima,
            sums_ptr=partials.sums,
            table_stride=queries.block_tables.stride(0),
            factor=scale * LOG2_E,
            **part.arguments(),
        )
        split.combine(out, partials, queries, plan, shape, part, sinks)
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
    _check("gqa_prefill", q, k_pages, v_pages)
    out = q.new_empty(q.shape)
    flash = Flash(q, out, queries, scale * LOG2_E, window or 0, sinks)
    for part in rounds(queries, window or 0):
        values, keys = gather(v_pages, q.shape[2], k_pages, queries, part, q.dtype)
        flash.attend(part, Operands(keys, keys, 0, 0, values))
    return out


def _check(operation: str, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    require_pages(operation, k_pages=k_pages, v_pages=v_pages)
    check.require(operation, q.stride(2) == 1, f"the values of a head must be contiguous, strides {q.stride()}")


def decode_configuration(
    pointer: str, pages: str, shape: Shape, block_tokens: int, strides: tuple[int, int]
) -> Configuration:
    """pointer, pages: of the queries and of the pages, such as "*bf16"; strides: of q's tokens and heads."""
    tables = ("query_starts_ptr", "context_lengths_ptr", "table_rows_ptr", "tables_ptr", "items_ptr", "firsts_ptr")
    types = (
        {"q_ptr": pointer, "k_pages_ptr": pages, "v_pages_ptr": pages}
        | dict.fromkeys(tables, "*i32")
        | dict.fromkeys(("partials_ptr", "maxima_ptr", "sums_ptr"), "*fp32")
        | dict.fromkeys(("segment_start", "segment_end", "tile_start", "tile_end", "table_stride"), "i32")
        | {"factor": "fp32"}
    )
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
        **split.SPLITS.constants(),
        "WINDOW": shape.window,
    }
    return Configuration(_gqa_attend, types, constants, num_warps=4, num_stages=2)


def configurations() -> Iterator[tuple[str, Configuration]]:
    """Of Small 3 and of gpt-oss, whose layers have a window in turn, and their shards."""
    for heads in SMALL3_HEADS:
        yield from _configurations_of(heads, SMALL3_WIDTH, 0, False)
    for heads in GPT_OSS_HEADS:
        for window in (0, GPT_OSS_WINDOW):
            yield from _configurations_of(heads, GPT_OSS_WIDTH, window, True)


def _configurations_of(
    heads: tuple[int, int], width: int, window: int, sinks: bool
) -> Iterator[tuple[str, Configuration]]:
    """heads: of queries, and of keys; queries lie in the rows of one product, before keys and values."""
    shared = heads[1]
    shape = Shape(shared, heads[0] // shared, width, window=window)
    strides = ((heads[0] + 2 * shared) * width, width)
    name = f"{heads[0]}/{shared} heads" + (f", window {window}" if window else "") + (", sinks" if sinks else "")
    for kind, pages in PAGES.items():
        yield f"gqa_decode {name}, {kind} pages", decode_configuration("*bf16", pages, shape, BLOCK_TOKENS, strides)
        if not window:
            gathered = gather_configuration("*bf16", pages, shared, width, width, True, BLOCK_TOKENS)
            yield f"gqa_prefill {shared} heads of {width}, gather, {kind} pages", gathered
    yield f"gqa_decode {name}, plan", split.plan_configuration(shape)
    yield f"gqa_decode {name}, combine", split.combine_configuration("*bf16", shape, sinks)
    for carried in (False, True):
        widths, stride = (width, 0, width), shared * width
        yield (
            f"gqa_prefill {name}, flash" + (", carried" if carried else ""),
            flash_configuration("*bf16", heads, widths, strides, (stride, 0), carried, window, sinks),
        )
