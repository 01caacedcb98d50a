"""The router in CUDA C++, on the CPU: against double precision, at every size; a row's choice is its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch import moe as launcher
from cierzo.kernels.ops import moe
from cierzo.kernels.pack import pack
from cierzo.kernels.ref import moe as ref

BF16, F32 = torch.bfloat16, torch.float32

pytestmark = pytest.mark.usefixtures("backend")


def route(x: Tensor, weight: Tensor, top_k: int = 4, groups: int = 1, top_groups: int = 1) -> tuple[Tensor, Tensor]:
    settings = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
    return moe.route(x, weight, **settings, renormalise=True, scale=2.5)


def rows_and_router(rows: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(experts)
    wide = torch.full((rows, hidden + 3), math.nan, dtype=dtype)
    wide[:, :hidden] = torch.randn(rows, hidden, generator=random).to(dtype)
    return wide[:, :hidden], torch.randn(experts, hidden, generator=random) * hidden**-0.5


@pytest.mark.parametrize(("dtype", "router_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups"),
    [
        (1, 1, 1, 1),
        (4, 2, 1, 1),
        (37, 3, 1, 1),
        (128, 4, 1, 1),
        (160, 6, 20, 3),
        (256, 8, 8, 4),
        (256, 8, 128, 5),
        (24, 7, 3, 3),
    ],
)
def test_the_router_chooses_as_in_double_precision(
    experts: int, top_k: int, groups: int, top_groups: int, dtype: torch.dtype, router_dtype: torch.dtype
) -> None:
    x, weight = rows_and_router(21, experts, 67, dtype)
    weight = weight.to(router_dtype)
    ids, weights = route(x, weight, top_k, groups, top_groups)
    want_ids, want = ref.route(x.double(), weight.double(), top_k, groups, top_groups, True, 2.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights.double(), want.double(), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_is_routed_alike_alone_and_in_any_company(dtype: torch.dtype) -> None:
    x, weight = rows_and_router(61, 128, 96, dtype)
    ids, weights = route(x, weight)
    for rows in (slice(0, 1), slice(7, 8), slice(60, 61), slice(3, 29)):
        own_ids, own = route(x[rows], weight)
        assert torch.equal(own_ids, ids[rows])
        assert torch.equal(own, weights[rows])
    again = route(x.clone(), weight)  # other strides: read four values at a time
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], weights)
    columns = route(x.t().contiguous().t(), weight.t().contiguous().t())
    assert torch.equal(columns[1], weights)


@pytest.mark.parametrize(("dtype", "router_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize(("rows", "experts", "hidden"), [(1, 1, 4), (7, 3, 1), (17, 37, 260), (40, 18, 129)])
def test_wide_tiles_give_the_bits_of_narrow_ones(
    rows: int,
    experts: int,
    hidden: int,
    dtype: torch.dtype,
    router_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = rows_and_router(rows, experts, hidden, dtype)
    weight = weight.to(router_dtype)
    found = []
    for wide_from in (10**9, 1):
        monkeypatch.setattr(launcher, "WIDE_ROWS", wide_from)
        found.append(launcher._logits(x, weight))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], (x.double() @ weight.double().T).float(), rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_bits_on_both_sides_of_the_switch(backend) -> None:
    x, weight = rows_and_router(launcher.WIDE_ROWS + 9, 21, 40, BF16)
    whole = launcher._logits(x, weight)
    for rows in (launcher.WIDE_ROWS - 1, launcher.WIDE_ROWS, launcher.WIDE_ROWS + 1):
        assert torch.equal(launcher._logits(x[:rows], weight), whole[:rows])
        assert torch.equal(launcher._logits(x[-rows:], weight), whole[-rows:])


def test_every_order_of_threads_gives_the_same_bits(backend) -> None:
    x, weight = rows_and_router(13, 64, 200, BF16)
    found = []
    for seed in (0, 3, 4, 5):
        backend.seed = seed
        found.append(route(x, weight, 6, 8, 3))
    assert all(torch.equal(ids, found[0][0]) and torch.equal(weights, found[0][1]) for ids, weights in found)


def test_no_rows_and_thousands() -> None:
    x, weight = rows_and_router(2500, 16, 8, F32)
    ids, weights = route(x[:0], weight)
    assert ids.shape == weights.shape == (0, 4)
    ids, weights = route(x, weight)
    want_ids, want = ref.route(x.double(), weight.double(), 4, 1, 1, True, 2.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights.double(), want.double(), rtol=2e-5, atol=0.0)


def test_experts_are_written_where_they_are_wanted() -> None:
    x, weight = rows_and_router(5, 40, 33, BF16)
    around = torch.full((3, 5, 4), -1)
    settings = {"top_k": 4, "groups": 1, "top_groups": 1, "renormalise": True, "scale": 2.5}
    ids, weights = moe.route(x, weight, **settings, ids=around[1])
    want_ids, want = route(x, weight)
    assert ids.data_ptr() == around[1].data_ptr()
    assert torch.equal(around[1], want_ids)
    assert torch.equal(weights, want)
    assert bool((around[[0, 2]] == -1).all())


@pytest.mark.parametrize("renormalise", [False, True])
def test_probabilities_are_left_as_they_are_unless_asked(renormalise: bool) -> None:
    x, weight = rows_and_router(9, 40, 33, F32)
    _, weights = moe.route(x, weight, top_k=5, groups=1, top_groups=1, renormalise=renormalise, scale=1.0)
    _, want = ref.route(x.double(), weight.double(), 5, 1, 1, renormalise, 1.0)
    torch.testing.assert_close(weights.double(), want.double(), rtol=2e-5, atol=0.0)


def test_a_row_that_is_not_finite_is_lost_alone() -> None:
    x, weight = rows_and_router(6, 40, 33, F32)
    ids, weights = route(x, weight)
    x[1, 5], x[4, 0] = math.nan, math.inf
    poisoned_ids, poisoned = route(x, weight)
    assert poisoned.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert poisoned_ids[[1, 4]].tolist() == [[0, 1, 2, 3]] * 2
    rest = [0, 2, 3, 5]
    assert torch.equal(poisoned_ids[rest], ids[rest])
    assert torch.equal(poisoned[rest], weights[rest])


def test_ties_go_to_the_lower_expert_and_the_lower_group() -> None:
    weight = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    assert route(torch.zeros(9, 12), weight)[0].tolist() == [[0, 1, 2, 3]] * 9
    ids, weights = route(torch.zeros(9, 12), weight, 6, 16, 2)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 9
    torch.testing.assert_close(weights, torch.full((9, 6), 2.5 / 6))


def test_experts_without_a_chance_are_chosen_from_the_lowest_id() -> None:
    x, weight = torch.ones(1, 2), torch.full((20, 2), -200.0)
    weight[17] = 0
    ids, weights = route(x, weight, top_k=3)
    assert ids.tolist() == [[17, 0, 1]]  # the others' probabilities are all zero
    assert weights.tolist() == [[2.5, 0.0, 0.0]]


def test_small_probabilities_keep_their_digits() -> None:
    distances = torch.linspace(0, -103, 200)
    weight = torch.stack([distances, torch.zeros(200)], dim=1).contiguous()
    _, weights = moe.route(torch.ones(1, 2), weight, top_k=32, groups=1, top_groups=1, renormalise=False, scale=1.0)
    want = weight[:, 0].double().softmax(0)[:32]
    torch.testing.assert_close(weights[0].double(), want, rtol=1e-6, atol=0.0)
    two = torch.tensor([[0.0, 0.0], [-95.0, 0.0]])  # a subnormal probability
    _, weights = moe.route(torch.ones(1, 2), two, top_k=2, groups=1, top_groups=1, renormalise=False, scale=1.0)
    assert float(weights[0, 1]) == pytest.approx(math.exp(-95.0), abs=2e-45)


def test_what_the_kernels_cannot_take_is_named() -> None:
    x = torch.zeros(2, 64)
    with pytest.raises(ArgumentError, match="route: weight has 257 experts, at most 256"):
        route(x, torch.zeros(257, 64))
    with pytest.raises(ArgumentError, match="route: top_k is 33, at most 32"):
        route(x, torch.zeros(64, 64), top_k=33)
    with pytest.raises(ArgumentError, match=r"route: x must be float32 or bfloat16, has dtype torch\.float16"):
        route(x.half(), torch.zeros(64, 64))
    with pytest.raises(ArgumentError, match="route: weight is packed for the CPU"):
        route(x, pack(torch.zeros(8, 64), "float32"))
