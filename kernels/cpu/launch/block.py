"""The blocks of a decoder layer in C++, and a whole model: one native call each.

What C needs of weights is laid out at the first call with them and kept as long as they live; what it needs of a
step (`abi.StepArgs`), as long as the step's tables. A call hands over a dozen numbers, however much it computes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.launch.attention import paged_args
from cierzo.kernels.cpu.tensors import as_packed, kv_format
from cierzo.kernels.derived import derived
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.block import (
    BlockWeights,
    DecoderWeights,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    PositionTables,
    StepRows,
    rope_width,
)

KINDS = (MlaWeights, GqaWeights, MlpWeights, MoeWeights)  # numbered as in abi.h


def mla_block(
    x: Tensor | None, residual: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor
) -> Tensor:
    """See ops/block.py."""
    block, out = _input(x, residual, pages)
    step = _step_of(tables, rows, pages.shape[1])
    args = abi.MlaBlockArgs(block, _layer(weights).address, step.address, pages.data_ptr())
    native.call("mla_block", args)
    return out


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
    block, out = _input(x, residual, k_pages)
    step = _step_of(tables, rows, k_pages.shape[1])
    addresses = _layer(weights).address, step.address, k_pages.data_ptr(), v_pages.data_ptr()
    native.call("gqa_block", abi.GqaBlockArgs(block, *addresses))
    return out


def mlp_block(x: Tensor | None, residual: Tensor, weights: MlpWeights) -> Tensor:
    """See ops/block.py."""
    block, out = _input(x, residual)
    native.call("mlp_block", abi.MlpBlockArgs(block, _layer(weights).address))
    return out


def moe_block(x: Tensor | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None) -> Tensor:
    """See ops/block.py."""
    block, out = _input(x, residual)
    chosen = None if expert_ids is None else expert_ids.data_ptr()
    native.call("moe_block", abi.MoeBlockArgs(block, _layer(weights).address, chosen))
    return out


def decoder(weights: DecoderWeights, rows: StepRows, tables: PositionTables, logit_rows: Tensor | None) -> Tensor:
    """See ops/block.py."""
    token_ids = rows.token_ids.contiguous()
    count = len(token_ids)
    if logit_rows is not None:
        logit_rows = logit_rows.contiguous()
        count = len(logit_rows)
    logits = torch.empty((count, weights.head.shape[0]), dtype=torch.float32)
    step = _step(tables, rows, weights.pages[0][0].shape[1])  # of use in this call alone: not kept
    args = abi.DecoderArgs(
        _model(weights).address,
        token_ids.data_ptr(),
        len(token_ids),
        step.address,
        None if logit_rows is None else logit_rows.data_ptr(),
        count,
        logits.data_ptr(),
        *_images(rows),
    )
    native.call("decoder", args)
    return logits


def _images(rows: StepRows) -> tuple[int | None, int | None, int]:
    """Addresses of the rows that images take and of their embeddings, and how many there are."""
    if rows.image_rows is None or rows.image_embeddings is None:
        return None, None, 0
    return rows.image_rows.data_ptr(), rows.image_embeddings.data_ptr(), len(rows.image_rows)


class _Struct:
    """A C struct, its address, and everything that it points to."""

    __slots__ = ("address", "kept")

    def __init__(self, struct: ctypes.Structure, *kept: object) -> None:
        self.address = ctypes.addressof(struct)
        self.kept = (struct, *kept)


@derived
def _model(weights: DecoderWeights) -> _Struct:
    blocks = (abi.LayerHalf * len(weights.blocks))()
    pages = iter(weights.pages)
    for target, block in zip(blocks, weights.blocks, strict=True):
        target.layer, target.kind = _layer(block).address, KINDS.index(type(block))
        if isinstance(block, MlaWeights | GqaWeights):
            target.pages, target.value_pages = (*(page.data_ptr() for page in next(pages)), None)[:2]
    head = as_packed(weights.head)
    struct = abi.DecoderModel(
        weights.embedding.data_ptr(),
        *weights.embedding.shape,
        ctypes.addressof(blocks),
        len(blocks),
        weights.final_norm.data_ptr(),
        head.address,
        weights.eps,
        abi.DTYPES[weights.embedding.dtype],
        kv_format(weights.pages[0][0]),
    )
    return _Struct(struct, blocks, head)


def _input(x: Tensor | None, residual: Tensor, pages: Tensor | None = None) -> tuple[abi.BlockInput, Tensor]:
    out = torch.empty_like(residual)
    tokens, hidden = residual.shape
    return abi.BlockInput(
        None if x is None else x.data_ptr(),
        residual.data_ptr(),
        out.data_ptr(),
        tokens,
        hidden,
        abi.DTYPES[residual.dtype],
        0 if pages is None else kv_format(pages),
    ), out


def _step(tables: PositionTables, rows: StepRows, block_tokens: int) -> _Struct:
    num_absorbed = len(rows.cache_slots) - rows.num_expanded
    expanded, expanded_tensors = paged_args(rows.expanded, block_tokens, rows.num_expanded)
    absorbed, absorbed_tensors = paged_args(rows.absorbed, block_tokens, num_absorbed)
    struct = abi.StepArgs(
        tables.cos.data_ptr(),
        tables.sin.data_ptr(),
        None if tables.query_scale is None else tables.query_scale.data_ptr(),
        rows.cache_slots.data_ptr(),
        rows.num_expanded,
        expanded,
        absorbed,
        None if rows.expert_ids is None else rows.expert_ids.data_ptr(),
    )
    return _Struct(struct, expanded_tensors, absorbed_tensors)


_step_of = derived(_step)


@derived
def _layer(weights: BlockWeights) -> _Struct:
    match weights:
        case MlaWeights():
            return _mla_layer(weights)
        case GqaWeights():
            return _gqa_layer(weights)
        case MlpWeights():
            gate_up, down = _gate_up_down(weights.gate_up, weights.down)
            struct = abi.MlpLayer(weights.norm.data_ptr(), gate_up.address, down.address, weights.eps)
            return _Struct(struct, gate_up, down)
        case MoeWeights():
            return _moe_layer(weights)


def _mla_layer(weights: MlaWeights) -> _Struct:
    heads, nope, rank = weights.w_uk.shape
    down, w_uk, w_uk_t, w_uv, output = (
        as_packed(matrix) for matrix in (weights.down, weights.w_uk, weights.w_uk_t, weights.w_uv, weights.output)
    )
    query_up = None if weights.query_up is None else as_packed(weights.query_up)
    struct = abi.MlaLayer(
        weights.norm.data_ptr(),
        down.address,
        None if weights.query_norm is None else weights.query_norm.data_ptr(),
        None if query_up is None else query_up.address,
        weights.kv_norm.data_ptr(),
        w_uk.address,
        w_uk_t.address,
        w_uv.address,
        output.address,
        heads,
        nope,
        rope_width(weights),
        rank,
        weights.w_uv.shape[1],
        weights.eps,
        weights.latent_eps,
        weights.scale,
        int(weights.interleaved),
    )
    return _Struct(struct, down, w_uk, w_uk_t, w_uv, output, query_up)


def _gqa_layer(weights: GqaWeights) -> _Struct:
    qkv, output = as_packed(weights.qkv), as_packed(weights.output)
    struct = abi.GqaLayer(
        weights.norm.data_ptr(),
        qkv.address,
        output.address,
        weights.query_heads,
        weights.kv_heads,
        weights.output.shape[1] // weights.query_heads,
        weights.eps,
        weights.scale,
    )
    return _Struct(struct, qkv, output)


def _moe_layer(weights: MoeWeights) -> _Struct:
    experts = _gate_up_down(weights.gate_up, weights.down)
    shared = _gate_up_down(weights.shared_gate_up, weights.shared_down)
    router = as_packed(weights.router)
    struct = abi.MoeLayer(
        weights.norm.data_ptr(),
        *(matrix.address for matrix in (router, *experts, *shared)),
        weights.top_k,
        weights.groups,
        weights.top_groups,
        weights.eps,
        weights.scale,
        int(weights.renormalise),
    )
    return _Struct(struct, router, *experts, *shared)


def _gate_up_down(gate_up: Matrix, down: Matrix) -> tuple[Any, Any]:
    return as_packed(gate_up, paired=True), as_packed(down)
