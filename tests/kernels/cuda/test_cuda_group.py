"""Grouping by expert in CUDA C++, on the CPU: the reference's very order."""

from __future__ import annotations

import pytest
import torch

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch import moe as launcher
from cierzo.kernels.cuda.launch.moe import MOST_ALONE
from cierzo.kernels.ops import moe
from cierzo.kernels.ref import moe as ref

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("experts", [1, 4, 128, 256, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 300])
def test_groups_are_in_the_order_of_the_pairs(tokens: int, experts: int, top_k: int) -> None:
    ids = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    before = ids.clone()
    groups = moe.group_by_expert(ids, experts)
    order, starts = ref.group_by_expert(ids, experts)
    assert torch.equal(groups.order, order)
    assert torch.equal(groups.starts, starts)
    assert torch.equal(ids, before)


def test_thousands_of_tokens_and_all_on_one_expert() -> None:
    random = torch.Generator().manual_seed(0)
    skewed = torch.randint(0, 128, (5000, 4), generator=random).clamp_(min=100)
    for ids in (skewed, torch.full((5000, 4), 77), torch.full((3, 4), 127)):
        groups = moe.group_by_expert(ids, 128)
        order, starts = ref.group_by_expert(ids, 128)
        assert torch.equal(groups.order, order)
        assert torch.equal(groups.starts, starts)


@pytest.mark.parametrize(
    ("pairs", "top_k", "experts", "blocks"),
    [
        (MOST_ALONE - 4, 4, 128, 1),
        (MOST_ALONE, 4, 128, 1),
        (MOST_ALONE + 4, 4, 128, 9),  # the last has one tile, of four pairs
        (MOST_ALONE + 8, 8, 256, 9),
        (MOST_ALONE + 1, 1, 6144, 9),  # counters for a single warp
        (9999, 3, 5, 10),
        (16384 * 4, 4, 128, 64),
        (16384 * 8, 8, 256, 128),
        (16400 * 8, 8, 256, 125),  # 33 tiles to a block, which its warps do not share evenly
        (40000 * 4, 4, 4, 125),  # more than 32 tiles to a block
    ],
)
def test_large_steps_are_grouped_by_many_blocks(
    backend, pairs: int, top_k: int, experts: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda *arguments: (launched.append(arguments), run(*arguments)))
    ids = torch.randint(0, experts, (pairs // top_k, top_k), generator=torch.Generator().manual_seed(pairs))
    ids = torch.where(ids % 3 == 0, ids // 2, ids)  # unevenly
    groups = moe.group_by_expert(ids, experts)
    order, starts = ref.group_by_expert(ids, experts)
    assert torch.equal(groups.order, order)
    assert torch.equal(groups.starts, starts)
    names = ["group_by_expert"] if blocks == 1 else ["count_by_expert", "group_by_expert"]
    assert [(kernel.name, grid) for kernel, _, grid, *_ in launched] == [(name, (blocks, 1, 1)) for name in names]


def test_many_blocks_leave_out_what_is_no_expert_too() -> None:
    ids = torch.randint(0, 40, (3000, 4), generator=torch.Generator().manual_seed(3))
    inside = ids < 32
    groups = moe.group_by_expert(torch.where(inside, ids, ids * 2**40 - 2**43), 32)
    places = torch.arange(12000)[inside.flatten()]
    expected = places[ids.flatten()[places].sort(stable=True).indices]
    assert torch.equal(groups.order[: len(places)], expected)
    assert torch.equal(groups.starts, torch.cat([torch.zeros(1), ids[inside].bincount().cumsum(0)]).long())


def test_a_strided_view_is_grouped_as_its_copy() -> None:
    wide = torch.randint(0, 32, (50, 9), generator=torch.Generator().manual_seed(1))
    groups, copied = (moe.group_by_expert(ids, 32) for ids in (wide[:, 2:6], wide[:, 2:6].clone()))
    assert torch.equal(groups.order, copied.order)


def test_ids_that_are_no_experts_are_left_out() -> None:
    groups = moe.group_by_expert(torch.tensor([[3, -1], [2**40, 3], [8, 0]]), 8)
    assert groups.starts.tolist() == [0, 1, 1, 1, 3, 3, 3, 3, 3]
    assert groups.order[:3].tolist() == [5, 0, 3]


def test_more_experts_than_counters_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"group_by_expert: num_experts is 6145, must be 1 \.\. 6144"):
        moe.group_by_expert(torch.zeros(1, 1, dtype=torch.int64), 6145)


# --- routing and grouping in one launch ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "groups", "top_groups"),
    [
        (0, 16, 2, 1, 1),
        (1, 128, 4, 1, 1),
        (21, 37, 3, 1, 1),
        (9, 80, 6, 20, 3),
        (launcher.WIDE_ROWS - 1, 5, 2, 1, 1),
        (launcher.WIDE_ROWS, 5, 2, 1, 1),
    ],
)
def test_one_launch_has_the_bits_of_route_and_group(
    tokens: int, experts: int, top_k: int, groups: int, top_groups: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 44, generator=random).to(dtype)[:, :37]
    weight = torch.randn(experts, 37, generator=random)
    weight[experts // 2] = weight[0]  # ties
    x[1:2, 3], x[5:6] = torch.nan, torch.inf
    rule = {"top_k": top_k, "groups": groups, "top_groups": top_groups, "renormalise": True, "scale": 2.5}
    for router in (weight, weight.bfloat16()):
        ids, shares = moe.route(x, router, **rule)
        grouped = moe.group_by_expert(ids, experts)
        found_ids, found, together = moe.route_groups(x, router, **rule)
        assert torch.equal(found_ids, ids)
        assert torch.equal(found.view(torch.int32), shares.view(torch.int32))
        assert torch.equal(together.order, grouped.order)
        assert torch.equal(together.starts, grouped.starts)
    assert not launcher._tickets(x.device).any()  # as the next launch finds them


def test_few_rows_are_one_launch_and_experts_stand_where_they_are_wanted(
    backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda kernel, *rest: (launched.append(kernel.name), run(kernel, *rest)))
    x, weight, around = torch.ones(9, 8), torch.ones(16, 8), torch.full((3, 9, 4), -1)
    rule = {"top_k": 4, "groups": 1, "top_groups": 1, "renormalise": True, "scale": 1.0}
    ids, _, _ = moe.route_groups(x, weight, **rule, ids=around[1])
    assert launched == ["route_groups_f32_f32"]
    assert ids.data_ptr() == around[1].data_ptr()
    assert around[1].tolist() == [[0, 1, 2, 3]] * 9
    assert bool((around[[0, 2]] == -1).all())
