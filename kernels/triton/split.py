"""Decoding in splits of the context: one program for each split, and a sum of their partial results in order.

A context is cut at fixed positions, whatever sequences are beside it. An item is one split for one tile of rows:
ROWS of a segment's (query token, head) pairs that share a key-value head. Its program leaves a partial result, the
online softmax (softmax.py) of each row over the split, in fp32. The partial results of a row are then added in
order of position. Which rows share a tile changes no row's bits: each is a row of the same products.

    position   0    512   1024  ..  8192       9216       10240   ..
               |  0  |  1  |  ..     |   16     |   17     |     short splits first: many programs for a context of
                                                                  a thousand tokens; then long ones: fewer partials

    items      | segment 0: tile 0: splits 0 1 2, tile 1: splits 0 1 2 | segment 1: ... |      int32 [I, 4]
                ^ firsts[0]                                             ^ firsts[1]      ^ firsts[N]

With a window, the splits of a segment begin with the one in which the window of its first row begins, and those of
a row with the one in which its own window begins: the context before has none.

The items are made on the device (`_plan`, once a step) from query_starts and context_lengths alone, so a captured
graph makes them anew at each replay. The host decides how many programs run, from its own lists, which in a graph
are upper bounds, or from `total_context`. Programs past the last item exit; rows for whose items a wrong bound left
no room come out as NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.derived import derived
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.paged import tile_width
from cierzo.kernels.triton.prefix import Prefixes, lent
from cierzo.kernels.triton.softmax import LOG2_E, sink_of

# Rows of a tile, as many as the product of a warp group takes. With few heads some rows are empty, which costs less
# than reading the pages; the draft tokens of a sequence share the tile of its first token.
ROWS = 64
ITEM = 4  # int32 values of an item: segment, first row, split, padding
PARTIAL_BYTES = 256 << 20  # largest size of the partial results of a round; more items run in several rounds


@dataclass(frozen=True, slots=True)
class Splits:
    """`shorts` splits of `short` tokens, then splits of `long` tokens."""

    short: int
    shorts: int
    long: int

    def count(self, context: int, seen: int = 0) -> int:
        """Number of splits of a context; with `seen`, at most so many hold the last `seen` tokens of any context up
        to this one."""
        rest = context - self.short * self.shorts
        whole = -(-context // self.short) if rest <= 0 else self.shorts + -(-rest // self.long)
        return min(whole, -(-(seen - 1) // min(self.short, self.long)) + 1) if seen else whole

    def constants(self) -> dict[str, int]:
        """The kernels' constants of the same names."""
        return {"SHORT": self.short, "SHORTS": self.shorts, "LONG": self.long}


