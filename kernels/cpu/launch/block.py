"""The halves of a decoder layer in C++, and a whole model: one native call each.

What C needs of a layer's weights is laid out at the first call and kept in their `scratch`; what it needs of a
step, in the step's. So a call hands over a dozen numbers, however much it computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.launch.attention import paged_args
from cierzo.kernels.cpu.tensors import as_packed, kv_format
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.block import (
    DecoderWeights,
    GqaWeights,
    Half,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    StepRows,
    rope_width,
)


def mla_block(x: Tensor | None, residual: Tensor, weights: MlaWeights, rows: StepRows, pages: Tensor) -> Tensor:
    """See ops/block.py."""
    layer = weights.scratch.get("layer") or _mla_layer(weights)
    block, out = _input(x, residual, pages)
    native.call("mla_block", abi.MlaBlockArgs(block, layer.address, _step(rows, pages), pages.data_ptr()))
    return out


def gqa_block(
    x: Tensor | None, residual: Tensor, weights: GqaWeights, rows: StepRows, k_pages: Tensor, v_pages: Tensor
) -> Tensor:
    """See ops/block.py."""
    layer = weights.scratch.get("layer") or _gqa_layer(weights)
    block, out = _input(x, residual, k_pages)
    step = _step(rows, k_pages)
    native.call("gqa_block", abi.GqaBlockArgs(block, layer.address, step, k_pages.data_ptr(), v_pages.data_ptr()))
    return out


def mlp_block(x: Tensor | None, residual: Tensor, weights: MlpWeights) -> Tensor:
    """See ops/block.py."""
    layer = weights.scratch.get("layer") or _mlp_layer(weights)
    block, out = _input(x, residual)
    native.call("mlp_block", abi.MlpBlockArgs(block, layer.address))
    return out


def moe_block(x: Tensor | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None) -> Tensor:
    """See ops/block.py."""
    layer = weights.scratch.get("layer") or _moe_layer(weights)
    block, out = _input(x, residual)
    chosen = None if expert_ids is None else expert_ids.data_ptr()
    native.call("moe_block", abi.MoeBlockArgs(block, layer.address, chosen))
    return out


def decoder(token_ids: Tensor, weights: DecoderWeights, rows: StepRows, logit_rows: Tensor | None) -> Tensor:
    """See ops/block.py."""
    model = weights.scratch.get("layer") or _decoder_model(weights)
    token_ids = token_ids.contiguous()
    count = len(token_ids)
    if logit_rows is not None:
        logit_rows = logit_rows.contiguous()
        count = len(logit_rows)
    logits = torch.empty((count, weights.head.shape[0]), dtype=torch.float32)
    args = abi.DecoderArgs(
        model.address,
        token_ids.data_ptr(),
        len(token_ids),
        _step(rows, weights.halves[0].pages[0]),
        None if logit_rows is None else logit_rows.data_ptr(),
        count,
        logits.data_ptr(),
    )
    native.call("decoder", args)
    return logits


def _decoder_model(weights: DecoderWeights) -> _Layer:
    halves = (abi.LayerHalf * len(weights.halves))(*(_half(half) for half in weights.halves))
    head = as_packed(weights.head)
    struct = abi.DecoderModel(
        weights.embedding.data_ptr(),
        *weights.embedding.shape,
        ctypes.addressof(halves),
        len(halves),
        weights.final_norm.data_ptr(),
        head.address,
        weights.eps,
        abi.DTYPES[weights.embedding.dtype],
        kv_format(weights.halves[0].pages[0]),
    )
    return _keep(weights, struct, halves, head)


def _half(half: Half) -> abi.LayerHalf:
    weights = half.weights
    kind, make = _KINDS[type(weights)]
    layer = weights.scratch.get("layer") or make(weights)
    pages = [page.data_ptr() for page in half.pages] + [None, None]
    return abi.LayerHalf(layer.address, pages[0], pages[1], kind)


class _Layer:
    """A C struct, and everything that it points to."""

    __slots__ = ("address", "kept")

    def __init__(self, struct: ctypes.Structure, *kept: object) -> None:
        self.address = ctypes.addressof(struct)
        self.kept = (struct, *kept)


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


def _step(rows: StepRows, pages: Tensor) -> int:
    """Address of the step's C struct; the same in every layer."""
    step = rows.scratch.get("step")
    if step is None:
        block_tokens = pages.shape[1]
        struct = abi.StepArgs(
            rows.cos.data_ptr(),
            rows.sin.data_ptr(),
            None if rows.query_scale is None else rows.query_scale.data_ptr(),
            rows.cache_slots.data_ptr(),
            rows.num_expanded,
            paged_args(rows.expanded, block_tokens, rows.num_expanded),
            paged_args(rows.absorbed, block_tokens, len(rows.cache_slots) - rows.num_expanded),
            None if rows.expert_ids is None else rows.expert_ids.data_ptr(),
        )
        step = rows.scratch["step"] = _Layer(struct)
    return step.address


def _mla_layer(weights: MlaWeights) -> _Layer:
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
    return _keep(weights, struct, down, w_uk, w_uk_t, w_uv, output, query_up)


def _gqa_layer(weights: GqaWeights) -> _Layer:
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
    return _keep(weights, struct, qkv, output)


def _mlp_layer(weights: MlpWeights) -> _Layer:
    gate_up, down = _gate_up_down(weights.gate_up, weights.down)
    struct = abi.MlpLayer(weights.norm.data_ptr(), gate_up.address, down.address, weights.eps)
    return _keep(weights, struct, gate_up, down)


def _moe_layer(weights: MoeWeights) -> _Layer:
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
    return _keep(weights, struct, router, *experts, *shared)


def _gate_up_down(gate_up: Matrix, down: Matrix) -> tuple[Any, Any]:
    return as_packed(gate_up, paired=True), as_packed(down)


def _keep(weights: Any, struct: ctypes.Structure, *matrices: object) -> _Layer:
    layer = weights.scratch["layer"] = _Layer(struct, *matrices)
    return layer


_KINDS: dict[type, tuple[int, Callable[[Any], _Layer]]] = {  # as in abi.h
    MlaWeights: (0, _mla_layer),
    GqaWeights: (1, _gqa_layer),
    MlpWeights: (2, _mlp_layer),
    MoeWeights: (3, _moe_layer),
}
