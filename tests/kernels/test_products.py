"""Dense products and the experts in C++: every instruction set, odd sizes, poison; a row's bits are its own."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import Near, assert_near, exact, gated_mlp, product, rounded, times, total
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.formats.definition import unpack
from cierzo.kernels.formats.packed import PackedMatrix
from cierzo.kernels.ops import linear, moe
from cierzo.kernels.pack import pack
from cierzo.kernels.registry import bind

BF16, F32 = torch.bfloat16, torch.float32
FORMATS = [("float32", F32), ("bf16", BF16), ("float32", BF16)]  # of weights, and their activations


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def rows_of(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A view with NaN on both sides of every row."""
    wide = torch.full((count, width + 5), math.nan, dtype=dtype)
    wide[:, 2 : width + 2] = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[:, 2 : width + 2]


def packed_weights(
    format: str, dtype: torch.dtype, *shape: int, paired: bool = False, seed: int = 1
) -> PackedMatrix:
    """Random, such that products of normal rows are normal."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * shape[-1] ** -0.5
    return pack(weight.to(dtype), format, dtype, paired)


def near(result: Tensor, expected: Near, dtype: torch.dtype) -> None:
    """As near as one rounding of the sum, which is in fp32, to the result's dtype leaves it."""
    assert result.dtype == dtype
    assert_near(result, rounded(expected, dtype))


def in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """A product whose partial sums are rounded to bf16."""
    sums = torch.zeros(len(x), len(weight))
    for k in range(weight.shape[1]):
        sums = (sums + x[:, k : k + 1].float() * weight[:, k].float()).bfloat16().float()
    return sums


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(2, 33, 7), (13, 40, 65), (70, 31, 130), (230, 40, 3001)])
def test_the_bound_of_a_product_is_tight(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """It holds for sums in fp32, not where a column is lost or where sums are in bf16."""
    x, weight = rows_of(rows, k, dtype), torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * k**-0.5
    weight = weight.to(dtype)
    expected = product(exact(x), weight)
    near((x.float() @ weight.float().T).to(dtype), expected, dtype)
    for wrong in (x[:, 1:].float() @ weight[:, 1:].float().T, in_bf16(x, weight)):
        with pytest.raises(AssertionError, match="times as far"):
            near(wrong.to(dtype), expected, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_bound_of_a_gated_mlp_is_tight(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    x, width = rows_of(29, 67, dtype), 64
    gate, up = (torch.randn(width, 67, generator=random).to(dtype) / 8 for _ in range(2))
    down = torch.randn(67, width, generator=random).to(dtype) / 8
    expected = gated_mlp(exact(x), torch.cat([gate, up]), down, dtype)

    def mlp(columns: slice, inner: slice) -> Tensor:
        gates, ups = (x[:, columns].float() @ part[:, columns].float().T for part in (gate, up))
        between = (torch.nn.functional.silu(gates) * ups).to(dtype).float()
        return (between[:, inner] @ down[:, inner].float().T).to(dtype)

    near(mlp(slice(None), slice(None)), expected, dtype)
    for wrong in (mlp(slice(1, None), slice(None)), mlp(slice(None), slice(1, None))):
        with pytest.raises(AssertionError, match="times as far"):
            near(wrong, expected, dtype)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(0, 5, 3), (1, 1, 1), (2, 33, 7), (13, 40, 65), (70, 31, 130), (27, 160, 64)]
)
def test_products_of_odd_sizes(
    instruction_set: str, rows: int, n: int, k: int, format: str, dtype: torch.dtype
) -> None:
    x, weight = rows_of(rows, k, dtype), packed_weights(format, dtype, n, k)
    expected = product(exact(x), unpack(weight, torch.float64))
    near(linear.lm_head(x, weight), expected, F32)
    near(linear.linear(x, weight), expected, dtype)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(0, 4, 4), (1, 1, 1), (5, 37, 23), (29, 64, 67)])
