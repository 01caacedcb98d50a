"""Routing, grouping and the experts' MLPs in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import packed_for, rows
from cierzo.kernels.formats.packed import Matrix


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
    x = rows(x)
    if isinstance(weight, Tensor) and not weight.dtype == x.dtype == torch.bfloat16:
        weight = weight.float()
    packed = packed_for("route", weight)
    # the bf16 kernel rounds its activations, which is for those that are bf16 already
    exact = packed.format == "float32" or (packed.format == "bf16" and x.dtype == torch.bfloat16)
    check.require("route", exact, f"a router packed as {packed.format} would round what it meets, {x.dtype}")
    if ids is None:
        ids = torch.empty((x.shape[0], top_k), dtype=torch.int64)
    weights = torch.empty((x.shape[0], top_k), dtype=torch.float32)
    args = abi.RouteArgs(
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        packed.address,
        top_k,
        groups,
        top_groups,
        ids.data_ptr(),
        weights.data_ptr(),
        scale,
        renormalise,
        abi.DTYPES[x.dtype],
    )
    native.call("route", args)
    return ids, weights


def group_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """See ops/moe.py."""
    expert_ids = expert_ids.contiguous()
    pairs = expert_ids.numel()
    order = torch.empty(pairs, dtype=torch.int64)
    starts = torch.empty(num_experts + 1, dtype=torch.int64)
    args = abi.GroupArgs(expert_ids.data_ptr(), pairs, num_experts, order.data_ptr(), starts.data_ptr())
    native.call("group_by_expert", args)
    grouped = int(starts[num_experts])
    check.require(
        "group_by_expert", grouped == pairs, f"{pairs - grouped} expert ids are not in 0 .. {num_experts - 1}"
    )
    return order, starts


def expert_mlp(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    expert_weights: Tensor,
    order: Tensor,
    starts: Tensor,
    shared_gate_up: Matrix | None,
    shared_down: Matrix | None,
) -> Tensor:
    """See ops/moe.py."""
    x, expert_weights = rows(x), expert_weights.contiguous()
    routed = packed_for("expert_mlp", gate_up, paired=True), packed_for("expert_mlp", down)
    shared = None
    if shared_gate_up is not None and shared_down is not None:
        shared = packed_for("expert_mlp", shared_gate_up, paired=True), packed_for("expert_mlp", shared_down)
    out = torch.empty(x.shape, dtype=x.dtype)
    args = abi.ExpertMlpArgs(
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        routed[0].address,
        routed[1].address,
        None if shared is None else shared[0].address,
        None if shared is None else shared[1].address,
        expert_weights.data_ptr(),
        expert_weights.shape[1],
        order.data_ptr(),
        starts.data_ptr(),
        out.data_ptr(),
        out.shape[1],
        abi.DTYPES[x.dtype],
    )
    native.call("expert_mlp", args)
    return out
