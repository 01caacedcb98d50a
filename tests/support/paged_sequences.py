"""Sequences in pages: the same tokens cut into any segments, in blocks of any size, as values, FP8 or INT8 rows.

Pages, tables and blocks are poisoned and scattered as in paged_cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from paged_cases import HUGE, NAN, attend, make_queries
from rounding import Near, exact, rounded
from torch import Tensor

from cierzo.kernels.formats import kv_fp8, kv_int8
from cierzo.kernels.ops import attention
from cierzo.kernels.ops.attention import PagedQueries

Segment = tuple[int, int, int]  # a sequence, its first row and the one past its last
SCALE = 0.3


@dataclass(frozen=True)
class Form:
    """Sizes of one attention over pages. MLA has a rank; GQA has kv_heads, of `width` values each."""

    heads: int
    rank: int = 0
    rope: int = 0
    kv_heads: int = 0
    width: int = 0

    @property
    def q_width(self) -> int:
        return self.width or self.rank + self.rope

    @property
    def entry(self) -> tuple[int, ...]:
        """Shape of what is cached of a token."""
        return (self.rank + self.rope,) if self.rank else (2, self.kv_heads, self.width)

    def pages_of(self, cached: Tensor, int8: bool, fp8: bool = False) -> list[Tensor]:
        """Rows of each of the pages, of values [c, *entry]."""
        parts = [cached] if self.rank else list(cached.unbind(1))
        if fp8:
            return [kv_fp8.quantise(part) for part in parts]
        if not int8:
            return parts
        if self.rank:
            return [kv_int8.quantise_latents(*cached.tensor_split((self.rank,), dim=1))]
        return [kv_int8.quantise(part) for part in parts]

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Dense context [c, *entry] -> keys [c,H,d], values [c,H,dv]."""
        if self.rank:
            keys = context[:, None].expand(-1, self.heads, -1)
            return keys, keys[..., : self.rank]
        keys, values = context.repeat_interleave(self.heads // self.kv_heads, dim=2).unbind(1)
        return keys, values

    def read(self, pages: list[Tensor]) -> Near:
        """Values [c, *entry] that rows of pages [c, ...] stand for."""
        parts = pages
        if pages[0].dtype == kv_fp8.PAGES_DTYPE:
            parts = [part.float() for part in pages]
        if pages[0].dtype == kv_int8.PAGES_DTYPE:
            parts = [
                kv_int8.dequantise_latents(part, self.rank, torch.float32)
                if self.rank
                else kv_int8.dequantise(part, torch.float32)
                for part in pages
            ]
        return exact(parts[0] if self.rank else torch.stack(parts, 1))

    def decode(self, q: Tensor, pages: list[Tensor], queries: PagedQueries, scale: float = SCALE) -> Tensor:
        """The door's result."""
        if self.rank:
            return attention.mla_decode(q, pages[0], queries, scale, self.rank)
        return attention.gqa_decode(q, pages[0], pages[1], queries, scale)


@dataclass(frozen=True)
class Sequence:
    """Queries [L,H,d] and cached values [L, *entry]."""

    q: Tensor
    cached: Tensor


def random_sequence(form: Form, dtype: torch.dtype, length: int, seed: int) -> Sequence:
    """Standard normal values."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(length, form.heads, form.q_width, generator=random).to(dtype)
    return Sequence(q, torch.randn(length, *form.entry, generator=random).to(dtype))


@dataclass(frozen=True)
class Batch:
    """Segments of sequences. Of a sequence, what lies behind its last segment is not in the pages."""

    form: Form
    q: Tensor
    pages: list[Tensor]
    queries: PagedQueries

    def decode(self) -> list[Tensor]:
        """One result per segment."""
        result = self.form.decode(self.q, self.pages, self.queries)
        return list(result.split(self.queries.query_lengths))


def segments_near(
    form: Form,
    sequences: list[Sequence],
    segments: list[Segment],
    int8: bool = False,
    fp8: bool = False,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Near:
    """Exact results [T,H,dv] of the segments' rows, and how far from them a result may lie."""
    dtype, both = sequences[0].q.dtype, []
    for which, _, last in segments:
        read = form.read(form.pages_of(sequences[which].cached[:last], int8, fp8))
        keys, values = zip(
            *(form.keys_values(part) for part in (rounded(read, dtype) if int8 else read)), strict=True
        )
        both.append((Near(*keys), Near(*values)))
    q = torch.cat([sequences[which].q[first:last] for which, first, last in segments])
    none = torch.zeros(0, dtype=torch.int32)
    queries = make_queries([(last - first, last) for _, first, last in segments], none, none)
    return attend(q, queries, both, SCALE, window, sinks)


def make_batch(
    form: Form,
    sequences: list[Sequence],
    segments: list[Segment],
    block_tokens: int = 16,
    int8: bool = False,
    fp8: bool = False,
) -> Batch:
    """Segments of one sequence share its blocks."""
    contexts = [max((last for which, _, last in segments if which == i), default=0) for i in range(len(sequences))]
    needed = [-(-context // block_tokens) for context in contexts]
    ids = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(len(segments)))
    tables = torch.full((len(sequences), max(needed) + 2), HUGE, dtype=torch.int32)
    pages: list[Tensor] = []
    used = 0
    for row, (sequence, context) in enumerate(zip(sequences, contexts, strict=True)):
        own = ids[used : used + needed[row]]
        used += needed[row]
        tables[row, : len(own)] = own.int()
        positions = torch.arange(context)
        slots = own[positions // block_tokens] * block_tokens + positions % block_tokens
        for part, rows in enumerate(form.pages_of(sequence.cached[:context], int8, fp8)):
            kind, rows = rows.dtype, rows.view(torch.uint8) if fp8 else rows
            if part == len(pages):
                poison = 255 if int8 or fp8 else NAN  # an e4m3, or a scale, of 255s is a NaN
                memory = torch.full((len(ids) * block_tokens, *rows.shape[1:]), poison, dtype=rows.dtype)
                pages.append(memory.view(kind))
            pages[part].view(rows.dtype)[slots] = rows
    q = torch.cat([sequences[which].q[first:last] for which, first, last in segments])
    lengths = [(last - first, last) for _, first, last in segments]
    queries = make_queries(lengths, torch.tensor([which for which, _, _ in segments]), tables)
    return Batch(form, q, [page.unflatten(0, (-1, block_tokens)) for page in pages], queries)


def forget(batch: Batch, window: int) -> Batch:
    """The batch without what lies before the windows of its sequences' first rows, as if those blocks had been
    given away: their table entries are huge, and all that is left of them in the pages is NaN."""
    queries, tables = batch.queries, batch.queries.block_tables.clone()
    pages = [page.clone() for page in batch.pages]
    block_tokens = pages[0].shape[1]
    firsts: dict[int, int] = {}
    for row, length, context in zip(
        queries.table_rows.tolist(), queries.query_lengths, queries.contexts, strict=True
    ):
        first = max(0, context - length + 1 - window)
        firsts[row] = min(first, firsts.get(row, first))
    for row, first in firsts.items():
        for position in range(first):
            block = tables[row, position // block_tokens]
            for page in pages:
                page[block, position % block_tokens] = NAN
        tables[row, : first // block_tokens] = HUGE
    return replace(batch, pages=pages, queries=replace(queries, block_tables=tables))
