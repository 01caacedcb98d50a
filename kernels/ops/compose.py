"""The blocks of ops/block.py composed of single operations, each in the implementation that is bound; and, for a
CPU, operations that a GPU's kernels compute in fewer launches, composed of those that make them up.

On a GPU this is the forward pass; on a CPU the C++ kernels compute each block in one call instead. What a
composition does between the operations, it does to each row alone, so that it is as exact as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import attention, block, latents, linear, moe, norm, rope
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import (
    DecoderWeights,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    PositionTables,
    StepRows,
    query_width,
)
from cierzo.kernels.ops.terms import Summands, summed


def mla_block(
    x: Summands | None, residual: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor
) -> Summands:
    """See ops/block.py."""
    cos, sin, eps, interleaved = tables.cos, tables.sin, weights.latent_eps, weights.interleaved
    if weights.query_up is None or weights.query_norm is None:
        normed = _normed_for(weights.down, x, residual, weights.norm, weights.eps)
        q, kv = linear.linear(normed, weights.down).tensor_split((query_width(weights),), dim=-1)
        attention.write_normed_latents(pages, rows.cache_slots, kv, weights.kv_norm, eps, cos, sin, interleaved)
    else:
        normed = _latents(x, residual, weights, rows, tables, pages)
        if not rows.num_expanded:
            up, tail = weights.query_up, (tables.cos, tables.sin, weights.interleaved, tables.query_scale)
            wide = latents.absorbed_queries(normed, up, weights.w_uk_t, *tail)
            mixed = attention.mla_values(wide, pages, rows.absorbed, weights.scale, weights.w_uv)
            return linear.linear_terms(mixed.flatten(1), weights.output)
        q = linear.linear(normed, weights.query_up)
    return linear.linear_terms(_attend(q, weights, rows, tables, pages).flatten(1), weights.output)


def _latents(
    x: Summands | None, residual: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor
) -> Rows:
    """The queries' latents after their norm, as the one matrix that reads them takes them."""
    assert weights.query_up is not None
    assert weights.query_norm is not None
    return latents.latents_of(
        x,
        residual,
        weights.norm,
        weights.eps,
        weights.down,
        weights.query_norm,
        weights.kv_norm,
        weights.latent_eps,
        tables.cos,
        tables.sin,
        weights.interleaved,
        pages,
        rows.cache_slots,
        quantised=takes_fp8(weights.query_up),
        scale=static_scales(weights.query_up),
    )


def _attend(q: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor) -> Tensor:
    """q [T,H(nope+P)], not rotated, -> [T,H,V], each row in its own form."""
    count, scale = rows.num_expanded, tables.query_scale
    results = []
    if count:
        expanded = q[:count].unflatten(1, (weights.w_uk.shape[0], -1))
        scales = None if scale is None else scale[:count]
        rope.apply_rope(expanded, tables.cos[:count], tables.sin[:count], weights.interleaved, scales)
        results.append(
            attention.mla_prefill(expanded, pages, weights.w_uk, weights.w_uv, rows.expanded, weights.scale)
        )
        q = q[count:]
    if q.shape[0]:
        wide = latents.rotate_and_absorb(
            q, weights.w_uk_t, tables.cos, tables.sin, weights.interleaved, tables.query_scale
        )
        results.append(attention.mla_values(wide, pages, rows.absorbed, weights.scale, weights.w_uv))
    return results[0] if len(results) == 1 else torch.cat(results)