def test_gated_mlps_of_odd_sizes(
    instruction_set: str, rows: int, width: int, hidden: int, format: str, dtype: torch.dtype
) -> None:
    x = rows_of(rows, hidden, dtype)
    gate_up = packed_weights(format, dtype, 2 * width, hidden, paired=True)
    down = packed_weights(format, dtype, hidden, width, seed=2)
    near(linear.gated_mlp(x, gate_up, down), gated_mlp(exact(x), unpack(gate_up), unpack(down), dtype), dtype)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_a_row_has_its_bits_alone_and_in_any_company(instruction_set: str, format: str, dtype: torch.dtype) -> None:
    hidden, width = 131, 75
    x, weight = rows_of(71, hidden, dtype), packed_weights(format, dtype, 70, hidden)
    gate_up = packed_weights(format, dtype, 2 * width, hidden, paired=True)
    down = packed_weights(format, dtype, hidden, width, seed=2)
    native.set_threads(2)
    products, outputs = linear.lm_head(x, weight), linear.gated_mlp(x, gate_up, down)
    native.set_threads(1)
    for count in range(72):
        rows = slice(71 - count, 71) if count % 2 else slice(0, count)
        assert torch.equal(linear.lm_head(x[rows], weight), products[rows])
        assert torch.equal(linear.gated_mlp(x[rows], gate_up, down), outputs[rows])


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_a_row_that_is_not_finite_is_lost_alone(instruction_set: str, format: str, dtype: torch.dtype) -> None:
    x, weight = rows_of(30, 9, dtype), packed_weights(format, dtype, 40, 9)
    sound = linear.linear(x, weight)
    x[4, 8], x[17, 0] = math.nan, math.inf
    poisoned = linear.linear(x, weight)
    rest = [row for row in range(30) if row not in (4, 17)]
    assert torch.equal(poisoned[rest], sound[rest])
    assert poisoned[4].isnan().all()
    assert not poisoned[17].isfinite().any()


def route_of(tokens: int, experts: int, slots: int, popular: int) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, never the last two; the first slot of every third token is `popular`."""
    random = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts - 2, generator=random).argsort(1)
    ids[::3] = torch.where(ids[::3] == popular, ids[::3, :1], ids[::3])
    ids[::3, 0] = popular
    return ids[:, :slots].contiguous(), torch.rand(tokens, slots, generator=random)


class Experts:
    """Weights of odd experts, of which the last two hold NaN, and of a shared one."""

    def __init__(self, format: str, dtype: torch.dtype, hidden: int = 67, width: int = 23, count: int = 9) -> None:
        of, shared_width = (format, dtype), width + 18
        random = torch.Generator().manual_seed(3)
        gate_up = torch.randn(count, 2 * width, hidden, generator=random).to(dtype) * hidden**-0.5
        down = torch.randn(count, hidden, width, generator=random).to(dtype) * width**-0.5
        gate_up[-2:], down[-2:] = math.nan, math.nan
        self.hidden, self.count = hidden, count
        self.gate_up, self.down = pack(gate_up, *of, paired=True), pack(down, *of)
        self.shared_gate_up = packed_weights(*of, 2 * shared_width, hidden, paired=True, seed=5)
        self.shared_down = packed_weights(*of, hidden, shared_width, seed=6)

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, shared: bool) -> Tensor:
        groups = moe.group_by_expert(ids, self.count)
        others = (self.shared_gate_up, self.shared_down) if shared else ()
        return moe.expert_mlp(x, self.gate_up, self.down, weights, groups, *others)

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor, shared: bool) -> Near:
        """Each expert's outputs stay in fp32 until all are added."""
        gate_up, down = unpack(self.gate_up), unpack(self.down)
        tokens = []
        for token, chosen in enumerate(ids.tolist()):
            row = exact(x[token : token + 1])
            terms = [
                times(gated_mlp(row, gate_up[expert], down[expert], x.dtype), exact(weights[token, slot]))
                for slot, expert in enumerate(chosen)
            ]
            if shared:
                terms.append(gated_mlp(row, unpack(self.shared_gate_up), unpack(self.shared_down), x.dtype))
            tokens.append(total(*terms))
        none = torch.zeros(0, self.hidden, dtype=torch.float64)
        return Near(*(torch.cat([none, *parts]) for parts in zip(*tokens, strict=True))) if tokens else exact(none)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
