"""Routing, grouping and the experts' grouped pass, against loops over tokens in fp64."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_near, exact, gated_mlp, rounded, times, total
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import moe
from cierzo.kernels.registry import bind, implementations

D, E, F = 12, 8, 6


def use(operation: str, name: str) -> None:
    bind(KernelsConfig(implementations={operation: name}), "cpu")


def choices(operation: str) -> list[str]:
    return [row.name for row in implementations(operation, "cpu")]


def expected_route(x: Tensor, weight: Tensor, top_k: int, groups: int, top_groups: int) -> tuple[list[int], Tensor]:
    """One token, by sorting (-p, id) pairs: the lower id wins a tie."""
    p = (weight.double() @ x.double()).softmax(-1).float().tolist()
    size = len(p) // groups
    ranked = sorted(range(groups), key=lambda g: (-sum(sorted(p[g * size : (g + 1) * size])[-2:]), g))
    eligible = [e for e in range(len(p)) if e // size in ranked[:top_groups]]
    ids = sorted(eligible, key=lambda e: (-p[e], e))[:top_k]
    return ids, torch.tensor([p[e] for e in ids])


@pytest.mark.parametrize("implementation", choices("route"))
@pytest.mark.parametrize(("top_k", "groups", "top_groups"), [(1, 1, 1), (3, 1, 1), (3, 4, 2), (4, 2, 1), (8, 2, 2)])
def test_route(implementation: str, top_k: int, groups: int, top_groups: int) -> None:
    use("route", implementation)
    random = torch.Generator().manual_seed(top_k)
    x = torch.randn(17, D + 3, generator=random)[:, :D]
    weight = torch.randn(E, D, generator=random)
    for renormalise in (False, True):
        ids, weights = moe.route(
            x, weight, top_k=top_k, groups=groups, top_groups=top_groups, renormalise=renormalise, scale=1.5
        )
        assert weights.dtype == torch.float32
        for token in range(17):
            want_ids, want = expected_route(x[token], weight, top_k, groups, top_groups)
            assert ids[token].tolist() == want_ids
            want = want / want.sum() if renormalise else want
            torch.testing.assert_close(weights[token], want * 1.5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", choices("route"))
def test_ties_go_to_the_lower_expert(implementation: str) -> None:
    use("route", implementation)
    settings = {"renormalise": True, "scale": 1.0}
    ids, weights = moe.route(torch.zeros(70, D), torch.randn(E, D), top_k=3, groups=1, top_groups=1, **settings)
    assert ids.tolist() == [[0, 1, 2]] * 70
    torch.testing.assert_close(weights, torch.full((70, 3), 1 / 3))
    ids, _ = moe.route(torch.zeros(70, D), torch.randn(E, D), top_k=3, groups=4, top_groups=2, **settings)
    assert ids.tolist() == [[0, 1, 2]] * 70


@pytest.mark.parametrize("implementation", choices("route"))
def test_experts_are_written_where_they_are_wanted(implementation: str) -> None:
    use("route", implementation)
    x, weight = torch.randn(5, D, generator=torch.Generator().manual_seed(1)), torch.eye(E, D)
    settings = {"top_k": 3, "groups": 1, "top_groups": 1, "renormalise": True, "scale": 1.0}
    around = torch.full((3, 5, 3), -1)
    ids, weights = moe.route(x, weight, **settings, ids=around[1])
    want_ids, want = moe.route(x, weight, **settings)
    assert ids.data_ptr() == around[1].data_ptr()
    assert torch.equal(around[1], want_ids)
    assert torch.equal(weights, want)
    assert bool((around[[0, 2]] == -1).all())
    for wrong in (
        torch.zeros(5, 4).long(),
        torch.zeros(4, 3).long(),
        torch.zeros(5, 3),
        torch.zeros(3, 5).long().T,
    ):
        with pytest.raises(ArgumentError, match=r"route: expert ids must be contiguous int64 \[5, 3\]"):
            moe.route(x, weight, **settings, ids=wrong)


@pytest.mark.parametrize("implementation", choices("group_by_expert"))
def test_grouping_is_stable(implementation: str) -> None:
    use("group_by_expert", implementation)
    ids = torch.tensor([[5, 0], [0, 7], [5, 3], [0, 5]])
    groups = moe.group_by_expert(ids, E)
    assert groups.order.tolist() == [1, 2, 6, 5, 0, 4, 7, 3]
    assert groups.starts.tolist() == [0, 3, 3, 3, 4, 4, 7, 7, 8]
    assert moe.group_by_expert(ids[:0], E).starts.tolist() == [0] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("implementation", choices("expert_mlp"))
def test_expert_mlp(implementation: str, tokens: int, dtype: torch.dtype) -> None:
    use("expert_mlp", implementation)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D + 5, generator=random).to(dtype)[:, 2 : D + 2]
    gate_up, down = (torch.randn(E, *s, generator=random).to(dtype) for s in ((2 * F, D), (D, F)))
    ids = torch.stack(
        [torch.randperm(E - 2, generator=random)[:3] for _ in range(tokens)] or [torch.zeros(3)]
    ).long()
    ids = ids[:tokens]
    weights = torch.rand(tokens, 3, generator=random)
    in_torch, expected = implementation == "torch", []
    for token in range(tokens):
        terms = []
        for slot, expert in enumerate(ids[token]):
            row = exact(x[token : token + 1])
            output = gated_mlp(row, gate_up[expert], down[expert], dtype, each=in_torch)
            output = rounded(output, dtype) if in_torch else output
            terms.append(times(output, exact(weights[token, slot])))
        expected.append(rounded(total(*terms), dtype))
    gate_up[E - 2 :], down[E - 2 :] = float("nan"), float("nan")  # chosen by no token
    groups = moe.group_by_expert(ids, E)
    result = moe.expert_mlp(x, gate_up, down, weights, groups)
    assert result.dtype == dtype
    assert torch.equal(result, moe.expert_mlp(x, gate_up, down, weights, groups))
    for token, near in enumerate(expected):
        assert_near(result[token : token + 1], near)


def test_misuse_is_refused() -> None:
    bind(KernelsConfig(), "cpu")
    x, weight = torch.zeros(2, D), torch.zeros(E, D)
    rest = {"renormalise": True, "scale": 1.0}
    with pytest.raises(ArgumentError, match="8 experts in 3 equal groups"):
        moe.route(x, weight, top_k=1, groups=3, top_groups=1, **rest)
    with pytest.raises(ArgumentError, match="top_k 5 of 4 eligible experts"):
        moe.route(x, weight, top_k=5, groups=2, top_groups=1, **rest)
    with pytest.raises(ArgumentError, match="two experts"):
        moe.route(x, weight, top_k=1, groups=8, top_groups=2, **rest)
    groups = moe.group_by_expert(torch.zeros(2, 1, dtype=torch.int64), E)
    with pytest.raises(ArgumentError, match=r"gate_up \[8, 13, 12\] is not \[E,2F,D\]"):
        moe.expert_mlp(x, torch.zeros(E, 13, D), torch.zeros(E, D, F), torch.zeros(2, 1), groups)
