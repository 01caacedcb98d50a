"""Causal attention of prompt tokens, over keys and values gathered from their pages into a workspace.

    round            a stretch of each sequence's context, at most WORKSPACE_TOKENS tokens in all
    gather           pages -> rows [C, ...] in the dtype of the queries, by position; each stretch is padded with
                     zeros to whole tiles of TOKENS, so that the next kernels need no mask
    (mla expands)    latents -> keys and values of every head
    flash            a program computes ROWS consecutive query rows of one segment, for one head, over the tiles of
                     TOKENS of a stretch. Between rounds its online softmax (softmax.py) lies in memory in fp32, so
                     the length of a stretch changes no bits

Each row meets the same tiles of tokens in the same order, at multiples of TOKENS of its sequence, whatever rows are
beside it and wherever its chunk began. A token that a row must not see gets the weight 0. With a window, tokens
before the window of a segment's first row are not gathered, and a program begins with the tile in which the window
of its first row begins; a tile before a row's own window leaves the row's softmax as it was: empty.

Weight 0 times a value that is not finite is NaN, and would reach rows that come before the token. So gathering
replaces such a token's values by 0 and its key by NaN: the score of a row that sees the token is then NaN, and a
row that does not see it is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.derived import derived
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.paged import load_tile, page_rows, tile_width
from cierzo.kernels.triton.softmax import masked, sink_of, softmax_step

ROWS = 128  # query rows of a program
TOKENS = 64  # tokens of a tile; stretches begin at its multiples. With 128 the carried form spills registers
WORKSPACE_TOKENS = 16_384  # tokens of a round; Small 4's keys and values are then 201 MB
GATHERED = 16  # tokens of a program of `_gather`


@dataclass(frozen=True, slots=True)
class Round:
    """Stretches of contexts that share the workspace, and the tiles of rows that attend to them.

    num_tokens: C, a multiple of TOKENS. gathers int32 [C/TOKENS,4]: segment, first position, end of the stretch,
    position before which no row sees. tiles int32 [n,8]: segment, first row in it, first position, end, workspace
    row of the first position, whether this is the rows' first stretch, whether it is their last, padding.
    """

    num_tokens: int
    gathers: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Operands:
    """Keys and values of a round. keys [C,Hk,A]; values [C,Hk,V]. shared [C,*]: the shared_width = B columns from
    shared_column on are a second part of every head's key; B may be 0."""

    keys: Tensor
    shared: Tensor
    shared_column: int
    shared_width: int
    values: Tensor


