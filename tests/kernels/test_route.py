"""The router and the grouping in C++: every instruction set, odd sizes, poison; a row's choice is its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import moe
from cierzo.kernels.pack import pack
from cierzo.kernels.ref import moe as ref
from cierzo.kernels.registry import bind

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def route(x: Tensor, weight: Matrix, top_k: int = 4, groups: int = 1, top_groups: int = 1) -> tuple[Tensor, Tensor]:
    settings = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
    return moe.route(x, weight, **settings, renormalise=True, scale=2.5)


def rows_and_router(rows: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(experts)
    wide = torch.full((rows, hidden + 3), math.nan, dtype=dtype)
    wide[:, :hidden] = torch.randn(rows, hidden, generator=random).to(dtype)
    return wide[:, :hidden], torch.randn(experts, hidden, generator=random) * hidden**-0.5


@pytest.mark.parametrize(("dtype", "router_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups"), [(1, 1, 1, 1), (37, 3, 1, 1), (128, 4, 1, 1), (160, 6, 20, 3)]
)
def test_the_router_chooses_as_in_double_precision(
    instruction_set: str,
    experts: int,
    top_k: int,
    groups: int,
    top_groups: int,
    dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> None:
    x, weight = rows_and_router(21, experts, 67, dtype)
    weight = weight.to(router_dtype)
    ids, weights = route(x, weight, top_k, groups, top_groups)
    want_ids, want = ref.route(x.double(), weight.double(), top_k, groups, top_groups, True, 2.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights.double(), want.double(), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_is_routed_alike_alone_and_in_any_company(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = rows_and_router(61, 128, 96, dtype)
    packed = pack(weight, "bf16" if dtype == BF16 else "float32")
    native.set_threads(2)
    ids, weights = route(x, packed)
    native.set_threads(1)
    for rows in (slice(0, 1), slice(7, 8), slice(60, 61), slice(3, 29)):
        own_ids, own = route(x[rows], packed)
        assert torch.equal(own_ids, ids[rows])
        assert torch.equal(own, weights[rows])
    plain_ids, plain = route(x, weight.to(dtype))  # packed for this call
    assert torch.equal(plain_ids, ids)
    assert torch.equal(plain, weights)


def test_a_row_that_is_not_finite_is_lost_alone(instruction_set: str) -> None:
    x, weight = rows_and_router(6, 40, 33, F32)
    ids, weights = route(x, weight)
    x[1, 5], x[4, 0] = math.nan, math.inf
    poisoned_ids, poisoned = route(x, weight)
    assert poisoned.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert poisoned_ids[[1, 4]].tolist() == [[0, 1, 2, 3]] * 2
    rest = [0, 2, 3, 5]
    assert torch.equal(poisoned_ids[rest], ids[rest])
    assert torch.equal(poisoned[rest], weights[rest])


def test_experts_without_a_chance_are_chosen_from_the_lowest_id(instruction_set: str) -> None:
    x, weight = torch.ones(1, 2), torch.full((20, 2), -200.0)
    weight[17] = 0
    ids, weights = route(x, weight, top_k=3)
    assert ids.tolist() == [[17, 0, 1]]  # the others' probabilities are all zero
    assert weights.tolist() == [[2.5, 0.0, 0.0]]


def test_groups_are_in_the_order_of_the_pairs(instruction_set: str) -> None:
    random = torch.Generator().manual_seed(0)
    for tokens, experts in ((0, 5), (1, 1), (300, 128), (50, 1000)):
        ids = torch.randint(0, experts, (tokens, 4), generator=random)
        groups = moe.group_by_expert(ids, experts)
        order, starts = ref.group_by_expert(ids, experts)
        assert torch.equal(groups.order, order)
        assert torch.equal(groups.starts, starts)


def test_an_id_that_is_no_experts_is_refused(instruction_set: str) -> None:
    for wrong in (8, -1, 2**40):
        with pytest.raises(ArgumentError, match=r"group_by_expert: 1 expert ids are not in 0 \.\. 7"):
            moe.group_by_expert(torch.tensor([[3, wrong]]), 8)


def test_a_router_that_would_round_is_refused(instruction_set: str) -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(8, 64)
    with pytest.raises(ArgumentError, match="route: a router packed as bf16 would round"):
        route(x, pack(weight, "bf16"))
    with pytest.raises(ArgumentError, match="route: a router packed as int8 would round"):
        route(x.bfloat16(), pack(weight.bfloat16(), "int8"))
