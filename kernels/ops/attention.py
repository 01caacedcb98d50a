"""Attention over paged memory, and the writes into it.

Letters: T query rows, H heads, R latent rank, P rope dims, V value dims, B blocks, S tokens per block, N segments,
M rows of the block tables, W their width; Hq and Hk query and key-value heads, d their width.

    pages [B,S,...]     token j of a sequence lives in pages[table[j // S], j % S]: its slot is table[j//S]*S + j%S
    block_tables [M,W]  row r: the block ids of one sequence, in order; what lies beyond its last block is
                        arbitrary (stale ids, huge numbers) and is not read; nor may the unwritten rest of its last
                        block, or any other page, reach a result: all of it may hold NaN
    a segment           n consecutive query rows, the last n of a context of c tokens that is already in the pages;
                        its row i sees positions 0 .. c-n+i. n may be 0, then nothing of it is read
    INT8 pages          of dtype uint8 beside a q or keys of any dtype: rows hold codes, then 4 bytes for each scale
                        (formats/kv_int8.py), so they are R+P+8 or d+4 wide. They are read as values of q's dtype
    FP8 pages           of dtype float8_e4m3fn beside a q or keys of any dtype, as wide as the values; what is
                        written is rounded to nearest and clamped to 448 (formats/kv_fp8.py). There is no scale
    not finite          a NaN or an infinity among a token's cached values reaches the rows that see the token.
                        Others of the same segment, whose weight for it is 0, it may reach in plain torch, in C++
                        prompts where they are fewer than 40 positions before it, and on a GPU when decoding several
                        rows a segment; not in prompts on a GPU. Rows of other segments it never reaches

Wherever pages "of q's dtype, or INT8" are named below, FP8 pages of the width of the former may stand as well. The
C++ kernels read no FP8, the GPU's no INT8: each refuses it by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats import kv_fp8, kv_int8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.registry import bound


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PagedQueries:
    """N segments of query rows, and where their contexts lie.

    query_starts: int32 [N+1], first row of each segment, and the end. context_lengths: int32 [N], tokens in the
    context, the segment's own included. table_rows: int32 [N], row of block_tables. block_tables: int32 [M,W].
    query_lengths, contexts: the first two on the host, as lengths. In a recorded step they are upper bounds, and
    those on the device count; total_context is then an upper bound of the sum of its contexts (0: their sum).
    """

    query_starts: Tensor
    context_lengths: Tensor
    table_rows: Tensor
    block_tables: Tensor
    query_lengths: list[int]
    contexts: list[int]
    total_context: int = 0

    @classmethod
    def of(
        cls, query_lengths: list[int], contexts: list[int], table_rows: list[int], block_tables: Tensor
    ) -> PagedQueries:
        """Segments from numbers on the host, on the device of the block tables."""
        starts, lengths, rows = (
            torch.tensor(numbers, dtype=torch.int32, device=block_tables.device)
            for numbers in ([0, *accumulate(query_lengths)], contexts, table_rows)
        )
        return cls(starts, lengths, rows, block_tables, query_lengths, contexts)


def write_latents(pages: Tensor, slots: Tensor, latents: Tensor, rope_keys: Tensor) -> None:
    """pages[slot] = [latent | rope key], in place, for each of T tokens.

    pages [B,S,R+P] contiguous; slots int64 [T], distinct; latents [T,R] (after their norm), rope_keys [T,P]
    (rotated, not normed); one dtype, rows may be strided. INT8 pages [B,S,R+P+8]: both are quantised.
    """
    names = check.sizes(
        "write_latents",
        pages=(pages, "B S *"),
        slots=(slots, "T"),
        latents=(latents, "T R"),
        rope_keys=(rope_keys, "T P"),
    )
    check.same_dtype("write_latents", latents=latents, rope_keys=rope_keys)
    check_pages("write_latents", names["R"] + names["P"], 2, latents=latents, pages=pages)
    check.dtype("write_latents", torch.int64, slots=slots)
    bound.write_latents(pages, slots, latents, rope_keys)


def write_keys_values(k_pages: Tensor, v_pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """k_pages[slot] = key and v_pages[slot] = value, in place, for each of T tokens.

    k_pages, v_pages [B,S,Hk,d] contiguous; slots int64 [T], distinct; keys (rotated), values [T,Hk,d], one dtype.
    INT8 pages [B,S,Hk,d+4]: each key and value is quantised.
    """
    names = check.sizes(
        "write_keys_values",
        keys=(keys, "T Hk d"),
        values=(values, "T Hk d"),
        slots=(slots, "T"),
        k_pages=(k_pages, "B S Hk *"),
        v_pages=(v_pages, "B S Hk *"),
    )
    check.same_dtype("write_keys_values", keys=keys, values=values)
    check_pages("write_keys_values", names["d"], 1, keys=keys, k_pages=k_pages, v_pages=v_pages)
    check.dtype("write_keys_values", torch.int64, slots=slots)
    bound.write_keys_values(k_pages, v_pages, slots, keys, values)


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
    """pages[slot] = [rms_norm(latent) | rotated rope key], in place: write_latents and what it needs, in one pass.

    kv [T,R+P], the projection's rows [latent | rope key], may be strided and is not changed; norm_weight [R], one
    dtype; cos, sin fp32 [T,P/2] (apply_rope's); pages and slots as for write_latents.
    """
    names = check.sizes(
        "write_normed_latents",
        pages=(pages, "B S *"),
        slots=(slots, "T"),
        kv=(kv, "T W"),
        norm_weight=(norm_weight, "R"),
        cos=(cos, "T F"),
        sin=(sin, "T F"),
    )
    check.require(
        "write_normed_latents",
        names["W"] == names["R"] + 2 * names["F"],
        f"kv {list(kv.shape)} is not R+P wide: norm_weight {list(norm_weight.shape)}, cos {list(cos.shape)}",
    )
    check.same_dtype("write_normed_latents", kv=kv, norm_weight=norm_weight)
    check.dtype("write_normed_latents", torch.float32, cos=cos, sin=sin)
    check.dtype("write_normed_latents", torch.int64, slots=slots)
    check_pages("write_normed_latents", names["W"], 2, kv=kv, pages=pages)
    bound.write_normed_latents(pages, slots, kv, norm_weight, eps, cos, sin, interleaved)


def rotate_and_write_keys_values(
    k_pages: Tensor, v_pages: Tensor, slots: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    """Rotate the queries of qkv IN PLACE, write its rotated keys and its values to the pages.

    qkv [T,(Hq+2Hk)d]: a token's queries, keys, values, head by head; its keys' memory may hold anything afterwards.
    Rows may be strided. cos, sin fp32 [T,d/2] (apply_rope's); pages and slots as for write_keys_values.
    """
    names = check.sizes(
        "rotate_and_write_keys_values",
        qkv=(qkv, "T W"),
        slots=(slots, "T"),
        cos=(cos, "T F"),
        sin=(sin, "T F"),
        k_pages=(k_pages, "B S Hk *"),
        v_pages=(v_pages, "B S Hk *"),
    )
    width = 2 * names["F"]
    heads = names["W"] // width
    check.require(
        "rotate_and_write_keys_values",
        names["W"] == heads * width and heads > 2 * names["Hk"] and qkv.stride(1) == 1,
        f"qkv {list(qkv.shape)} is not (Hq+2Hk)d wide and contiguous, for Hk = {names['Hk']}, d = {width}",
    )
    check.dtype("rotate_and_write_keys_values", torch.float32, cos=cos, sin=sin)
    check.dtype("rotate_and_write_keys_values", torch.int64, slots=slots)
    check_pages("rotate_and_write_keys_values", width, 1, qkv=qkv, k_pages=k_pages, v_pages=v_pages)
    bound.rotate_and_write_keys_values(k_pages, v_pages, slots, qkv, cos, sin, interleaved)


def mla_absorb(q: Tensor, w_uk_t: Matrix) -> Tensor:
    """Move the key expansion to the query: [q_nope | q_rope] -> [q_nope W_UK | q_rope], new [T,H,R+P].

    q [T,H,nope+P]; w_uk_t [H,R,nope], W_UK of each head with its axes exchanged; one dtype.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
    """
    names = check.sizes("mla_absorb", q=(q, "T H Q"), w_uk_t=(w_uk_t, "H R nope"))
    check.require("mla_absorb", names["Q"] > names["nope"], f"q {list(q.shape)} has no rope part")
    check.same_dtype("mla_absorb", q=q, w_uk_t=w_uk_t)
    return bound.mla_absorb(q, w_uk_t)


def mla_unabsorb(latents: Tensor, w_uv: Matrix) -> Tensor:
    """Each head's mix of latents -> its value: latents [T,H,R], w_uv [H,V,R], one dtype -> new [T,H,V]."""
    check.sizes("mla_unabsorb", latents=(latents, "T H R"), w_uv=(w_uv, "H V R"))
    check.same_dtype("mla_unabsorb", latents=latents, w_uv=w_uv)
    return bound.mla_unabsorb(latents, w_uv)


def mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Matrix, w_uv: Matrix, queries: PagedQueries, scale: float
) -> Tensor:
    """Causal attention in expanded form -> new [T,H,V].

    Every context token's latent c and rope key k_r become, for each head, the key [W_UK c | k_r] and the value
    W_UV c; softmax(scale q k) in fp32. q [T,H,nope+P], rotated and with every other factor applied; pages
    [B,S,R+P] of its dtype, or INT8 [B,S,R+P+8]; w_uk [H,nope,R]; w_uv [H,V,R], one dtype; q may be strided. Rows
    past the last segment: zero.
    """
    names = check.sizes(
        "mla_prefill", q=(q, "T H Q"), pages=(pages, "B S *"), w_uk=(w_uk, "H nope R"), w_uv=(w_uv, "H V R")
    )
    rope = names["Q"] - names["nope"]
    check.require("mla_prefill", rope > 0, f"q {list(q.shape)} has no rope part beside w_uk {list(w_uk.shape)}")
    check.same_dtype("mla_prefill", q=q, w_uk=w_uk, w_uv=w_uv)
    check_pages("mla_prefill", names["R"] + rope, 2, q=q, pages=pages)
    _check_queries("mla_prefill", q, queries)
    return bound.mla_prefill(q, pages, w_uk, w_uv, queries, scale)


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """Causal attention in absorbed form -> new [T,H,R]: all heads share the key pages[slot] and the value
    pages[slot][:rank]; softmax(scale q k) in fp32.

    q [T,H,R+P] from mla_absorb; pages [B,S,R+P] of its dtype, or INT8 [B,S,R+P+8]; q may be strided; `rank` is R.
    Most segments have one row; any length is allowed. Rows past the last segment: zero.
    """
    names = check.sizes("mla_decode", q=(q, "T H W"), pages=(pages, "B S *"))
    check.require("mla_decode", 0 < rank <= names["W"], f"rank {rank} of q {list(q.shape)}")
    check_pages("mla_decode", names["W"], 2, q=q, pages=pages)
    _check_queries("mla_decode", q, queries)
    return bound.mla_decode(q, pages, queries, scale, rank)


def mla_values(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, w_uv: Matrix) -> Tensor:
    """mla_decode, then mla_unabsorb: q [T,H,R+P], w_uv [H,V,R] of its dtype -> new [T,H,V]."""
    names = check.sizes("mla_values", q=(q, "T H W"), pages=(pages, "B S *"), w_uv=(w_uv, "H V R"))
    check.require("mla_values", names["R"] <= names["W"], f"rank {names['R']} of q {list(q.shape)}")
    check.same_dtype("mla_values", q=q, w_uv=w_uv)
    check_pages("mla_values", names["W"], 2, q=q, pages=pages)
    _check_queries("mla_values", q, queries)
    return bound.mla_values(q, pages, queries, scale, w_uv)


def gqa_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention for few long segments -> new [T,Hq,d]. See gqa_decode."""
    _check_gqa("gqa_prefill", q, k_pages, v_pages, queries, window, sinks)
    return bound.gqa_prefill(q, k_pages, v_pages, queries, scale, window, sinks)


def gqa_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention for many short segments -> new [T,Hq,d].

    q [T,Hq,d], rotated; k_pages, v_pages [B,S,Hk,d] of its dtype, or INT8 [B,S,Hk,d+4]; q may be strided; query
    head h uses key-value head h // (Hq/Hk); softmax(scale q k) in fp32. Any segment length is allowed. Rows past
    the last segment: zero.

    window, at least 1: the row at position p sees the positions p-window+1 .. p alone. What lies before the window
    of a segment's first row is not read: those pages may be another sequence's by now, and their table entries
    arbitrary. sinks, fp32 [Hq]: a logit per query head that joins the softmax's denominator and has no value, so
    that a row's weights may sum to less than 1; it is not scaled, and -inf is none. The C++ kernels have neither
    and refuse both by name.
    Source: transformers 5.23, models/gpt_oss/modeling_gpt_oss.py, eager_attention_forward; its sliding window is
    masking_utils.sliding_window_overlay: kv_idx > q_idx - sliding_window, beside kv_idx <= q_idx.
    """
    _check_gqa("gqa_decode", q, k_pages, v_pages, queries, window, sinks)
    return bound.gqa_decode(q, k_pages, v_pages, queries, scale, window, sinks)


def _check_gqa(
    operation: str,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    names = check.sizes(operation, q=(q, "T Hq d"), k_pages=(k_pages, "B S Hk *"), v_pages=(v_pages, "B S Hk *"))
    check.require(
        operation, names["Hq"] % names["Hk"] == 0, f"{names['Hq']} query heads, {names['Hk']} shared ones"
    )
    check_pages(operation, names["d"], 1, q=q, k_pages=k_pages, v_pages=v_pages)
    _check_queries(operation, q, queries)
    check.require(operation, window is None or window >= 1, f"window {window} is not at least 1")
    if sinks is not None:
        check.require(
            operation, sinks.shape == (names["Hq"],), f"sinks {list(sinks.shape)}, q has {names['Hq']} heads"
        )
        check.dtype(operation, torch.float32, sinks=sinks)


def check_pages(operation: str, width: int, num_scales: int, /, **tensors: Tensor) -> None:
    """Check pages, all tensors but the first: `width` wide and of the first one's dtype, or FP8, or INT8."""
    first, *names = tensors
    kind = tensors[names[0]].dtype
    int8 = kind == kv_int8.PAGES_DTYPE
    wide = width + num_scales * kv_int8.SCALE_BYTES if int8 else width
    for name in names:
        pages = tensors[name]
        if int8 or kind == kv_fp8.PAGES_DTYPE:
            check.dtype(operation, kind, **{name: pages})
        else:
            check.same_dtype(operation, **{first: tensors[first], name: pages})
        check.require(operation, pages.shape[-1] == wide, f"{name} {list(pages.shape)} must be {wide} wide")


def _check_queries(operation: str, q: Tensor, queries: PagedQueries) -> None:
    """Check segments, by host values alone: a wrong length would read another sequence's memory."""
    lengths, contexts = queries.query_lengths, queries.contexts
    rows = sum(lengths)
    check.require(operation, len(lengths) == len(contexts), f"{len(lengths)} lengths, {len(contexts)} contexts")
    check.require(operation, rows <= q.shape[0], f"segments have {rows} rows, q has {q.shape[0]}")
    for length, context in zip(lengths, contexts, strict=True):
        check.require(operation, 0 <= length <= context or length == 0, f"{length} rows in a context of {context}")
