"""Norms in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.ref import norm as ref
from cierzo.kernels.triton import norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # bf16: a rounding that goes the other way


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 37, 64, 320])
def test_norms_are_the_references(width: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(width)
    wide = torch.randn(5, 512, generator=random).to(dtype)  # rows start at multiples of 16 bytes
    x, weight = wide[:, :width], torch.randn(width, generator=random).to(dtype)
    residual = torch.randn(5, width, generator=random).to(dtype)
    expected = ref.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    before = residual.clone()
    got = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, before + x)
    expected = ref.rms_norm(before + x, weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=1e-6)
    for row in range(5):
        assert torch.equal(norm.rms_norm(x[row : row + 1], weight, 1e-5)[0], norm.rms_norm(x, weight, 1e-5)[row])


def test_no_rows_and_a_row_that_is_not_aligned() -> None:
    weight = torch.ones(8)
    assert norm.rms_norm(torch.empty(0, 8), weight, 1e-5).shape == (0, 8)
    with pytest.raises(ArgumentError, match="rms_norm: x_ptr starts 4 bytes past a multiple of 16"):
        norm.rms_norm(torch.empty(2, 12)[:, 1:9], weight, 1e-5)