@kernel
def _gather(
    pages_ptr, key_pages_ptr, table_rows_ptr, tables_ptr, gathers_ptr, out_ptr, keys_ptr, table_stride,
    HK: tl.constexpr, W: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr, S: tl.constexpr,
    TOKENS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    offset = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    segment = tl.load(gathers_ptr + chunk * 4)
    positions = tl.load(gathers_ptr + chunk * 4 + 1) + offset
    live = (positions < tl.load(gathers_ptr + chunk * 4 + 2)) & (positions >= tl.load(gathers_ptr + chunk * 4 + 3))
    table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride
    columns = tl.arange(0, BLOCK)
    head = tl.program_id(2)
    page_row = page_rows(table, positions, live, S) * HK + head
    row = load_tile(pages_ptr, page_row, live, columns, W, W, BLOCK).to(tl.float32)
    broken = tl.max(row.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1) >= 0x7F800000  # bits of infinity, or of a NaN
    row = tl.where(broken[:, None], tl.where(columns < VALUES, 0.0, float("nan"))[None, :], row)
    target = ((chunk.to(tl.int64) * TOKENS + offset) * HK + head)[:, None] * W + columns[None, :]
    tl.store(out_ptr + target, row.to(out_ptr.dtype.element_ty), mask=(columns < W)[None, :])
    if KEYS:
        row = load_tile(key_pages_ptr, page_row, live, columns, W, W, BLOCK).to(tl.float32)
        row = tl.where(broken[:, None], float("nan"), row)
        tl.store(keys_ptr + target, row.to(out_ptr.dtype.element_ty), mask=(columns < W)[None, :])


@kernel
def _step(
    q, q_shared, keys_ptr, shared_ptr, values_ptr, row, position, sees, acc, largest, total, factor,
    HK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr, SHARED_STRIDE: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of tokens for the ROWS query rows of a head; the pointers are to that head."""
    rows = row.to(tl.int64) + tl.arange(0, TOKENS)
    live = tl.full((TOKENS,), True, tl.int1)
    keys = load_tile(keys_ptr, rows, live, tl.arange(0, BLOCK_A), HK * A, A, BLOCK_A)
    scores = tl.dot(q, keys.T, input_precision="ieee")
    if B > 0:
        shared = load_tile(shared_ptr, rows, live, tl.arange(0, BLOCK_B), SHARED_STRIDE, B, BLOCK_B)
        scores = tl.dot(q_shared, shared.T, scores, input_precision="ieee")
    if MASKED:
        scores = masked(scores, position + tl.arange(0, TOKENS), sees, WINDOW)
    values = load_tile(values_ptr, rows, live, tl.arange(0, BLOCK_V), HK * V, V, BLOCK_V)
    return softmax_step(scores, factor, values, acc, largest, total, WINDOW > 0)


@kernel
def _flash(
    q_ptr, keys_ptr, shared_ptr, values_ptr, out_ptr, acc_ptr, largest_ptr, total_ptr, tiles_ptr, query_starts_ptr,
    context_lengths_ptr, sinks_ptr, factor,
    H: tl.constexpr, HK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, SHARED_STRIDE: tl.constexpr, SHARED_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0) * 8
    head = tl.program_id(1)
    segment = tl.load(tile)
    first_row = tl.load(tile + 1)
    begin = tl.load(tile + 2)
    end = tl.load(tile + 3)
    workspace_row = tl.load(tile + 4)
    start = tl.load(query_starts_ptr + segment)
    length = tl.load(query_starts_ptr + segment + 1) - start
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < length
    sees_first = tl.load(context_lengths_ptr + segment) - length + first_row + 1
    sees = sees_first + tl.arange(0, ROWS)
    # 64-bit addresses of the tile and 32-bit offsets within it take half the registers
    query = (start + first_row).to(tl.int64)
    offsets = tl.arange(0, ROWS)
    q_tile = q_ptr + query * Q_TOKEN + head * Q_HEAD
    q = load_tile(q_tile, offsets, inside, tl.arange(0, BLOCK_A), Q_TOKEN, A, BLOCK_A)
    q_shared = q
    if B > 0:
        q_shared = load_tile(q_tile + A, offsets, inside, tl.arange(0, BLOCK_B), Q_TOKEN, B, BLOCK_B)
    kv_head = (head // (H // HK)).to(tl.int64)
    keys = keys_ptr + kv_head * A
    values = values_ptr + kv_head * V
    shared = shared_ptr + SHARED_COLUMN

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # a sink counts as a first token with that score and the value 0
        largest = total + sink_of(sinks_ptr, head)
        total += 1.0
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    columns = tl.arange(0, BLOCK_V)
    kept = inside[:, None] & (columns < V)[None, :]
    state = query * H + head
    offsets *= H
    whole = offsets[:, None] * V + columns[None, :]
    if CARRIED:  # noqa: SIM102 (decided when it is compiled)
        if tl.load(tile + 5) == 0:  # not the first stretch
            largest = tl.load(largest_ptr + state + offsets, mask=inside, other=float("-inf"))
            total = tl.load(total_ptr + state + offsets, mask=inside, other=0.0)
            acc = tl.load(acc_ptr + state * V + whole, mask=kept, other=0.0)

    all_see = begin  # before this position no row needs a mask; the few tiles of a window are all masked
    if WINDOW == 0:
        all_see = tl.maximum(begin, tl.minimum(end, sees_first) // TOKENS * TOKENS)
        for position in range(begin, all_see, TOKENS):
            acc, largest, total = _step(
                q, q_shared, keys, shared, values, workspace_row + position - begin, position, sees,
                acc, largest, total, factor,
                HK, A, B, V, SHARED_STRIDE, BLOCK_A, BLOCK_B, BLOCK_V, TOKENS, WINDOW, False,
            )  # fmt: skip
    for position in range(all_see, end, TOKENS):
        acc, largest, total = _step(
            q, q_shared, keys, shared, values, workspace_row + position - begin, position, sees,
            acc, largest, total, factor,
            HK, A, B, V, SHARED_STRIDE, BLOCK_A, BLOCK_B, BLOCK_V, TOKENS, WINDOW, True,
        )  # fmt: skip

    if CARRIED:  # noqa: SIM102 (as above)
        if tl.load(tile + 6) == 0:  # not the last stretch
            tl.store(largest_ptr + state + offsets, largest, mask=inside)
            tl.store(total_ptr + state + offsets, total, mask=inside)
            tl.store(acc_ptr + state * V + whole, acc, mask=kept)
            return
    tl.store(out_ptr + state * V + whole, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


def rounds(queries: PagedQueries, window: int = 0) -> list[Round]:
    """The rounds of this step, made once for all layers. window: 0 is none."""
    return _rounds(queries, window, WORKSPACE_TOKENS)


@derived
def _rounds(queries: PagedQueries, window: int, workspace_tokens: int) -> list[Round]:
    device = queries.block_tables.device
    return [
        Round(len(gathers) * TOKENS, _table(gathers, device), _table(tiles, device))
        for gathers, tiles in _cut(queries, window, workspace_tokens)
    ]


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    """Copy to the device from pinned memory, so that the host does not wait for the step that still runs."""
    return torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _cut(
    queries: PagedQueries, window: int, workspace_tokens: int
) -> list[tuple[list[list[int]], list[list[int]]]]:
    """gathers and tiles of each round."""
    found: list[tuple[list[list[int]], list[list[int]]]] = []
    room = 0
    for segment, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        begin = _first_tile(context - length, window)
        while length and begin < context:
            if room == 0:
                found.append(([], []))
                room = workspace_tokens // TOKENS
            gathers, tiles = found[-1]
            end = min(context, begin + room * TOKENS)
            tiles += _tiles(segment, length, context, begin, end, len(gathers) * TOKENS, window)
            unseen = max(0, context - length + 1 - window) if window else 0
            gathers += [[segment, first, end, unseen] for first in range(begin, end, TOKENS)]
            room = workspace_tokens // TOKENS - len(gathers)
            begin = end
    for _, tiles in found:
        tiles.sort(key=lambda tile: tile[2] - tile[3])  # long ones first: the last programs are then short
    return found


def _first_tile(position: int, window: int) -> int:
    """First position of the tile of tokens in which the window of the row at `position` begins."""
    return max(0, position + 1 - window) // TOKENS * TOKENS if window else 0


def _tiles(
    segment: int, length: int, context: int, begin: int, end: int, workspace_row: int, window: int
) -> list[list[int]]:
    """Tiles of one segment that have a row which sees any of begin .. end - 1."""
    tiles = []
    for first in range(0, length, ROWS):
        seen = context - length + min(first + ROWS, length)
        unseen = _first_tile(context - length + first, window)
        if seen > begin and unseen < end:
            start = max(begin, unseen)
            row = workspace_row + start - begin
            tiles.append([segment, first, start, min(seen, end), row, begin <= unseen, seen <= end, 0])
    return tiles


def gather(
    pages: Tensor,
    num_values: int,
    key_pages: Tensor | None,
    queries: PagedQueries,
    of: Round,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gather pages, and key_pages if given, [B,S,Hk,W], into rows [C,Hk,W] each; 0 where there is no token.

    The first num_values columns of `pages` are values, or latents that values are made of; the rest, and key_pages,
    are keys. Without key_pages the rows of `pages` are returned twice.
    """
    _, block_tokens, heads, width = pages.shape
    out = torch.empty(of.num_tokens, heads, width, dtype=dtype, device=pages.device)
    keys = out if key_pages is None else torch.empty_like(out)
    kinds = POINTER[dtype], POINTER[pages.dtype]
    launch(
        gather_configuration(*kinds, heads, width, num_values, key_pages is not None, block_tokens),
        (len(of.gathers), TOKENS // GATHERED, heads),
        pages_ptr=pages,
        key_pages_ptr=pages if key_pages is None else key_pages,
        table_rows_ptr=queries.table_rows,
        tables_ptr=queries.block_tables,
        gathers_ptr=of.gathers,
        out_ptr=out,
        keys_ptr=keys,
        table_stride=queries.block_tables.stride(0),
    )
    return out, keys


class Flash:
    """Attention of q [T,H,A+B], round by round, into out [T,H,V]; rows past the last segment become 0."""

    def __init__(
        self,
        q: Tensor,
        out: Tensor,
        queries: PagedQueries,
        factor: float,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> None:
        """factor: multiplies the scores, log2 e included. window: 0 is none. sinks: fp32 [H]."""
        self._q, self._out, self._queries, self._factor = q, out, queries, factor
        self._window, self._sinks = window, sinks
        self._carried = len(rounds(queries, window)) > 1
        size = out.shape if self._carried else (1, 1, 1)
        self._acc = torch.empty(size, dtype=torch.float32, device=out.device)
        self._largest, self._total = torch.empty_like(self._acc[..., 0]), torch.empty_like(self._acc[..., 0])
        out[sum(queries.query_lengths) :].zero_()

    def attend(self, of: Round, operands: Operands) -> None:
        """Attend to one round's keys and values."""
        keys, values = operands.keys, operands.values
        configuration = flash_configuration(
            POINTER[self._q.dtype],
            (self._q.shape[1], keys.shape[1]),
            (keys.shape[2], operands.shared_width, values.shape[2]),
            (self._q.stride(0), self._q.stride(1)),
            (operands.shared.stride(0), operands.shared_column),
            self._carried,
            self._window,
            self._sinks is not None,
        )
        launch(
            configuration,
            (len(of.tiles), self._q.shape[1]),
            q_ptr=self._q,
            keys_ptr=keys,
            shared_ptr=operands.shared,
            values_ptr=values,
            out_ptr=self._out,
            acc_ptr=self._acc,
            largest_ptr=self._largest,
            total_ptr=self._total,
            tiles_ptr=of.tiles,
            query_starts_ptr=self._queries.query_starts,
            context_lengths_ptr=self._queries.context_lengths,
            sinks_ptr=self._total if self._sinks is None else self._sinks,  # without sinks it is not read
            factor=self._factor,
        )


@kept
def gather_configuration(
    pointer: str, pages: str, heads: int, width: int, num_values: int, keys: bool, block_tokens: int
) -> Configuration:
    """pointer: to the workspace, such as "*bf16". keys: whether keys have pages of their own."""
    types = (
        dict.fromkeys(("pages_ptr", "key_pages_ptr"), pages)
        | dict.fromkeys(("table_rows_ptr", "tables_ptr", "gathers_ptr"), "*i32")
        | dict.fromkeys(("out_ptr", "keys_ptr"), pointer)
        | {"table_stride": "i32"}
    )
    constants = {
        "HK": heads,
        "W": width,
        "VALUES": num_values,
        "KEYS": keys,
        "S": block_tokens,
        "TOKENS": TOKENS,
        "SLICE": GATHERED,
        "BLOCK": tile_width(width),
    }
    return Configuration(_gather, types, constants)


@kept
def flash_configuration(
    pointer: str,
    heads: tuple[int, int],
    widths: tuple[int, int, int],
    strides: tuple[int, int],
    shared: tuple[int, int],
    carried: bool,
    window: int = 0,
    sinks: bool = False,
) -> Configuration:
    """heads: of queries, of keys. widths: A, B, V of Operands. strides: of q's tokens and heads, in values.
    shared: row stride and first column of the shared part. window: 0 is none."""
    types = (
        dict.fromkeys(("q_ptr", "keys_ptr", "shared_ptr", "values_ptr", "out_ptr"), pointer)
        | dict.fromkeys(("acc_ptr", "largest_ptr", "total_ptr", "sinks_ptr"), "*fp32")
        | dict.fromkeys(("tiles_ptr", "query_starts_ptr", "context_lengths_ptr"), "*i32")
        | {"factor": "fp32"}
    )
    constants = {
        "H": heads[0],
        "HK": heads[1],
        "A": widths[0],
        "B": widths[1],
        "V": widths[2],
        "Q_TOKEN": strides[0],
        "Q_HEAD": strides[1],
        "SHARED_STRIDE": shared[0],
        "SHARED_COLUMN": shared[1],
        "ROWS": ROWS,
        "BLOCK_A": tile_width(widths[0]),
        "BLOCK_B": tile_width(widths[1]) if widths[1] else 16,
        "BLOCK_V": tile_width(widths[2]),
        "TOKENS": TOKENS,
        "WINDOW": window,
        "SINKS": sinks,
        "CARRIED": carried,
    }
    return Configuration(_flash, types, constants, num_warps=8, num_stages=3)
