"""Hostile cases for attention over pages, shared by the tests of every implementation (and by benchmarks).

Pages hold NaN wherever no token of the case is stored, block tables hold huge numbers beyond each sequence's
blocks, queries are views into wider tensors full of NaN, and a case's blocks are scattered. `expected` computes
a case's answer in fp64, row by row, from the dense contexts that were put into the pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels.ops.attention import PagedQueries

HUGE = 2**30
NAN = float("nan")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # bf16: inputs, products and result keep 8 bits each

# (query length, context) per segment; contexts include the segment's own rows
SEGMENTS: dict[str, list[tuple[int, int]]] = {
    "nothing": [],
    "one_token": [(1, 1)],
    "fresh_prompts": [(7, 7), (1, 1), (19, 19), (4, 4)],
    "chunk_after_context": [(6, 31), (5, 10)],
    "decode_unequal": [(1, 1), (1, 2), (1, 5), (1, 6), (1, 40), (1, 41), (1, 64)],
    "decode_equal": [(1, 12)] * 5,
    "empty_segments": [(0, 0), (1, 9), (0, 17), (3, 3), (0, 0)],
    "all_empty": [(0, 0), (0, 8)],
    "mixed": [(1, 30), (12, 12), (1, 3), (9, 50), (1, 33)],
    "several_splits": [(1, 701), (1, 7), (2, 500)],
    # Too long for Triton's interpreter, whose tests make splits small.
    "long_context": [(1, 3001), (1, 7), (2, 1500)],
}


@dataclass(frozen=True)
class PagedCase:
    """Queries, the dense context of each sequence [c, ...] (fp64 of what the pages hold), and the pages."""

    q: Tensor
    queries: PagedQueries
    contexts: list[Tensor]
    pages: Tensor


def make_case(
    name: str,
    width: int,
    heads: int,
    dtype: torch.dtype,
    *,
    entry: tuple[int, ...],
    block_tokens: int = 5,
    margin: int = 2,
) -> PagedCase:
    """`entry` is the shape of one token's values in the pages; q is [T, heads, width], with two rows to spare.

    It starts `margin` values into wider memory: with 8, at a multiple of 16 bytes, as kernels for GPUs want it.
    """
    segments = SEGMENTS[name]
    random = torch.Generator().manual_seed(len(name))
    needed = [-(-context // block_tokens) for _, context in segments]
    num_blocks = sum(needed) + 3
    ids = torch.randperm(num_blocks, generator=random)
    tables = torch.full((len(segments) + 2, max(needed, default=0) + 4), HUGE, dtype=torch.int32)
    rows = torch.randperm(len(tables), generator=random)[: len(segments)].int()
    pages = torch.full((num_blocks, block_tokens, *entry), NAN, dtype=dtype)
    contexts, used = [], 0
    for row, (_, context), blocks in zip(rows.tolist(), segments, needed, strict=True):
        own = ids[used : used + blocks]
        used += blocks
        tables[row, :blocks] = own.int()
        values = torch.randn(context, *entry, generator=random).to(dtype)
        for position in range(context):
            pages[own[position // block_tokens], position % block_tokens] = values[position]
        contexts.append(values.double())
    total = sum(length for length, _ in segments)
    wide = torch.full((total + 2, heads + 1, width + margin + 1), NAN, dtype=dtype)
    q = wide[:, :heads, margin : width + margin]
    q.copy_(torch.randn(q.shape, generator=random))
    return PagedCase(q, make_queries(segments, rows, tables), contexts, pages)


def make_queries(segments: list[tuple[int, int]], rows: Tensor, tables: Tensor) -> PagedQueries:
    """PagedQueries of (query length, context) pairs that lie in `rows` of `tables`."""
    lengths, contexts = [s[0] for s in segments], [s[1] for s in segments]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return PagedQueries(starts, torch.tensor(contexts).int(), rows.int(), tables, lengths, contexts)


def attend(
    case: PagedCase,
    keys: list[Tensor],
    values: list[Tensor],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """fp64 answer: keys[i], values[i] are [c, H, d] and [c, H, dv] of segment i -> [T, H, dv], spare rows zero."""
    rows = []
    start = 0
    for index, (length, context) in enumerate(zip(case.queries.query_lengths, case.queries.contexts, strict=True)):
        for i in range(length):
            end = context - length + i + 1
            seen = slice(max(0, end - window) if window else 0, end)
            scores = torch.einsum("hd,chd->hc", case.q[start + i].double(), keys[index][seen]) * scale
            if sinks is not None:
                scores = torch.cat((scores, sinks[:, None].double()), 1)
            weights = scores.softmax(-1)[:, : len(keys[index][seen])]
            rows.append(torch.einsum("hc,chd->hd", weights, values[index][seen]))
        start += length
    spare = case.q.shape[0] - start
    width = values[0].shape[-1] if values else 0
    return (
        torch.cat([torch.stack(rows), torch.zeros(spare, *rows[0].shape)])
        if rows
        else torch.zeros(spare, case.q.shape[1], width)
    )
