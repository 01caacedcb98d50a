"""Mixture of experts. Letters: T tokens, D hidden width, E experts, K experts per token, F expert width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.registry import bound


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The T*K (token, slot) pairs, sorted by expert.

    order: int64 [T*K]; order[i] = token * K + slot of the i-th sorted pair; within an expert, ascending.
    starts: int64 [E+1]; expert e has the sorted pairs starts[e] .. starts[e+1]-1.
    """

    order: Tensor
    starts: Tensor


def route(
    x: Tensor,
    weight: Matrix,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each token's K experts and their weights -> (int64 [T,K], fp32 [T,K]), best expert first.

    p = softmax(x weight^T) over all E experts, in fp32. With `groups` > 1 the experts stand in that many equal
    groups; only the `top_groups` with the greatest sum of their two best p compete. The K greatest p win; their
    weights are p, divided by their sum if `renormalise`, times `scale`. Ties, among groups and among experts,
    go to the lower id. x [T,D]; weight [E,D] in any float dtype: products and sums are fp32, so that bf16 weights
    beside a bf16 x lose nothing. A row with a NaN gets some K experts, and NaN as their weights. ids: contiguous
    int64 [T,K], written and given back; None: new.
    Source: transformers' Mistral4TopkRouter, which computes in the model's dtype and leaves ties open.
    """
    _check_route("route", x, weight, top_k, groups, top_groups, ids)
    return bound.route(x, weight, top_k, groups, top_groups, renormalise, scale, ids)


def route_groups(
    x: Tensor,
    weight: Matrix,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, ExpertGroups]:
    """route, and group_by_expert of its choice -> (int64 [T,K], fp32 [T,K], groups)."""
    _check_route("route_groups", x, weight, top_k, groups, top_groups, ids)
    found = bound.route_groups(x, weight, top_k, groups, top_groups, renormalise, scale, ids)
    return found[0], found[1], ExpertGroups(*found[2:])


def _check_route(
    operation: str, x: Tensor, weight: Matrix, top_k: int, groups: int, top_groups: int, ids: Tensor | None
) -> None:
    check.sizes(operation, x=(x, "T D"), weight=(weight, "E D"))
    experts = weight.shape[0]
    check.require(operation, experts % groups == 0, f"{experts} experts in {groups} equal groups")
    check.require(operation, 1 <= top_groups <= groups, f"top_groups {top_groups} of {groups} groups")
    check.require(
        operation, groups == top_groups or experts >= 2 * groups, "a group needs two experts to be ranked"
    )
    eligible = experts // groups * top_groups
    check.require(operation, 1 <= top_k <= eligible, f"top_k {top_k} of {eligible} eligible experts")
    if ids is not None:
        check_expert_ids(operation, ids, x.shape[0], top_k)


def check_expert_ids(operation: str, expert_ids: Tensor, *shape: int) -> None:
    """Refuse a place for chosen experts that is not contiguous int64 of this shape."""
    if expert_ids.shape != shape or expert_ids.dtype != torch.int64 or not expert_ids.is_contiguous():
        found = f"{list(expert_ids.shape)} {expert_ids.dtype}, strides {list(expert_ids.stride())}"
        check.require(operation, False, f"expert ids must be contiguous int64 {list(shape)}, are {found}")


def group_by_expert(expert_ids: Tensor, num_experts: int) -> ExpertGroups:
    """Sort the pairs of expert_ids int64 [T,K] by expert, keeping the order of tokens. Ids are in [0, E)."""
    check.sizes("group_by_expert", expert_ids=(expert_ids, "T K"))
    check.dtype("group_by_expert", torch.int64, expert_ids=expert_ids)
    return ExpertGroups(*bound.group_by_expert(expert_ids, num_experts))


def expert_mlp(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    groups: ExpertGroups,
    shared_gate_up: Matrix | None = None,
    shared_down: Matrix | None = None,
) -> Tensor:
    """sum over a token's slots of weight * MLP of that slot's expert, plus the shared expert's MLP -> new [T,D].

    x [T,D]; gate_up [E,2F,D], the first F rows the gate; down [E,D,F]; weights fp32 [T,K]; groups from
    group_by_expert. shared_gate_up [2S,D] and shared_down [D,S], or neither: an expert of every token, of weight 1.
    One dtype, but for weights; packed gate_ups are `paired`; activations in FP8 as in linear.py, by each expert's
    scale. MLPs as in linear.gated_mlp, whose outputs may be rounded to that dtype before the sum; the sum is fp32,
    slot by slot in order, the shared expert last.
    One pass over the experts that have tokens: the others' weights are not read and may hold anything.
    Intermediates may exceed fp16's range. T may be 0.
    """
    _check_experts("expert_mlp", x, gate_up, down, weights, shared_gate_up, shared_down)
    return bound.expert_mlp(x, gate_up, down, weights, groups.order, groups.starts, shared_gate_up, shared_down)


def expert_terms(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    groups: ExpertGroups,
    shared_gate_up: Matrix | None = None,
    shared_down: Matrix | None = None,
) -> Summands:
    """expert_mlp, or its terms, the outputs of each token's experts: for the norm that adds them up next."""
    _check_experts("expert_terms", x, gate_up, down, weights, shared_gate_up, shared_down)
    return bound.expert_terms(x, gate_up, down, weights, groups.order, groups.starts, shared_gate_up, shared_down)


def _check_experts(
    operation: str,
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    weights: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> None:
    names = check.sizes(
        operation, x=(x, "T D"), gate_up=(gate_up, "E G D"), down=(down, "E D F"), weights=(weights, "T K")
    )
    check.require(operation, names["G"] == 2 * names["F"], f"gate_up {list(gate_up.shape)} is not [E,2F,D]")
    check.same_dtype(operation, x=x, gate_up=gate_up, down=down)
    check.dtype(operation, torch.float32, weights=weights)
    if shared_gate_up is not None:
        _check_shared(operation, x, shared_gate_up, shared_down)


def _check_shared(operation: str, x: Tensor, gate_up: Matrix, down: Matrix | None) -> None:
    check.require(operation, down is not None, "shared_gate_up without shared_down")
    names = check.sizes(operation, x=(x, "T D"), shared_gate_up=(gate_up, "G D"), shared_down=(down, "D S"))
    shape = list(gate_up.shape)
    check.require(operation, names["G"] == 2 * names["S"], f"shared_gate_up {shape} is not [2S,D]")
    check.same_dtype(operation, x=x, shared_gate_up=gate_up, shared_down=down)
