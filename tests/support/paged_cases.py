"""Hostile cases for attention over pages, shared by the tests of every implementation (and by benchmarks).

Pages hold NaN wherever no token of the case is stored, block tables hold huge numbers beyond each sequence's
blocks, queries are views into wider tensors full of NaN, and a case's blocks are scattered. `expected` computes
a case's answer in fp64, row by row, from the dense contexts that were put into the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rounding import EXP, SUM, UNIT, Near, assert_near, exact, product, rounded
from torch import Tensor

from cierzo.kernels.ops.attention import PagedQueries

HUGE = 2**30
Pair = tuple[Tensor | Near, Tensor | Near]  # keys and values
CHAIN = 1024  # tokens: no kernel adds up more of a context one after the other
NAN = float("nan")

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
        positions = torch.arange(context)
        pages[own[positions // block_tokens], positions % block_tokens] = values
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


def expanded(latents: Tensor, w_uk: Tensor, w_uv: Tensor, dtype: torch.dtype) -> tuple[Near, Near]:
    """Keys [c,H,nope+P] and values [c,H,V] of a context's latents and rotated keys, fp64 [c,R+P]: products with
    weights [H,nope,R] and [H,V,R], rounded to the dtype."""
    heads, nope, rank = w_uk.shape
    both = torch.cat((w_uk, w_uv), 1).flatten(0, 1)  # of each head: keys, then values
    made = rounded(product(exact(latents[:, :rank]), both), dtype)
    value, error = (part.unflatten(1, (heads, -1)) for part in made)
    turned = latents[:, None, rank:].expand(-1, heads, -1)
    keys = Near(
        torch.cat((value[..., :nope], turned), -1), torch.cat((error[..., :nope], torch.zeros_like(turned)), -1)
    )
    return keys, Near(value[..., nope:], error[..., nope:])


def assert_attends(
    result: Tensor,
    case: PagedCase,
    both: Sequence[Pair],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """A result [T,H,dv] in the queries' dtype: as near the answer as roundings leave it, spare rows zero."""
    assert result.dtype == case.q.dtype
    assert len(result) == len(case.q)
    rows = sum(case.queries.query_lengths)
    if rows:
        assert_near(result[:rows], attend(case.q, case.queries, both, scale, window, sinks))
    assert not result[rows:].any()


def attend(
    q: Tensor,
    queries: PagedQueries,
    both: Sequence[Pair],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Near:
    """The answer for the rows of segments, [T,H,dv], and how far from it a result may lie. both[i]: keys [c,H,d]
    and values [c,H,dv] of segment i."""
    parts, start = [], 0
    for (length, context), pair in zip(
        zip(queries.query_lengths, queries.contexts, strict=True), both, strict=True
    ):
        keys, values = (part if isinstance(part, Near) else exact(part) for part in pair)
        rows, tokens = torch.arange(context - length, context)[:, None], torch.arange(context)
        hidden = tokens > rows
        if window:
            hidden |= tokens <= rows - window
        if length:
            parts.append(_attend_rows(q[start : start + length], keys, values, scale, hidden[:, None], sinks))
        start += length
    return Near(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _attend_rows(q: Tensor, keys: Near, values: Near, scale: float, hidden: Tensor, sinks: Tensor | None) -> Near:
    """Rows [n,H,d] of a segment, with what each does not see, [n,1,c]. Scores and sums are in fp32; a weight is
    rounded to the dtype before it meets a value."""
    scores = torch.einsum("nhd,chd->nhc", q.double(), keys.value) * scale
    largest = scores.abs().masked_fill(hidden, 0.0).amax(-1, keepdim=True)
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None].expand(len(q), -1, 1)), -1)
    weights = scores.softmax(-1)[..., : hidden.shape[-1]]
    result = torch.einsum("nhc,chd->nhd", weights, values.value)

    unsure = keys.error + (q.shape[-1] + 2) * SUM * keys.largest
    off = torch.einsum("nhd,chd->nhc", q.double().abs(), unsure) * scale
    off += 4 * SUM * largest  # of a score less the largest one, times log2 e
    relative = off.expm1() + EXP + UNIT[q.dtype]  # of a weight
    seen = (~hidden).sum(-1, keepdim=True)
    adding = (seen.clamp(max=CHAIN) + seen / CHAIN + 2) * SUM
    error = torch.einsum("nhc,chd->nhd", weights * (relative + adding * (1 + relative)), values.largest)
    error += torch.einsum("nhc,chd->nhd", weights, values.error)
    divisor = (weights * relative).sum(-1, keepdim=True) + adding
    return rounded(Near(result, (error + divisor * result.abs()) / (1 - divisor)), q.dtype)
