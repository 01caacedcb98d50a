"""Mixture of experts in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.formats.activations import takes_fp8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Terms
from cierzo.kernels.ref.linear import gated_mlp


def route(
    x: Tensor,
    weight: Matrix,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops/moe.py."""
    scores = functional.linear(x.float(), as_tensor(weight).float()).softmax(-1)
    eligible = scores if groups == top_groups else _mask_groups(scores, groups, top_groups)
    weights, chosen = _largest(eligible, top_k)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen if ids is None else ids.copy_(chosen), weights * scale if scale != 1.0 else weights


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
    ids, weights = route(x, weight, top_k, groups, top_groups, renormalise, scale, ids)
    return ids, weights, *group_by_expert(ids, weight.shape[0])


def _mask_groups(scores: Tensor, groups: int, top_groups: int) -> Tensor:
    """-1, less than any probability, for every expert outside its row's best groups."""
    grouped = scores.unflatten(-1, (groups, -1))
    _, best = _largest(grouped.topk(2, dim=-1).values.sum(-1), top_groups)
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    return grouped.masked_fill(outside[..., None], -1.0).flatten(-2)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Like topk, but ties go to the lower index: torch's topk leaves them open."""
    ordered, indices = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], indices[..., :count]


def group_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """See ops/moe.py."""
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=expert_ids.device))
    return order, starts


def expert_mlp(
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
    by_slot = _by_slot(x, gate_up, down, weights, order, starts)
    slots, by_slot = weights.shape[1], by_slot.view(-1, weights.shape[1], x.shape[1])
    total = by_slot[:, 0].float() * weights[:, :1]
    for slot in range(1, slots):
        total.addcmul_(by_slot[:, slot].float(), weights[:, slot : slot + 1])
    if shared_gate_up is not None and shared_down is not None:
        total += gated_mlp(x, shared_gate_up, shared_down)
    return total.to(x.dtype)


def expert_terms(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> Terms:
    """See ops/moe.py."""
    values = [_by_slot(x, gate_up, down, weights, order, starts)]
    if shared_gate_up is not None and shared_down is not None:
        values.append(gated_mlp(x, shared_gate_up, shared_down))
    return Terms(torch.cat(values), weights, x.dtype)


def _by_slot(x: Tensor, gate_up: Matrix, down: Matrix, weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Outputs of the experts of every pair of a token and a slot, [T*K,D]."""
    rows = x[order // weights.shape[1]]
    outputs = _each_expert(rows, _by_expert(gate_up), _by_expert(down), starts.tolist())
    by_slot = torch.empty_like(outputs)
    by_slot[order] = outputs
    return by_slot


def _by_expert(matrix: Matrix) -> Tensor | DeviceMatrix:
    """Return the function that gives an expert's matrix by its number."""
    return matrix if isinstance(matrix, DeviceMatrix) and takes_fp8(matrix) else as_tensor(matrix)


def _each_expert(
    rows: Tensor, gate_up: Tensor | DeviceMatrix, down: Tensor | DeviceMatrix, bounds: list[int]
) -> Tensor:
    """Rows bounds[e] .. bounds[e+1]-1 through expert e's MLP."""
    outputs = torch.empty_like(rows)
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            outputs[start:end] = gated_mlp(rows[start:end], gate_up[expert], down[expert])
    return outputs
