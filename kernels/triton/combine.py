"""Sums of partial results of decoding (split.py): of a row, in order of position, whatever is in other rows."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel
from cierzo.kernels.triton.paged import tile_width
from cierzo.kernels.triton.prefix import lent
from cierzo.kernels.triton.softmax import sink_of
from cierzo.kernels.triton.split import (
    Finish,
    Shape,
    add_part,
    first_split,
    round_items,
    segment_splits,
    split_count,
    whole_splits,
)


@kernel
def _load_partial(
    partials_ptr, maxima_ptr, sums_ptr, split, splits, lent_splits, lent_base, base, step, columns, W: tl.constexpr
):  # fmt: skip
    """A row's partial result of a split; from `splits` on, one that adds nothing."""
    live = split < splits
    row = tl.where(split < lent_splits, lent_base, base) + split * step
    largest = tl.load(maxima_ptr + row, mask=live, other=float("-inf"))
    total = tl.load(sums_ptr + row, mask=live, other=0.0)
    values = tl.load(
        partials_ptr + row.to(tl.int64) * W + columns, mask=tl.where(live, columns < W, False), other=0.0
    )
    return largest, total, values


@kernel
def combined(
    partials_ptr, maxima_ptr, sums_ptr, sinks_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
    firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity, query, head, columns,
    HK: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, TOGETHER: tl.constexpr, SHORT_JOINS: tl.constexpr, LONG_JOINS: tl.constexpr,
):  # fmt: skip
    """Add up the partial results of a row, a head of a query token, in order of position -> fp32 values at
    `columns`, and whether they are this round's to store: those of other rounds are not."""
    found = tl.load(row_segments_ptr + query)
    there = found >= 0
    segment = tl.maximum(found, 0)
    acc = columns * 0.0
    start = tl.load(query_starts_ptr + segment, mask=there, other=0)
    length = tl.load(query_starts_ptr + segment + 1, mask=there, other=0) - start
    context = tl.load(context_lengths_ptr + segment, mask=there, other=0)
    row = (query - start) * G + head % G
    made, splits = segment_splits(context, length, SHORT, SHORTS, LONG, WINDOW)
    first = tl.load(firsts_ptr + segment) + row // ROWS * splits
    begin, end = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, WINDOW,
    )  # fmt: skip
    mine = there & (first >= begin) & (first < end)
    sees = context - length + query - start + 1
    unseen = first_split(sees, SHORT, SHORTS, LONG, WINDOW) - made  # the segment's splits before the row's window
    splits = split_count(sees, SHORT, SHORTS, LONG) - made
    fits = first - begin + splits <= capacity  # or the host's bound was too small
    splits = tl.where(mine & fits, splits, unseen)
    lanes = tl.arange(0, CHUNK)
    step = HK * ROWS
    base = (first - begin) * step + head // G * ROWS + row % ROWS
    lent_base, lent_splits = base, 0  # of this row in its leader's tile, and the number of splits there
    if TOGETHER > 1:  # noqa: SIM102 (decided when it is compiled)
        if mine & lent(mates_ptr, segment, segment_start, 0):
            leader = tl.load(mates_ptr + segment * 3)
            place = tl.load(mates_ptr + segment * 3 + 1)
            lent_base = (tl.load(firsts_ptr + leader) - begin) * step + place * G + head
            lent_splits = whole_splits(tl.load(mates_ptr + segment * 3 + 2), SHORT, SHORTS, LONG)
    largest = float("-inf")
    if SINKS:
        largest = sink_of(sinks_ptr, head)
        total = largest
    for split in range(unseen, splits, CHUNK):
        rows = tl.where(split + lanes < lent_splits, lent_base, base) + (split + lanes) * step
        maxima = tl.load(maxima_ptr + rows, mask=split + lanes < splits, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(maxima))
    total = tl.exp2(total - largest) if SINKS else 0.0
    if SHORT_JOINS == 1 and LONG_JOINS == 1:
        for split in range(unseen, splits, CHUNK):
            for nth in tl.static_range(CHUNK):  # their loads do not wait for one another
                more, mass, values = _load_partial(
                    partials_ptr, maxima_ptr, sums_ptr, split + nth, splits, lent_splits, lent_base, base, step,
                    columns, W,
                )  # fmt: skip
                weight = tl.exp2(more - largest)
                total = tl.fma(weight, mass, total)
                acc = tl.fma(values, weight, acc)
    else:  # first those of a span, as a program adds them up that walks it (split.add_partial)
        shorts: tl.constexpr = SHORTS // SHORT_JOINS
        many = tl.maximum(splits - SHORTS, 0)
        spans = tl.where(
            splits < SHORTS,
            (splits + SHORT_JOINS - 1) // SHORT_JOINS,
            shorts + (many + LONG_JOINS - 1) // LONG_JOINS,
        )
        for span in range(spans):
            split = tl.where(span < shorts, span * SHORT_JOINS, SHORTS + (span - shorts) * LONG_JOINS)
            last = tl.minimum(split + tl.where(span < shorts, SHORT_JOINS, LONG_JOINS), splits)
            peak, sums, part = _load_partial(
                partials_ptr, maxima_ptr, sums_ptr, split, last, lent_splits, lent_base, base, step, columns, W
            )
            for nth in tl.static_range(1, max(SHORT_JOINS, LONG_JOINS)):
                more, mass, values = _load_partial(
                    partials_ptr, maxima_ptr, sums_ptr, split + nth, last, lent_splits, lent_base, base, step,
                    columns, W,
                )  # fmt: skip
                peak, sums, fade, weight = add_part(peak, sums, more, mass)
                part = tl.fma(values, weight, part * fade)
            weight = tl.exp2(peak - largest)
            total = tl.fma(weight, sums, total)
            acc = tl.fma(part, weight, acc)
    value = tl.where(there, tl.where(fits, acc / total, float("nan")), 0.0)
    return value, mine | (found < 0)


