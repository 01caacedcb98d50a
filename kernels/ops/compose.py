"""The blocks of ops/block.py composed of single operations, each in the implementation that is bound.

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
from cierzo.kernels.ops import attention, block, linear, moe, norm, rope
from cierzo.kernels.ops.block import (
    DecoderWeights,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    PositionTables,
    StepRows,
    query_width,
    rope_width,
)


def mla_block(
    x: Tensor | None, residual: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor
) -> Tensor:
    """See ops/block.py."""
    heads, nope, _ = weights.w_uk.shape
    width, rope_dims = query_width(weights), rope_width(weights)
    down = linear.linear(_normed_for(weights.down, x, residual, weights.norm, weights.eps), weights.down)
    q, kv = down.tensor_split((width,), dim=-1)
    if weights.query_up is not None and weights.query_norm is not None:
        normed = _normed_for(weights.query_up, None, q, weights.query_norm, weights.latent_eps)
        q = linear.linear(normed, weights.query_up)
    q = q.reshape(q.shape[0], heads, nope + rope_dims)
    cos, sin, interleaved = tables.cos, tables.sin, weights.interleaved
    rope.apply_rope(q, cos, sin, interleaved, tables.query_scale)
    latent = weights.kv_norm, weights.latent_eps
    attention.write_normed_latents(pages, rows.cache_slots, kv, *latent, cos, sin, interleaved)
    return linear.linear(_attend(q, weights, rows, pages).flatten(1), weights.output)


def _attend(q: Tensor, weights: MlaWeights, rows: StepRows, pages: Tensor) -> Tensor:
    """q [T,H,nope+P] -> [T,H,V], each row in its own form."""
    expanded, absorbed = q[: rows.num_expanded], q[rows.num_expanded :]
    results = []
    if len(expanded):
        results.append(
            attention.mla_prefill(expanded, pages, weights.w_uk, weights.w_uv, rows.expanded, weights.scale)
        )
    if len(absorbed):
        wide = attention.mla_absorb(absorbed, weights.w_uk_t)
        mixed = attention.mla_decode(wide, pages, rows.absorbed, weights.scale, weights.w_uk.shape[2])
        results.append(attention.mla_unabsorb(mixed, weights.w_uv))
    return results[0] if len(results) == 1 else torch.cat(results)


def gqa_block(
    x: Tensor | None,
    residual: Tensor,
    weights: GqaWeights,
    rows: StepRows,
    tables: PositionTables,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
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
    return linear.linear(attended.flatten(1), weights.output)


def mlp_block(x: Tensor | None, residual: Tensor, weights: MlpWeights) -> Tensor:
    """See ops/block.py."""
    normed = _normed_for(weights.gate_up, x, residual, weights.norm, weights.eps)
    return linear.gated_mlp(normed, weights.gate_up, weights.down)


def moe_block(x: Tensor | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None) -> Tensor:
    """See ops/block.py."""
    normed = _normed(x, residual, weights.norm, weights.eps)
    ids, shares = moe.route(
        normed,
        weights.router,
        top_k=weights.top_k,
        groups=weights.groups,
        top_groups=weights.top_groups,
        renormalise=weights.renormalise,
        scale=weights.scale,
        ids=expert_ids,
    )
    groups = moe.group_by_expert(ids, weights.router.shape[0])
    shared = (weights.shared_gate_up, weights.shared_down)
    return moe.expert_mlp(normed, weights.gate_up, weights.down, shares, groups, *shared)


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
) -> tuple[Tensor, Tensor]:
    """Run a decoder up to its head: the last block's result, and the residual stream before it."""
    residual = functional.embedding(rows.token_ids, weights.embedding)
    if rows.image_rows is not None and rows.image_embeddings is not None:
        residual[rows.image_rows] = rows.image_embeddings
    x: Tensor | None = None
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
        x = x if all_reduce is None else all_reduce(x)
    assert x is not None, "a model has layers"
    return x, residual


def head(weights: DecoderWeights, x: Tensor, residual: Tensor, logit_rows: Tensor | None) -> Tensor:
    """Logits of some rows, None: of all; x and residual are what `layers` gave, and stay as they are unless all
    rows are asked for."""
    if logit_rows is not None:
        x, residual = x[logit_rows], residual[logit_rows]
    return linear.lm_head(norm.add_rms_norm(x, residual, weights.final_norm, weights.eps), weights.head)


def _normed(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(residual, weight, eps) if x is None else norm.add_rms_norm(x, residual, weight, eps)


def _normed_for(matrix: Matrix, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Rows:
    """The norm, as the one matrix that reads it takes it. What the router reads, and each expert by a scale of its
    own, stays in the model's dtype."""
    if not takes_fp8(matrix):
        return _normed(x, residual, weight, eps)
    scale = static_scales(matrix)
    if x is None:
        return norm.rms_norm_fp8(residual, weight, eps, scale)
    return norm.add_rms_norm_fp8(x, residual, weight, eps, scale)
