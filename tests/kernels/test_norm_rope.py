"""Norms and rotations in C++: every instruction set, odd sizes, strides; a row's bits are its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import norm, rope
from cierzo.kernels.ref import norm as ref_norm
from cierzo.kernels.ref import rope as ref_rope
from cierzo.kernels.registry import bind

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # bf16: a rounding that goes the other way


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def strided(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A view of rows, NaN between them."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, width + 5), math.nan, dtype=dtype)
    wide[:, 3 : width + 3] = torch.randn(rows, width, generator=random).to(dtype)
    return wide[:, 3 : width + 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37, 64, 129, 1000])
def test_norms_are_the_references(instruction_set: str, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = strided(7, width, dtype), strided(7, width, dtype, 1), strided(1, width, dtype, 2)[0]
    expected = ref_norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    before = residual.clone()
    got = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, before + x)
    expected = ref_norm.rms_norm(before + x, weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_normed_alike_alone_and_in_any_company(instruction_set: str, dtype: torch.dtype) -> None:
    x, weight = strided(300, 515, dtype), strided(1, 515, dtype, 1)[0]  # more rows than one thread takes alone
    native.set_threads(2)
    together = norm.rms_norm(x, weight, 1e-6)
    native.set_threads(1)
    assert torch.equal(norm.rms_norm(x, weight, 1e-6), together)
    for row in (0, 3, 4, 150, 299):
        assert torch.equal(norm.rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


def test_a_row_is_rounded_before_it_meets_the_weight(instruction_set: str) -> None:
    """transformers' order: in bf16 1 / sqrt(1.9) is 0.7265625, times 1.5 is 1.09375; in one go it is 1.0859375."""
    x, weight = torch.ones(1, 80).bfloat16(), torch.full((80,), 1.5).bfloat16()
    assert norm.rms_norm(x, weight, 0.9).tolist() == [[1.09375] * 80]


def test_a_residual_too_large_for_its_square_and_a_row_of_zeros(instruction_set: str) -> None:
    x, weight = torch.zeros(2, 40), torch.ones(40)
    x[0] = 1e25
    assert norm.rms_norm(x, weight, 1e-6).tolist() == [[0.0] * 40] * 2  # as torch: 1 / sqrt(inf)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("heads", "width", "turned"), [(1, 6, 6), (3, 11, 6), (2, 128, 64), (2, 90, 70), (70, 68, 64)]
)
def test_rotations_have_the_bits_of_the_reference(
    instruction_set: str, heads: int, width: int, turned: int, interleaved: bool, dtype: torch.dtype, scaled: bool
) -> None:
    rows = 29
    x = strided(rows, heads * width, dtype).unflatten(1, (heads, width))
    random = torch.Generator().manual_seed(1)
    angles = torch.rand(rows, turned // 2, generator=random) * 9
    scale = torch.rand(rows, generator=random) + 0.9 if scaled else None
    expected, base = x.clone(), x._base
    assert base is not None
    around = base.isnan().sum()
    ref_rope.apply_rope(expected, angles.cos(), angles.sin(), interleaved, scale)
    for row in (0, 28):  # alone
        one, own = x[row : row + 1].clone(), slice(row, row + 1)
        tables = angles[own].cos(), angles[own].sin()
        rope.apply_rope(one, *tables, interleaved, None if scale is None else scale[own])
        assert torch.equal(one[0], expected[row])
    native.set_threads(2)
    rope.apply_rope(x, angles.cos(), angles.sin(), interleaved, scale)
    assert torch.equal(x, expected)
    assert base.isnan().sum() == around


def test_the_tables_of_a_position_do_not_depend_on_where_it_stands() -> None:
    """torch's cos and sin have a vector body and a tail, which might differ."""
    random = torch.Generator().manual_seed(2)
    positions = torch.randint(0, 262_144, (1500,), generator=random)
    for pairs in (32, 3, 17):
        inv_freq = torch.rand(pairs, generator=random)
        together = rope.rope_tables(positions, inv_freq, 1.25)
        for start, end in ((0, 1), (7, 8), (1499, 1500), (3, 40), (700, 1499)):
            alone = rope.rope_tables(positions[start:end], inv_freq, 1.25)
            assert all(torch.equal(a, b[start:end]) for a, b in zip(alone, together, strict=True))


def test_misuse_is_refused() -> None:
    x, table = torch.zeros(2, 3, 8), torch.zeros(2, 4)
    with pytest.raises(ArgumentError, match="contiguous"):
        rope.apply_rope(x.transpose(1, 2), table[:, :1], table[:, :1], True)
    with pytest.raises(ArgumentError, match=r"x \[2, 3, 6\], cos"):
        rope.apply_rope(x[..., :6], table, table, True)
    with pytest.raises(ArgumentError, match=r"scale \[T\] needs T = 2"):
        rope.apply_rope(x, table, table, True, torch.zeros(3))