SPLITS = Splits(512, 16, 1024)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoding: key-value heads, query heads for each (the group), columns of a result, rows of a tile.
    window: tokens that a row sees, its own included; 0 is all of them."""

    kv_heads: int
    group: int
    width: int
    rows: int = ROWS
    window: int = 0

    def splits(self, length: int, context: int) -> int:
        """Largest number of splits of a segment with at most `length` query tokens and `context` tokens."""
        return SPLITS.count(context, self.window + length - 1 if self.window else 0)

    @property
    def item_bytes(self) -> int:
        """Bytes of the partial results of one item."""
        return 4 * self.kv_heads * self.rows * (self.width + 2)


@dataclass(frozen=True, slots=True)
class Round:
    """Items whose partial results are kept at the same time: those of some segments, or of some tiles of one.

    tile_end is -1 for whole segments. capacity: items that there is room for. The lengths on the device say which
    items these are; the host's lengths, which may be bounds, only how many at most.
    """

    segment_start: int
    segment_end: int
    tile_start: int
    tile_end: int
    capacity: int

    def arguments(self) -> dict[str, int]:
        """The kernels' arguments that select the round."""
        return {
            "segment_start": self.segment_start,
            "segment_end": self.segment_end,
            "tile_start": self.tile_start,
            "tile_end": self.tile_end,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Items of a step and the rounds that run them. items int32 [I,4]; firsts int32 [N+1], each segment's first
    item; row_segments int32 [T], each row's segment, -1 past the last one."""

    items: Tensor
    firsts: Tensor
    row_segments: Tensor
    rounds: list[Round]


@kernel
def split_start(split, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr):
    """First position of a split."""
    return tl.where(split < SHORTS, split * SHORT, SHORT * SHORTS + (split - SHORTS) * LONG)


@kernel
def split_count(context, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr):
    """Number of splits that hold the first `context` positions."""
    rest = context - SHORT * SHORTS
    return tl.where(rest <= 0, (context + SHORT - 1) // SHORT, SHORTS + (rest + LONG - 1) // LONG)


@kernel
def whole_splits(tokens, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr):
    """Number of splits that end within the first `tokens` positions."""
    rest = tokens - SHORT * SHORTS
    return tl.where(rest <= 0, tokens // SHORT, SHORTS + tl.maximum(rest, 0) // LONG)


@kernel
def first_split(sees, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr):
    """The split in which the window of a row begins; the row sees positions up to sees - 1."""
    if WINDOW == 0:
        return sees * 0
    position = tl.maximum(sees - WINDOW, 0)
    rest = position - SHORT * SHORTS
    return tl.where(rest < 0, position // SHORT, SHORTS + tl.maximum(rest, 0) // LONG)


@kernel
def segment_splits(
    context, length, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr
):
    """First split of a segment, and the number of its splits."""
    first = first_split(context - length + 1, SHORT, SHORTS, LONG, WINDOW)
    return first, split_count(context, SHORT, SHORTS, LONG) - first


@kernel
def round_items(
    query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """First item of a round, and the one past its last."""
    begin = tl.load(firsts_ptr + segment_start)
    end = tl.load(firsts_ptr + segment_end)
    if tile_end >= 0:
        start = tl.load(query_starts_ptr + segment_start)
        length = tl.load(query_starts_ptr + segment_start + 1) - start
        context = tl.load(context_lengths_ptr + segment_start)
        _, splits = segment_splits(context, length, SHORT, SHORTS, LONG, WINDOW)
        end = tl.minimum(end, begin + tile_end * splits)
        begin += tile_start * splits
    return begin, end


@kernel
def load_item(
    items_ptr, item, query_starts_ptr, context_lengths_ptr,
    G: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Read an item: segment, first row, first query token, number of query tokens, context length, the positions
    begin .. end - 1 of its split that its rows see, and the end of the whole split."""
    segment = tl.load(items_ptr + item * 4)
    first_row = tl.load(items_ptr + item * 4 + 1)
    split = tl.load(items_ptr + item * 4 + 2)
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    context = tl.load(context_lengths_ptr + segment)
    last_token = tl.minimum(first_row + ROWS - 1, length * G - 1) // G
    split_end = split_start(split + 1, SHORT, SHORTS, LONG)
    end = tl.minimum(split_end, context - length + last_token + 1)
    return segment, first_row, start, length, context, split_start(split, SHORT, SHORTS, LONG), end, split_end


@kernel
def store_partial(
    partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside,
    ROWS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Store a tile's online softmax, acc [ROWS,BLOCK_W], largest and total [ROWS], as tile `place` (int64) of
    Partials; rows that are not `inside` are left out."""
    rows = place * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_W)
    tl.store(maxima_ptr + rows, largest, mask=inside)
    tl.store(sums_ptr + rows, total, mask=inside)
    stored = inside[:, None]
    if W < BLOCK_W:
        stored = stored & (columns < W)[None, :]
    tl.store(partials_ptr + rows[:, None] * W + columns[None, :], acc, mask=stored)


@kernel
def _plan(
    query_starts_ptr, context_lengths_ptr, items_ptr, firsts_ptr, row_segments_ptr, segments, limit,
    G: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first = 0
    for base in range(0, segment, BLOCK):
        others = base + lanes
        live = others < segment
        start = tl.load(query_starts_ptr + others, mask=live, other=0)
        length = tl.load(query_starts_ptr + others + 1, mask=live, other=0) - start
        context = tl.load(context_lengths_ptr + others, mask=live, other=0)
        _, splits = segment_splits(context, length, SHORT, SHORTS, LONG, WINDOW)
        first += tl.sum((length * G + ROWS - 1) // ROWS * splits)
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    context = tl.load(context_lengths_ptr + segment)
    begin, splits = segment_splits(context, length, SHORT, SHORTS, LONG, WINDOW)
    count = (length * G + ROWS - 1) // ROWS * splits
    tl.store(firsts_ptr + segment, first)
    if segment == segments - 1:
        tl.store(firsts_ptr + segments, first + count)
    for base in range(0, count, BLOCK):
        index = base + lanes
        fits = (index < count) & (first + index < limit)
        item = items_ptr + (first + index) * 4
        tl.store(item, segment + 0 * index, mask=fits)
        tl.store(item + 1, index // splits * ROWS, mask=fits)
        tl.store(item + 2, begin + index % splits, mask=fits)
    for base in range(0, length, BLOCK):
        tl.store(row_segments_ptr + start + base + lanes, segment + 0 * lanes, mask=base + lanes < length)


@kernel
def _combine(
    partials_ptr, maxima_ptr, sums_ptr, out_ptr, sinks_ptr, mates_ptr, query_starts_ptr, context_lengths_ptr,
    firsts_ptr, row_segments_ptr, segment_start, segment_end, tile_start, tile_end, capacity,
    HK: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    SHORT: tl.constexpr, SHORTS: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SINKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    head = tl.program_id(1)
    segment = tl.load(row_segments_ptr + query)
    columns = tl.arange(0, BLOCK_W)
    wide = columns < W
    out = out_ptr + (query.to(tl.int64) * (HK * G) + head) * W + columns
    zero = tl.zeros((BLOCK_W,), tl.float32)
    if segment < 0:
        tl.store(out, zero.to(out_ptr.dtype.element_ty), mask=wide)
        return
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    context = tl.load(context_lengths_ptr + segment)
    row = (query - start) * G + head % G
    made, splits = segment_splits(context, length, SHORT, SHORTS, LONG, WINDOW)
    first = tl.load(firsts_ptr + segment) + row // ROWS * splits
    begin, end = round_items(
        query_starts_ptr, firsts_ptr, context_lengths_ptr, segment_start, segment_end, tile_start, tile_end,
        SHORT, SHORTS, LONG, WINDOW,
    )  # fmt: skip
    if (first < begin) | (first >= end):
        return  # the row belongs to another round
    sees = context - length + query - start + 1
    unseen = first_split(sees, SHORT, SHORTS, LONG, WINDOW) - made  # the segment's splits before the row's window
    splits = split_count(sees, SHORT, SHORTS, LONG) - made
    if first - begin + splits > capacity:  # the host's bound was too small
        tl.store(out, (zero + float("nan")).to(out_ptr.dtype.element_ty), mask=wide)
        return
    lanes = tl.arange(0, CHUNK)
    step = HK * ROWS
    base = (first - begin) * step + head // G * ROWS + row % ROWS
    lent_base, lent_splits = base, 0  # of this row in its leader's tile, and the number of splits there
    if TOGETHER > 1:  # noqa: SIM102 (decided when it is compiled)
        if lent(mates_ptr, segment, segment_start, 0):
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
    acc = zero
    for split in range(unseen, splits, CHUNK):
        live = split + lanes < splits
        rows = tl.where(split + lanes < lent_splits, lent_base, base) + (split + lanes) * step
        weights = tl.exp2(tl.load(maxima_ptr + rows, mask=live, other=float("-inf")) - largest)
        total += tl.sum(weights * tl.load(sums_ptr + rows, mask=live, other=0.0))
        inside = live[:, None] & wide[None, :]
        parts = tl.load(partials_ptr + rows[:, None].to(tl.int64) * W + columns[None, :], mask=inside, other=0.0)
        acc += tl.sum(weights[:, None] * parts, axis=0)
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=wide)


@derived
def plan(queries: PagedQueries, shape: Shape, num_rows: int) -> Plan:
    """The plan of this step, made once for all layers. num_rows: T."""
    segments, device = len(queries.query_lengths), queries.block_tables.device
    rounds = _rounds(queries, shape)
    bound = sum(part.capacity for part in rounds)
    if queries.total_context:
        tiles = max(-(-length * shape.group // shape.rows) for length in queries.query_lengths)
        together = tiles * (segments * (SPLITS.shorts + 1) + queries.total_context // SPLITS.long)
        if together < bound:
            bound, rounds = together, [Round(0, segments, 0, -1, together)]
    items = torch.empty(bound, ITEM, dtype=torch.int32, device=device)
    firsts = torch.zeros(segments + 1, dtype=torch.int32, device=device)
    row_segments = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    launch(
        plan_configuration(shape),
        (segments,),
        query_starts_ptr=queries.query_starts,
        context_lengths_ptr=queries.context_lengths,
        items_ptr=items,
        firsts_ptr=firsts,
        row_segments_ptr=row_segments,
        segments=segments,
        limit=bound,
    )
    return Plan(items, firsts, row_segments, rounds)


def _rounds(queries: PagedQueries, shape: Shape) -> list[Round]:
    """Rounds of a step, at least one. A segment too large for a round gets rounds of its own, by tiles of rows."""
    most = max(1, PARTIAL_BYTES // shape.item_bytes)
    rounds, start, held = [], 0, 0
    for segment, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        tiles, splits = -(-length * shape.group // shape.rows), shape.splits(length, context)
        if held and held + tiles * splits > most:
            rounds.append(Round(start, segment, 0, -1, held))
            start, held = segment, 0
        if tiles * splits > most:  # nothing is held now: segments from `start` to here have no items
            together = max(1, most // splits)
            for first in range(0, tiles, together):
                last = min(first + together, tiles)
                rounds.append(Round(segment, segment + 1, first, last, (last - first) * splits))
            start = segment + 1
        else:
            held += tiles * splits
    return [*rounds, Round(start, len(queries.query_lengths), 0, -1, held)]


@dataclass(frozen=True, slots=True)
class Partials:
    """Partial results of a round's items: the weighted values fp32 [I,Hk,ROWS,W], the largest scores (to base 2)
    and the sums of weights fp32 [I,Hk,ROWS]."""

    values: Tensor
    maxima: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, plan: Plan, shape: Shape) -> Partials:
        """Room for the largest round."""
        size = (max(part.capacity for part in plan.rounds), shape.kv_heads, shape.rows)
        device = plan.items.device
        maxima, sums = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
        return cls(torch.empty(*size, shape.width, dtype=torch.float32, device=device), maxima, sums)


# Arguments of the kernels that attend, beside the queries, the pages and the kernel's own; `decode` fills them in.
ATTEND_TYPES = {
    **dict.fromkeys(("query_starts_ptr", "context_lengths_ptr", "table_rows_ptr", "tables_ptr"), "*i32"),
    **dict.fromkeys(("items_ptr", "firsts_ptr"), "*i32"),
    **dict.fromkeys(("partials_ptr", "maxima_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("segment_start", "segment_end", "tile_start", "tile_end", "table_stride"), "i32"),
    "factor": "fp32",
}


def decode(
    configuration: Configuration,
    out: Tensor,
    queries: PagedQueries,
    shape: Shape,
    scale: float,
    sinks: Tensor | None = None,
    mates: Prefixes | None = None,
    **arguments: Tensor,
) -> None:
    """Attend by `configuration`, a kernel that takes ATTEND_TYPES and `arguments`, into out [T, Hk G, W].

    scale: of the scores. sinks fp32 [Hk G]. mates: the sequences that share programs. Rows past the last segment
    become 0.
    """
    made = plan(queries, shape, len(out))
    partials = Partials.empty(made, shape)
    for part in made.rounds:
        launch(
            configuration,
            (part.capacity, shape.kv_heads),
            query_starts_ptr=queries.query_starts,
            context_lengths_ptr=queries.context_lengths,
            table_rows_ptr=queries.table_rows,
            tables_ptr=queries.block_tables,
            items_ptr=made.items,
            firsts_ptr=made.firsts,
            partials_ptr=partials.values,
            maxima_ptr=partials.maxima,
            sums_ptr=partials.sums,
            table_stride=queries.block_tables.stride(0),
            factor=scale * LOG2_E,
            **part.arguments(),
            **arguments,
        )
        launch(
            combine_configuration(POINTER[out.dtype], shape, sinks is not None, mates.together if mates else 1),
            (out.shape[0], out.shape[1]),
            partials_ptr=partials.values,
            maxima_ptr=partials.maxima,
            sums_ptr=partials.sums,
            out_ptr=out,
            sinks_ptr=partials.sums if sinks is None else sinks,  # without sinks it is not read
            mates_ptr=mates.mates if mates else made.firsts,
            query_starts_ptr=queries.query_starts,
            context_lengths_ptr=queries.context_lengths,
            firsts_ptr=made.firsts,
            row_segments_ptr=made.row_segments,
            capacity=part.capacity,
            **part.arguments(),
        )


def plan_configuration(shape: Shape) -> Configuration:
    """Configuration of the kernel that makes the items."""
    tables = ("query_starts_ptr", "context_lengths_ptr", "items_ptr", "firsts_ptr", "row_segments_ptr")
    types = dict.fromkeys(tables, "*i32") | dict.fromkeys(("segments", "limit"), "i32")
    constants = {"G": shape.group, "ROWS": shape.rows, **SPLITS.constants(), "WINDOW": shape.window, "BLOCK": 256}
    return Configuration(_plan, types, constants)


def combine_configuration(pointer: str, shape: Shape, sinks: bool = False, together: int = 1) -> Configuration:
    """pointer: to the result, such as "*bf16". together: sequences that may share a program; more than one only
    with a single key-value head."""
    types = (
        dict.fromkeys(("partials_ptr", "maxima_ptr", "sums_ptr", "sinks_ptr"), "*fp32")
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
        **SPLITS.constants(),
        "WINDOW": shape.window,
        "CHUNK": 16,
        "SINKS": sinks,
        "TOGETHER": together,
    }
    return Configuration(_combine, types, constants)
