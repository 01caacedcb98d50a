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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.derived import derived
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton.launch import Configuration, kept, kernel, launch
from cierzo.kernels.triton.prefix import Prefixes

# Rows of a tile, as many as the product of a warp group takes. With few heads some rows are empty, which costs less
# than reading the pages; the draft tokens of a sequence share the tile of its first token.
ROWS = 64
ITEM = 4  # int32 values of an item: segment, first row, split, padding
PARTIAL_BYTES = 256 << 20  # largest size of the partial results of a round; more items run in several rounds


@dataclass(frozen=True, slots=True)
class Splits:
    """`shorts` splits of `short` tokens, then splits of `long` tokens.

    walked: parts of a short and of a long split, one after another by its program. joined: short and long splits
    whose partial results are added up ahead of others. Either way each part's softmax is its own, and the parts'
    results are added in the same order by the same operations (`add_part`): a row's bits are the same.
    """

    short: int
    shorts: int
    long: int
    walked: tuple[int, int] = (1, 1)
    joined: tuple[int, int] = (1, 1)

    def apart(self) -> Splits:
        """The parts that a program walks, as splits of their own."""
        short, long = self.walked
        return Splits(self.short // short, self.shorts * short, self.long // long, joined=self.walked)

    def count(self, context: int, seen: int = 0) -> int:
        """Number of splits of a context; with `seen`, at most so many hold the last `seen` tokens of any context up
        to this one."""
        rest = context - self.short * self.shorts
        whole = -(-context // self.short) if rest <= 0 else self.shorts + -(-rest // self.long)
        return min(whole, -(-(seen - 1) // min(self.short, self.long)) + 1) if seen else whole

    def most(self, segments: int, total: int) -> int:
        """Largest number of splits of so many contexts of `total` tokens in all.

        Ahead of rounding up, splits are a concave function of a context: most if all contexts are alike.
        """
        alike = total / segments
        shorts = min(alike / self.short, self.shorts)
        longs = max(alike - self.short * self.shorts, 0) / self.long
        return segments + int(segments * (shorts + longs))

    def constants(self) -> dict[str, int]:
        """The kernels' constants of the same names."""
        return {"SHORT": self.short, "SHORTS": self.shorts, "LONG": self.long}


SPLITS = Splits(512, 16, 1024)
# MLA's: parts of 256 tokens, then of 1024. A partial result is written and read by 32 heads in 66 KB, the pages of
# 2048 tokens in FP8 are 655 KB, and those of 4096 twice as many.
WALKED = Splits(2048, 2, 4096, walked=(8, 4))
PROGRAMS = 128  # as many walk; fewer would leave multiprocessors idle, so each part gets a program


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoding: key-value heads, query heads for each (the group), columns of a result, rows of a tile.
    window: tokens that a row sees, its own included; 0 is all of them. cut: where contexts are cut."""

    kv_heads: int
    group: int
    width: int
    rows: int = ROWS
    window: int = 0
    cut: Splits = field(default_factory=lambda: SPLITS)

    def splits(self, length: int, context: int) -> int:
        """Largest number of splits of a segment with at most `length` query tokens and `context` tokens."""
        return self.cut.count(context, self.window + length - 1 if self.window else 0)

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
    item; row_segments int32 [T], each row's segment, -1 past the last one. read, combined: what those who attend,
    and who add up, are given of it in each round."""

    items: Tensor
    firsts: Tensor
    row_segments: Tensor
    rounds: list[Round]
    read: list[dict[str, Any]]
    combined: list[dict[str, Any]]


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
def add_part(largest, total, more_largest, more_total):
    """Add a part's online softmax to that of the parts before: their largest score and sum of weights, and the
    factors of the values before (round, then add) and of the part's (in one with the addition)."""
    peak = tl.maximum(largest, more_largest)
    base = tl.where(peak == float("-inf"), 0.0, peak)  # -inf minus -inf would be NaN
    fade = tl.exp2(largest - base)
    weight = tl.exp2(more_largest - base)
    return peak, tl.fma(more_total, weight, total * fade), fade, weight


@kernel
def add_partial(
    partials_ptr, maxima_ptr, sums_ptr, place, acc, largest, total, inside, there,
    ROWS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """store_partial, after adding the tile to what is stored if a part is `there`."""
    rows = place * ROWS + tl.arange(0, ROWS)
    before = inside & there
    maxima = tl.load(maxima_ptr + rows, mask=before, other=float("-inf"))
    sums = tl.load(sums_ptr + rows, mask=before, other=0.0)
    peak, mass, fade, weight = add_part(maxima, sums, largest, total)
    _add_columns(
        partials_ptr + rows[:, None] * W, acc, fade, weight, before, inside, 0, W, BLOCK_W, ROWS, min(64, BLOCK_W)
    )
    tl.debug_barrier()  # all have read before any writes
    tl.store(maxima_ptr + rows, peak, mask=inside)
    tl.store(sums_ptr + rows, mass, mask=inside)
    tl.debug_barrier()  # all is written before any reads


@kernel
def _add_columns(
    pointers, acc, fade, weight, before, inside, first: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add columns first .. first + BLOCK - 1 of a tile to those stored, AT_ONCE at a time: all would need as many
    registers again as the tile."""
    if BLOCK > AT_ONCE:
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, BLOCK // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        _add_columns(pointers, low, fade, weight, before, inside, first, W, BLOCK // 2, ROWS, AT_ONCE)
        _add_columns(pointers, high, fade, weight, before, inside, first + BLOCK // 2, W, BLOCK // 2, ROWS, AT_ONCE)
    else:
        columns = first + tl.arange(0, BLOCK)[None, :]
        wide = columns < W
        values = tl.load(pointers + columns, mask=before[:, None] & wide, other=0.0)
        total = tl.fma(acc, weight[:, None], values * fade[:, None])
        tl.store(pointers + columns, total, mask=inside[:, None] & wide)


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


@derived
def plan(queries: PagedQueries, shape: Shape, num_rows: int) -> Plan:
    """The plan of this step, made once for all layers. num_rows: T."""
    segments, device = len(queries.query_lengths), queries.block_tables.device
    rounds = _rounds(queries, shape)
    bound, together = sum(part.capacity for part in rounds), most_items(queries, shape)
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
    of_queries = {"query_starts_ptr": queries.query_starts, "context_lengths_ptr": queries.context_lengths}
    tables = {"table_rows_ptr": queries.table_rows, "tables_ptr": queries.block_tables}
    both = {**of_queries, "firsts_ptr": firsts}
    read = {**both, **tables, "items_ptr": items, "table_stride": queries.block_tables.stride(0)}
    combined = {**both, "row_segments_ptr": row_segments}
    return Plan(
        *(items, firsts, row_segments, rounds),
        read=[read | part.arguments() for part in rounds],
        combined=[combined | part.arguments() | {"capacity": part.capacity} for part in rounds],
    )


@derived
def most_items(queries: PagedQueries, shape: Shape) -> int:
    """Largest number of items of a step, by the lists or by total_context."""
    lengths = zip(queries.query_lengths, queries.contexts, strict=True)
    items = sum(
        -(-length * shape.group // shape.rows) * shape.splits(length, context) for length, context in lengths
    )
    if queries.total_context:
        tiles = max(-(-length * shape.group // shape.rows) for length in queries.query_lengths)
        items = min(items, tiles * shape.cut.most(len(queries.query_lengths), queries.total_context))
    return items


def walked(queries: PagedQueries, shape: Shape) -> Shape:
    """The shape itself if its programs fill a card, else with a program for each part of a split."""
    return shape if most_items(queries, shape) >= PROGRAMS else replace(shape, cut=shape.cut.apart())


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
        values = torch.empty(*size, shape.width, dtype=torch.float32, device=device)
        return cls(values, values.new_empty(*size), values.new_empty(*size))


@dataclass(frozen=True, slots=True)
class Finish:
    """A kernel that adds up partial results (combine.py), and its own arguments."""

    configuration: Configuration
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


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
    made: Plan,
    shape: Shape,
    factor: float,
    finish: Finish,
    mates: Prefixes | None = None,
    **arguments: Tensor,
) -> None:
    """Attend by `configuration`, a kernel that takes ATTEND_TYPES and `arguments`, and add up its partial
    results by `finish`, into out.

    factor: of the scores, above 0, to base 2. mates: the sequences that share programs. Rows past the last segment
    become 0.
    """
    partials = Partials.empty(made, shape)
    parts = {"partials_ptr": partials.values, "maxima_ptr": partials.maxima, "sums_ptr": partials.sums}
    leaders = mates.mates if mates else made.firsts
    for part, read, combined in zip(made.rounds, made.read, made.combined, strict=True):
        grid = (part.capacity, shape.kv_heads)
        launch(configuration, grid, factor=factor, **parts, **read, **arguments)
        rest = finish.arguments
        launch(finish.configuration, finish.grid, out_ptr=out, mates_ptr=leaders, **parts, **combined, **rest)


@kept
def plan_configuration(shape: Shape) -> Configuration:
    """Configuration of the kernel that makes the items."""
    tables = ("query_starts_ptr", "context_lengths_ptr", "items_ptr", "firsts_ptr", "row_segments_ptr")
    types = dict.fromkeys(tables, "*i32") | dict.fromkeys(("segments", "limit"), "i32")
    constants = {
        "G": shape.group,
        "ROWS": shape.rows,
        **shape.cut.constants(),
        "WINDOW": shape.window,
        "BLOCK": 256,
    }
    return Configuration(_plan, types, constants)