@chained
def _combine(
    partials_ptr, maxima_ptr, sums_ptr, out_ptr, sinks_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
    firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity,
    HK: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, TOGETHER: tl.constexpr, SHORT_JOINS: tl.constexpr, LONG_JOINS: tl.constexpr,
):  # fmt: skip
    after_others()
    query = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_W)
    value, stored = combined(
        partials_ptr, maxima_ptr, sums_ptr, sinks_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
        firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity,
        query, head, columns, HK, G, ROWS, W, SHORT, SHORTS, LONG, WINDOW, CHUNK, SINKS, TOGETHER,
        SHORT_JOINS, LONG_JOINS,
    )  # fmt: skip
    out = out_ptr + (query.to(tl.int64) * (HK * G) + head) * W + columns
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=tl.where(columns < W, stored, False))


def into_rows(out: Tensor, shape: Shape, sinks: Tensor | None = None) -> Finish:
    """Sums as rows of out [T, Hk G, W]. sinks: fp32 [Hk G]."""
    configuration = combine_configuration(POINTER[out.dtype], shape, sinks is not None)
    return Finish(configuration, (out.shape[0], out.shape[1]), {} if sinks is None else {"sinks_ptr": sinks})


def combine_rows(
    shape: Shape, together: int, pointer: str, tokens: int, heads: int
) -> tuple[Configuration, tuple[int, int]]:
    """The kernel that leaves sums as rows of [T,Hk G,W], and its grid. pointer: to these, such as "*bf16"."""
    return combine_configuration(pointer, shape, together=together), (tokens, heads)


@kept
def combine_configuration(pointer: str, shape: Shape, sinks: bool = False, together: int = 1) -> Configuration:
    """pointer: to the result, such as "*bf16". together: sequences that may share a program; more than one only
    with a single key-value head."""
    types = (
        dict.fromkeys(("partials_ptr", "maxima_ptr", "sums_ptr", *(["sinks_ptr"] if sinks else [])), "*fp32")
        | {"out_ptr": pointer}
        | dict.fromkeys(("query_starts_ptr", "context_lengths_ptr", "firsts_ptr", "row_segments_ptr"), "*i32")
        | {"mates_ptr": "*i32"}
        | dict.fromkeys(("segment_start", "segment_end", "tile_start", "tile_end", "capacity"), "i32")
    )
    constants = {
        "HK": shape.kv_heads,
        "G": shape.group,
        "ROWS": shape.rows,
        "W": shape.width,
        "BLOCK_W": tile_width(shape.width),
        **shape.cut.constants(),
        "WINDOW": shape.window,
        "CHUNK": 16,
        "SINKS": sinks,
        **({} if sinks else {"sinks_ptr": None}),
        "TOGETHER": together,
        "SHORT_JOINS": shape.cut.joined[0],
        "LONG_JOINS": shape.cut.joined[1],
    }
    return Configuration(_combine, types, constants)
