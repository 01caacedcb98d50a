"""Attention over paged memory in plain torch.

Two ways through the pages. Segments of one row (decoding) go together: contexts of similar length are gathered,
padded and masked; the padding repeats the sequence's own first token, so that no unwritten memory is ever read.
A longer segment goes by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.derived import derived
from cierzo.kernels.formats import kv_fp8, kv_int8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ref import norm, rope

MASK_ELEMENTS = 1 << 24  # of one causal mask; longer prompts are cut into pieces of rows
Gather = Callable[[Tensor], tuple[Tensor, Tensor]]  # slots [...] -> keys and values [..., Hk, d]


def write_latents(pages: Tensor, slots: Tensor, latents: Tensor, rope_keys: Tensor) -> None:
    """See ops/attention.py."""
    rank = latents.shape[1]
    flat = pages.view(-1, pages.shape[-1])
    if pages.dtype == kv_int8.PAGES_DTYPE:
        flat.index_copy_(0, slots, kv_int8.quantise_latents(latents, rope_keys))
        return
    if pages.dtype == kv_fp8.PAGES_DTYPE:
        flat, latents, rope_keys = (flat.view(torch.uint8), *map(_fp8_bytes, (latents, rope_keys)))
    flat[:, :rank].index_copy_(0, slots, latents)
    flat[:, rank:].index_copy_(0, slots, rope_keys)


def write_keys_values(k_pages: Tensor, v_pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """See ops/attention.py."""
    for pages, written in ((k_pages, keys), (v_pages, values)):
        flat, rows = pages.flatten(0, 1), written
        if pages.dtype == kv_int8.PAGES_DTYPE:
            rows = kv_int8.quantise(written)
        elif pages.dtype == kv_fp8.PAGES_DTYPE:
            flat, rows = flat.view(torch.uint8), _fp8_bytes(written)
        flat.index_copy_(0, slots, rows)


def write_normed_latents(
    pages: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> None:
    """See ops/attention.py."""
    latents, rope_keys = kv.tensor_split((norm_weight.shape[0],), dim=1)
    rope_keys = rope_keys.clone()
    rope.apply_rope(rope_keys[:, None], cos, sin, interleaved, None)
    write_latents(pages, slots, norm.rms_norm(latents, norm_weight, eps), rope_keys)


def rotate_and_write_keys_values(
    k_pages: Tensor, v_pages: Tensor, slots: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    """See ops/attention.py."""
    heads = qkv.unflatten(1, (-1, 2 * cos.shape[1]))
    shared = k_pages.shape[2]
    turned, values = heads[:, :-shared], heads[:, -shared:]
    rope.apply_rope(turned, cos, sin, interleaved, None)
    write_keys_values(k_pages, v_pages, slots, turned[:, -shared:], values)


def mla_absorb(q: Tensor, w_uk_t: Matrix) -> Tensor:
    """See ops/attention.py."""
    w_uk_t = as_tensor(w_uk_t)
    nope = w_uk_t.shape[2]
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), w_uk_t.transpose(1, 2)).transpose(0, 1)
    return torch.cat((absorbed, q[..., nope:]), dim=-1)


def mla_unabsorb(latents: Tensor, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    return torch.bmm(latents.transpose(0, 1), as_tensor(w_uv).transpose(1, 2)).transpose(0, 1)


def mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Matrix, w_uv: Matrix, queries: PagedQueries, scale: float
) -> Tensor:
    """See ops/attention.py."""
    w_uk, w_uv = as_tensor(w_uk), as_tensor(w_uv)
    heads, nope, rank = w_uk.shape
    flat = pages.view(-1, pages.shape[-1])

    def expand(slots: Tensor) -> tuple[Tensor, Tensor]:
        latents, rope_keys = _read_latents(flat[slots], rank, q.dtype).tensor_split((rank,), dim=-1)
        keys = q.new_empty(len(slots), heads, q.shape[-1])
        keys[..., :nope] = functional.linear(latents, w_uk.reshape(-1, rank)).unflatten(-1, (heads, nope))
        keys[..., nope:] = rope_keys[:, None]
        return keys, functional.linear(latents, w_uv.reshape(-1, rank)).unflatten(-1, (heads, -1))

    out = q.new_empty(q.shape[0], heads, 1, w_uv.shape[1])
    _by_segment(out, q[:, :, None], expand, queries, pages.shape[1], scale, longer_than=0)
    return out.flatten(1, 2)


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """See ops/attention.py."""
    flat = pages.view(-1, 1, pages.shape[-1])

    def gather(slots: Tensor) -> tuple[Tensor, Tensor]:
        latents = _read_latents(flat[slots], rank, q.dtype)
        return latents, latents  # as wide as keys, SDPA keeps to its fused path; the rope part is cut off below

    out = q.new_empty(q.shape[0], 1, q.shape[1], q.shape[2])
    _by_batch(out, q[:, None], gather, queries, pages.shape[1], scale)
    _by_segment(out, q[:, None], gather, queries, pages.shape[1], scale, longer_than=1)
    return out[:, 0, :, :rank]


def mla_values(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    return mla_unabsorb(mla_decode(q, pages, queries, scale, w_uv.shape[2]), w_uv)


def gqa_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py."""
    gather, grouped = _gqa(q, k_pages, v_pages)
    out = torch.empty_like(grouped)
    if window is not None or sinks is not None:
        _by_window(out, grouped, gather, queries, k_pages.shape[1], scale, window, sinks)
    else:
        _by_segment(out, grouped, gather, queries, k_pages.shape[1], scale, longer_than=0)
    return out.flatten(1, 2)


