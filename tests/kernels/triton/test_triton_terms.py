"""Terms that a norm adds up as it reads them, in Triton's interpreter: bit for bit their sum, then the norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.ops.terms import Terms
from cierzo.kernels.ref import norm as ref_norm
from cierzo.kernels.ref import terms as ref
from cierzo.kernels.triton import norm, terms

T, D = 5, 80
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["parts", "slots", "slots and shared"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def terms_of(kind: str, dtype: torch.dtype, tokens: int = T, largest: float = 1e7) -> Terms:
    """Terms of very different sizes, so that their order counts."""
    if kind == "parts":
        sizes = torch.tensor([1.0, largest, -largest])
        return Terms(random(3, tokens, D) * sizes[:, None, None], None, dtype)
    shared = tokens if kind.endswith("shared") else 0
    return Terms((random(tokens * 4 + shared, D) * 1e3).to(dtype), random(tokens, 4), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_the_references(kind: str, dtype: torch.dtype) -> None:
    for tokens in (T, 1, 0):
        found = terms_of(kind, dtype, tokens)
        assert found.shape == (tokens, D)
        total = terms.sum_terms(found)
        assert total.dtype == dtype
        assert torch.equal(total, ref.sum_terms(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_adds_terms_as_their_sum_would_be_added(kind: str, dtype: torch.dtype) -> None:
    # Parts as large as the residual, so that their rounding counts.
    found, weight = terms_of(kind, dtype, largest=1.0), random(D).to(dtype)
    total = ref.sum_terms(found)
    residuals = [random(T, D).to(dtype) for _ in range(4)]
    normed = norm.add_rms_norm(found, residuals[0], weight, 1e-5)
    assert torch.equal(normed, norm.add_rms_norm(total, residuals[1], weight, 1e-5))
    assert torch.equal(residuals[0], random(T, D).to(dtype) + total)
    assert torch.equal(residuals[0], residuals[1])
    for scale in (None, torch.full((1,), 0.0625)):
        codes, whole = (norm.add_rms_norm_fp8(x, residuals[2].clone(), weight, 1e-5, scale) for x in (found, total))
        assert torch.equal(codes.codes.view(torch.uint8), whole.codes.view(torch.uint8))
        assert torch.equal(codes.scales, whole.scales)
    expected = ref_norm.add_rms_norm(found, residuals[3], weight, 1e-5)
    assert torch.equal(residuals[3], residuals[0])
    torch.testing.assert_close(normed, expected, rtol=1e-2, atol=1e-5)