def gqa_block(
    x: Summands | None,
    residual: Tensor,
    weights: GqaWeights,
    rows: StepRows,
    tables: PositionTables,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Summands:
    """See ops/block.py."""
    heads = (weights.query_heads, weights.kv_heads, weights.kv_heads)
    qkv = linear.linear(_normed_for(weights.qkv, x, residual, weights.norm, weights.eps), weights.qkv)
    attention.rotate_and_write_keys_values(
        k_pages, v_pages, rows.cache_slots, qkv, tables.cos, tables.sin, interleaved=False
    )
    q = qkv.unflatten(1, (sum(heads), -1))[:, : weights.query_heads]
    if tables.query_scale is not None:
        q.mul_(tables.query_scale[:, None, None])  # in fp32, rounded once, as apply_rope does it
    expanded, absorbed = q[: rows.num_expanded], q[rows.num_expanded :]
    results = []
    if len(expanded):
        results.append(attention.gqa_prefill(expanded, k_pages, v_pages, rows.expanded, weights.scale))
    if len(absorbed):
        results.append(attention.gqa_decode(absorbed, k_pages, v_pages, rows.absorbed, weights.scale))
    attended = results[0] if len(results) == 1 else torch.cat(results)
    return linear.linear_terms(attended.flatten(1), weights.output)


def mlp_block(x: Summands | None, residual: Tensor, weights: MlpWeights) -> Summands:
    """See ops/block.py."""
    normed = _normed_for(weights.gate_up, x, residual, weights.norm, weights.eps)
    return linear.gated_mlp(normed, weights.gate_up, weights.down)


def moe_block(
    x: Summands | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None
) -> Summands:
    """See ops/block.py."""
    normed = _normed(x, residual, weights.norm, weights.eps)
    _, shares, groups = moe.route_groups(
        normed,
        weights.router,
        top_k=weights.top_k,
        groups=weights.groups,
        top_groups=weights.top_groups,
        renormalise=weights.renormalise,
        scale=weights.scale,
        ids=expert_ids,
    )
    shared = (weights.shared_gate_up, weights.shared_down)
    return moe.expert_terms(normed, weights.gate_up, weights.down, shares, groups, *shared)


def linear_terms(x: Rows, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    return linear.linear(x, weight)


def expert_terms(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> Tensor:
    """See ops/moe.py."""
    groups = moe.ExpertGroups(order, starts)
    return moe.expert_mlp(x, gate_up, down, weights, groups, shared_gate_up, shared_down)


def route_groups(
    x: Tensor,
    weight: Matrix,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops/moe.py."""
    settings = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
    ids, weights = moe.route(x, weight, **settings, renormalise=renormalise, scale=scale, ids=ids)
    grouped = moe.group_by_expert(ids, weight.shape[0])
    return ids, weights, grouped.order, grouped.starts


def norm_latents(
    x: Tensor,
    query_norm: Tensor,
    kv_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    pages: Tensor,
    slots: Tensor,
    quantised: bool,
    scale: Tensor | None,
) -> Rows:
    """See ops/latents.py."""
    q, kv = x.tensor_split((query_norm.shape[0],), dim=-1)
    attention.write_normed_latents(pages, slots, kv, kv_norm, eps, cos, sin, interleaved)
    return norm.rms_norm_fp8(q, query_norm, eps, scale) if quantised else norm.rms_norm(q, query_norm, eps)


def rotate_and_absorb(
    q: Tensor, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/latents.py."""
    heads, first = q.unflatten(1, (w_uk_t.shape[0], -1)), len(cos) - len(q)
    rope.apply_rope(heads, cos[first:], sin[first:], interleaved, None if scale is None else scale[first:])
    return attention.mla_absorb(heads, w_uk_t)


def latents_of(
    x: Summands | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    down: Matrix,
    query_norm: Tensor,
    kv_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    pages: Tensor,
    slots: Tensor,
    quantised: bool,
    scale: Tensor | None,
) -> Rows:
    """See ops/latents.py."""
    rest = (query_norm, kv_norm, eps, cos, sin, interleaved, pages, slots)
    x = linear.linear_terms(_normed_for(down, x, residual, norm_weight, norm_eps), down)
    return latents.norm_latents(x, *rest, quantised=quantised, scale=scale)


def absorbed_queries(
    x: Rows, query_up: Matrix, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/latents.py."""
    return latents.rotate_and_absorb(linear.linear_terms(x, query_up), w_uk_t, cos, sin, interleaved, scale)


def mla_values(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    mixed = attention.mla_decode(q, pages, queries, scale, w_uv.shape[2])
    return attention.mla_unabsorb(mixed, w_uv)


def decoder(
    weights: DecoderWeights,
    rows: StepRows,
    tables: PositionTables,
    logit_rows: Tensor | None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See ops/block.py. With several ranks, `all_reduce` adds up what their blocks give, and the logits are this
    rank's columns."""
    x, residual = layers(weights, rows, tables, all_reduce)
    return head(weights, x, residual, logit_rows)


def layers(
    weights: DecoderWeights,
    rows: StepRows,
    tables: PositionTables,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Summands, Tensor]:
    """Run a decoder up to its head: the last block's result, and the residual stream before it. What ranks exchange
    is each block's sum of its own terms."""
    residual = functional.embedding(rows.token_ids, weights.embedding)
    if rows.image_rows is not None and rows.image_embeddings is not None:
        residual[rows.image_rows] = rows.image_embeddings
    x: Summands | None = None
    pages = iter(weights.pages)
    expert_ids = iter(() if rows.expert_ids is None else rows.expert_ids)
    for layer in weights.blocks:
        match layer:
            case MlaWeights():
                x = block.mla_block(x, residual, layer, rows, tables, *next(pages))
            case GqaWeights():
                x = block.gqa_block(x, residual, layer, rows, tables, *next(pages))
            case MlpWeights():
                x = block.mlp_block(x, residual, layer)
            case MoeWeights():
                x = block.moe_block(x, residual, layer, next(expert_ids, None))
        x = x if all_reduce is None else all_reduce(summed(x))
    assert x is not None, "a model has layers"
    return x, residual


def head(weights: DecoderWeights, x: Summands, residual: Tensor, logit_rows: Tensor | None) -> Tensor:
    """Logits of some rows, None: of all; x and residual are what `layers` gave, and stay as they are unless all
    rows are asked for."""
    if logit_rows is not None:
        x, residual = summed(x)[logit_rows], residual[logit_rows]
    return linear.lm_head(norm.add_rms_norm(x, residual, weights.final_norm, weights.eps), weights.head)


def _normed(x: Summands | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(residual, weight, eps) if x is None else norm.add_rms_norm(x, residual, weight, eps)


def _normed_for(matrix: Matrix, x: Summands | None, residual: Tensor, weight: Tensor, eps: float) -> Rows:
    """The norm, as the one matrix that reads it takes it. What the router reads, and each expert by a scale of its
    own, stays in the model's dtype."""
    if not takes_fp8(matrix):
        return _normed(x, residual, weight, eps)
    scale = static_scales(matrix)
    if x is None:
        return norm.rms_norm_fp8(residual, weight, eps, scale)
    return norm.add_rms_norm_fp8(x, residual, weight, eps, scale)