def gqa_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py."""
    if window is not None or sinks is not None:
        return gqa_prefill(q, k_pages, v_pages, queries, scale, window, sinks)
    gather, grouped = _gqa(q, k_pages, v_pages)
    out = torch.empty_like(grouped)
    _by_batch(out, grouped, gather, queries, k_pages.shape[1], scale)
    _by_segment(out, grouped, gather, queries, k_pages.shape[1], scale, longer_than=1)
    return out.flatten(1, 2)


def _gqa(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[Gather, Tensor]:
    keys, values = k_pages.flatten(0, 1), v_pages.flatten(0, 1)

    def gather(slots: Tensor) -> tuple[Tensor, Tensor]:
        return _read_heads(keys[slots], q.dtype), _read_heads(values[slots], q.dtype)

    return gather, q.unflatten(1, (k_pages.shape[2], -1))


def _fp8_bytes(x: Tensor) -> Tensor:
    """FP8 pages as bytes, which torch copies by index on every device."""
    return kv_fp8.quantise(x).view(torch.uint8)


def _read_latents(rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of pages of latents -> [..., R+P]."""
    return kv_int8.dequantise_latents(rows, rank, dtype) if rows.dtype == kv_int8.PAGES_DTYPE else rows.to(dtype)


def _read_heads(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of pages of keys or values -> [..., d]."""
    return kv_int8.dequantise(rows, dtype) if rows.dtype == kv_int8.PAGES_DTYPE else rows.to(dtype)


def _by_segment(
    out: Tensor, q: Tensor, gather: Gather, queries: PagedQueries, block_tokens: int, scale: float, longer_than: int
) -> None:
    """Segments of more than `longer_than` rows, one by one. q [T,Hk,G,dk], out [T,Hk,G,dv]; also clears the rows
    past the last segment."""
    start = 0
    for index, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        if length > longer_than:
            keys, values = gather(_segment_slots(queries, index, context, block_tokens))
            rows = slice(start, start + length)
            out[rows] = _causal(q[rows], keys, values, scale)
        start += length
    out[start:].zero_()


@derived
def _segment_slots(queries: PagedQueries, index: int, context: int, block_tokens: int) -> Tensor:
    """Slots of one segment's context -> int64 [c]; the same in every layer of a step."""
    return _slots(queries, [index], [context], block_tokens)[0]


def _causal(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [n,Hk,G,dk] at the end of a context of keys [c,Hk,dk], values [c,Hk,dv] -> [n,Hk,G,dv]."""
    length, context, group = q.shape[0], keys.shape[0], q.shape[2]
    q = q.permute(1, 2, 0, 3)  # heads that share keys: SDPA's batch is Hk, its heads are G, its keys are not copied
    keys = keys.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    values = values.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    if length == context:
        return functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale).permute(
            2, 0, 1, 3
        )
    pieces = []
    positions = torch.arange(context, device=q.device)
    step = max(1, MASK_ELEMENTS // context)
    for first in range(0, length, step):
        piece = q[:, :, first : first + step]
        last_seen = torch.arange(
            context - length + first, context - length + first + piece.shape[2], device=q.device
        )
        mask = positions <= last_seen[:, None]
        pieces.append(functional.scaled_dot_product_attention(piece, keys, values, attn_mask=mask, scale=scale))
    return torch.cat(pieces, dim=2).permute(2, 0, 1, 3)


def _by_window(
    out: Tensor,
    q: Tensor,
    gather: Gather,
    queries: PagedQueries,
    block_tokens: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    """All segments, one by one, with a window, sinks, or both: SDPA has no sinks. Also clears the rows past the
    last segment. q [T,Hk,G,dk], out [T,Hk,G,dv]."""
    start = 0
    for index, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        position = context - length  # of the first row
        first = max(0, position - window + 1) if window is not None else 0
        if length:
            keys, values = gather(_segment_slots(queries, index, context, block_tokens)[first:])
            step = max(1, MASK_ELEMENTS // (context - first))
            for row in range(0, length, step):
                piece = slice(start + row, start + min(row + step, length))
                out[piece] = _softmax(q[piece], keys, values, scale, position - first + row, window, sinks)
        start += length
    out[start:].zero_()


def _softmax(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, position: int, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Rows q [n,Hk,G,dk], the first at `position` of keys [c,Hk,dk] and values [c,Hk,dv] -> [n,Hk,G,dv]."""
    scores = torch.einsum("nkgd,ckd->kgnc", q.float(), keys.float()) * scale
    rows = torch.arange(position, position + len(q), device=q.device)[:, None]
    tokens = torch.arange(len(keys), device=q.device)
    hidden = tokens > rows
    if window is not None:
        hidden |= tokens <= rows - window
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(*q.shape[1:3], 1, 1).expand(-1, -1, len(q), -1)), dim=-1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("kgnc,ckd->nkgd", weights, values.float())


def _by_batch(
    out: Tensor, q: Tensor, gather: Gather, queries: PagedQueries, block_tokens: int, scale: float
) -> None:
    """All segments of one row, contexts of similar length together. q [T,Hk,G,dk], out [T,Hk,G,dv]."""
    for rows, slots, mask in _batches(queries, block_tokens):
        keys, values = gather(slots)  # [n,L,Hk,d]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        whole = len(rows) == q.shape[0]
        result = functional.scaled_dot_product_attention(
            q if whole else q[rows], keys, values, attn_mask=mask, scale=scale
        )
        if whole:
            out.copy_(result)
        else:
            out[rows] = result


@derived
def _batches(queries: PagedQueries, block_tokens: int) -> list[tuple[list[int], Tensor, Tensor | None]]:
    """(rows, slots [n,L], mask [n,1,1,L]) of the one-row segments; the same in every layer of a step."""
    batches = []
    for rows, members, contexts in _similar_lengths(queries):
        mask = None
        if min(contexts) < max(contexts):
            positions = torch.arange(max(contexts), device=queries.block_tables.device)
            mask = (positions < positions.new_tensor(contexts)[:, None])[:, None, None]
        batches.append((rows, _slots(queries, members, contexts, block_tokens), mask))
    return batches


def _similar_lengths(queries: PagedQueries) -> list[tuple[list[int], list[int], list[int]]]:
    """(rows, segments, contexts) of the one-row segments, by power of two of the context: padding at most doubles
    what is read, however unequal the sequences are."""
    buckets: dict[int, tuple[list[int], list[int], list[int]]] = {}
    start = 0
    for index, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        if length == 1:
            rows, members, contexts = buckets.setdefault(context.bit_length(), ([], [], []))
            rows.append(start)
            members.append(index)
            contexts.append(context)
        start += length
    return list(buckets.values())


def _slots(queries: PagedQueries, members: list[int], contexts: list[int], block_tokens: int) -> Tensor:
    """Slots of the members' context tokens -> int64 [n, longest]. A shorter context is padded with its own first
    token, which is valid memory; table entries beyond a sequence's blocks are not looked at."""
    positions = torch.arange(max(contexts), device=queries.block_tables.device)
    tables = queries.block_tables[queries.table_rows[members].long(), : -(-max(contexts) // block_tokens)].long()
    if min(contexts) < max(contexts):
        lengths = positions.new_tensor(contexts)[:, None]
        padded = torch.where(positions < lengths, positions, 0)
        return tables.gather(1, padded // block_tokens) * block_tokens + padded % block_tokens
    blocks = tables[:, positions // block_tokens]
    return blocks * block_tokens + positions % block_tokens