@pytest.mark.parametrize("shared", [False, True])
def test_experts_of_odd_sizes(instruction_set: str, shared: bool, format: str, dtype: torch.dtype) -> None:
    experts = Experts(format, dtype)
    for tokens in (0, 1, 2, 60):
        x, (ids, weights) = rows_of(tokens, experts.hidden, dtype), route_of(tokens, experts.count, 3, popular=2)
        near(experts.run(x, ids, weights, shared), experts.expected(x, ids, weights, shared), dtype)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_a_token_has_its_bits_alone_and_in_any_company(
    instruction_set: str, format: str, dtype: torch.dtype
) -> None:
    experts = Experts(format, dtype)
    x, (ids, weights) = rows_of(70, experts.hidden, dtype), route_of(70, experts.count, 3, popular=2)
    native.set_threads(2)
    whole = experts.run(x, ids, weights, shared=True)
    x[33] = math.nan
    spoiled = experts.run(x, ids, weights, shared=True)
    assert spoiled[33].isnan().all()
    native.set_threads(1)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 5), slice(20, 33), slice(34, 70)):
        own = experts.run(x[rows], ids[rows], weights[rows], shared=True)
        assert torch.equal(own, whole[rows])
        assert torch.equal(own, spoiled[rows])


@pytest.mark.parametrize(("format", "dtype"), [("float32", F32), ("bf16", BF16)])
def test_more_rows_than_stay_in_the_cache(instruction_set: str, format: str, dtype: torch.dtype) -> None:
    tokens, hidden = 230, 3001  # blocks of about 100 rows
    x, weight = rows_of(tokens, hidden, dtype), packed_weights(format, dtype, 40, hidden)
    whole = linear.lm_head(x, weight)
    near(whole, product(exact(x), unpack(weight, torch.float64)), F32)
    experts = Experts(format, dtype, hidden, width=11, count=5)
    ids, weights = torch.tensor([[2, 0]]).expand(tokens, 2), torch.full((tokens, 2), 0.5)
    mixed = experts.run(x, ids, weights, shared=True)
    for rows in (slice(0, 1), slice(95, 97), slice(100, 230)):
        assert torch.equal(linear.lm_head(x[rows], weight), whole[rows])
        assert torch.equal(experts.run(x[rows], ids[rows], weights[rows], shared=True), mixed[rows])
    few = slice(150, 156)
    near(mixed[few], experts.expected(x[few], ids[few], weights[few], shared=True), dtype)


def test_packed_weights_in_the_wrong_order_are_refused(instruction_set: str) -> None:
    x, plain = torch.ones(2, 8), pack(torch.ones(8, 8), "float32")
    with pytest.raises(ArgumentError, match=r"gated_mlp: packed weights \[8, 8\] must be paired"):
        linear.gated_mlp(x, plain, pack(torch.ones(8, 4), "float32"))
    with pytest.raises(ArgumentError, match=r"linear: packed weights \[8, 8\] must be in plain order"):
        linear.linear(x, pack(torch.ones(8, 8), "float32", paired=True))
    groups = moe.group_by_expert(torch.zeros(2, 1, dtype=torch.int64), 1)
    with pytest.raises(ArgumentError, match="shared_gate_up without shared_down"):
        moe.expert_mlp(x, torch.ones(1, 8, 8), torch.ones(1, 8, 4), torch.ones(2, 1), groups, torch.ones(8, 8))
