"""Products with quantised weights, in every instruction set, against their formula in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.formats.definition import unpack
from cierzo.kernels.formats.int8 import rotate
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, PACKED_FORMATS
from cierzo.kernels.formats.packed import PackedMatrix, view_packed
from cierzo.kernels.ops import linear, moe
from cierzo.kernels.pack import pack
from cierzo.kernels.registry import bind

QUANTISED = ["int8", "int4", "nvfp4"]
ROW_GROUP = {"int8": 64, "int4": 32, "nvfp4": 32}
# Relative to the largest output. Products within a group of k are integers, which add up without rounding. Each of
# at most 7 groups meets two scales, a minimum and the other groups' sum: four roundings in fp32. The MLP's two
# products have 5 groups, and 8 roundings lie between them.
TOLERANCE = 28 * 2.0**-24


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A view with NaN on both sides of every row."""
    wide = torch.full((count, width + 5), math.nan, dtype=dtype)
    wide[:, 2 : width + 2] = normal(count, width, seed=seed, dtype=dtype)
    return wide[:, 2 : width + 2]


def quantised(x: Tensor, format: str) -> Tensor:
    """What the kernels make of activations [T,k], k padded to whole groups: 8 bits of the largest in each."""
    size = ROW_GROUP[format]
    groups = pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    groups = rotate(groups) if format == "int8" else groups
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(largest > 0, 127 / largest, 0.0)).round()
    values = codes.double() * (largest / 127).double()
    return (rotate(values) if format == "int8" else values).flatten(1)


def values(weight: PackedMatrix) -> Tensor:
    """Of k in whole groups: int8's rotation spreads rounding errors into the padding."""
    *outer, k = weight.shape
    shape = (*outer, k + -k % ROW_GROUP[weight.format])
    return unpack(view_packed(weight.format, shape, weight.dtype, weight.paired, weight.data), torch.float64)


def product(x: Tensor, weight: PackedMatrix) -> Tensor:
    return quantised(x, weight.format) @ values(weight).T


def mlp(x: Tensor, gate_up: Tensor, down: Tensor, format: str) -> Tensor:
    gate, up = (quantised(x, format) @ gate_up.T).chunk(2, -1)
    return quantised(silu(gate) * up, format) @ down.T


def close(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == torch.float32
    bound = TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=0.0, atol=bound)


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_odd_sizes(instruction_set: str, dtype: torch.dtype, format: str) -> None:
    """As the formula says, but for the rounding of sums: also where rows or weights are zero, tiny or large."""
    for rows, n, k in ((0, 3, 4), (1, 1, 1), (2, 33, 15), (3, 40, 64), (9, 31, 97), (17, 70, 200), (25, 32, 48)):
        x, weight = rows_of(rows, k, dtype), normal(n, k, seed=1)
        x[: rows // 3] *= 1e30
        x[rows // 3 : rows // 2] *= 1e-30
        x[rows // 2 : rows // 2 + 1] = 0
        x[rows // 2 + 1 :, k // 2 :] *= 1e-3
        weight[::3] *= 1e-3
        packed = pack(weight, format, dtype)
        result = linear.lm_head(x, packed)
        expected = product(x, packed)
        size = expected.abs().amax(-1, keepdim=True).clamp_min(1e-38) if rows else 1
        torch.testing.assert_close(result / size, expected / size, rtol=0, atol=TOLERANCE, check_dtype=False)


@pytest.mark.parametrize("format", QUANTISED)
def test_gated_mlps(instruction_set: str, format: str) -> None:
    x = rows_of(11, 75)
    gate_up, down = pack(normal(74, 75, seed=1) / 8, format, paired=True), pack(normal(75, 37, seed=2), format)
    close(linear.gated_mlp(x, gate_up, down), mlp(x, values(gate_up), values(down), format))


@pytest.mark.parametrize("format", QUANTISED)
def test_experts(instruction_set: str, format: str) -> None:
    """The last expert has no token: its bytes are not read."""
    x, ids = rows_of(9, 75), torch.tensor([[0, 2], [2, 1], [0, 1]] * 3)
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(3))
    gate_up, down = (
        pack(normal(4, 74, 75, seed=1) / 8, format, paired=True),
        pack(normal(4, 75, 37, seed=2), format),
    )
    wide_gate_up, wide_down = values(gate_up), values(down)
    for matrix in (gate_up, down):
        matrix.data[3 * len(matrix.data) // 4 :] = 0xFF
    shared = pack(normal(20, 75, seed=4) / 8, format, paired=True), pack(normal(75, 10, seed=5), format)
    expected = mlp(x, *(values(matrix) for matrix in shared), format)
    for slot in range(2):
        for token, expert in enumerate(ids[:, slot].tolist()):
            one = mlp(x[token : token + 1], wide_gate_up[expert], wide_down[expert], format)
            expected[token] += weights[token, slot] * one[0]
    close(moe.expert_mlp(x, gate_up, down, weights, moe.group_by_expert(ids, 4), *shared), expected)


@pytest.mark.parametrize("format", QUANTISED)
def test_a_row_has_its_bits_alone_and_in_any_company(instruction_set: str, format: str) -> None:
    x, weight = rows_of(41, 150), pack(normal(70, 150, seed=1), format)
    native.set_threads(2)
    whole = linear.lm_head(x, weight)
    native.set_threads(1)
    for count in range(42):
        rows = slice(41 - count, 41) if count % 2 else slice(0, count)
        assert torch.equal(linear.lm_head(x[rows], weight), whole[rows])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", QUANTISED)
def test_a_row_that_is_not_finite_is_nan_alone(instruction_set: str, format: str, bad: float) -> None:
    x, weight = rows_of(30, 70), pack(normal(40, 70, seed=1), format)
    sound = linear.linear(x, weight)
    x[4, 69], x[17, 0] = bad, bad
    poisoned = linear.linear(x, weight)
    rest = [row for row in range(30) if row not in (4, 17)]
    assert torch.equal(poisoned[rest], sound[rest])
    assert poisoned[[4, 17]].isnan().all()


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_errors_of_products_are_within_the_stated_bounds(instruction_set: str, format: str) -> None:
    x, weight = normal(64, 1024), normal(64, 1024, seed=1)
    packed = pack(weight, format)
    result = linear.lm_head(x, packed).double()

    def error(expected: Tensor) -> float:
        return ((result - expected).square().mean() / expected.square().mean()).sqrt().item()

    of_rows, of_weights = PACKED_FORMATS[format].row_error, NUMBER_FORMATS[format].weight_error
    assert error(x.double() @ unpack(packed, torch.float64).T) <= of_rows + 1e-6
    assert error(x.double() @ weight.double().T) <= math.hypot(of_rows, of_weights) * 1.05 + 1e-6
