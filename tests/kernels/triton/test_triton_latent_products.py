"""MLA's products with what follows them in one launch, in Triton's interpreter: the bits of two launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.formats.device import in_fp8, quantise
from cierzo.kernels.ops.terms import Summands, Terms
from cierzo.kernels.ref import latents as ref
from cierzo.kernels.triton import latent_products, latents, linear, norm, stages
from cierzo.kernels.triton.product import Weights

K, H, R, F, NOPE, EPS = 1024, 3, 32, 8, 16, 1e-5
BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tables(count: int) -> tuple[Tensor, Tensor]:
    angles = random(count, F) * 6
    return angles.cos(), angles.sin()


def rows(count: int, hostile: bool = False) -> Tensor:
    x = random(count, K).to(BF16)
    if hostile:
        x[count // 2, 5] = torch.nan
    return x


def sums_of(kind: str | None, count: int) -> Summands | None:
    """What is added to the residual."""
    if kind == "parts":
        return Terms(random(3, count, K), None, BF16)
    if kind == "experts":
        return Terms(random(count * 5, K).to(BF16), random(count, 4).abs(), BF16)
    return None if kind is None else random(count, K).to(BF16)


def test_tickets_are_zeros_between_launches() -> None:
    assert not stages.tickets(torch.device("cpu")).any()


@pytest.mark.parametrize("count", [1, 17, 64])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_absorbed_queries(interleaved: bool, scaled: bool, count: int) -> None:
    x, up, weight = (
        rows(count, hostile=count > 1),
        random(H * (NOPE + 2 * F), K).to(BF16),
        random(H, R, NOPE).to(BF16),
    )
    angles, scale = tables(count + 2), random(count + 2).abs() if scaled else None
    processors = linear.multiprocessors(x.device)
    assert latent_products._cut(Weights.of("", up), x.dtype, x.stride(0), count, processors) is not None
    for _ in range(2):
        found = latent_products.absorbed_queries(x, up, weight, *angles, interleaved, scale)
        assert not stages.tickets(x.device).any()
        wanted = latents.rotate_and_absorb(linear.linear_terms(x, up), weight, *angles, interleaved, scale)
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    near = ref.absorbed_queries(x, up, weight, *angles, interleaved, scale)
    torch.testing.assert_close(found, near, rtol=5e-2, atol=5e-1, equal_nan=True)


# Every two values of two arguments meet: any kind and quantisation, with pages and a count in turn.
CASES = [
    (kind, (BF16, torch.float8_e4m3fn)[(i + j) % 2], quantised, (1, 17, 64)[(i + j) % 3])
    for i, kind in enumerate((None, "rows", "parts", "experts"))
    for j, quantised in enumerate((None, "by row", "static"))
]


@pytest.mark.parametrize(("kind", "cached", "quantised", "count"), CASES)
def test_latents_of(kind: str | None, cached: torch.dtype, quantised: str | None, count: int) -> None:
    """With four warps for rows of 1,024 values, as the product has."""
    width = 1024
    down = random(width + R + 2 * F, K).to(BF16)
    norms, scale = (random(width).to(BF16), random(R).to(BF16)), None
    if quantised == "static":
        scale = torch.full((1,), 0.0625)
    slots = torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 3
    rest = (EPS, *tables(count), True)
    x, weight, eps = sums_of(kind, count), random(K, seed=1).to(BF16), 1e-6
    pages, wanted = (torch.full((count + 8, 1, R + 2 * F), torch.nan).to(cached) for _ in range(2))
    residual, other = (rows(count, hostile=count > 1) for _ in range(2))
    before = (x, residual, weight, eps, down)
    found = latent_products.latents_of(*before, *norms, *rest, pages, slots, quantised is not None, scale)
    assert not stages.tickets(residual.device).any()
    normed = norm.rms_norm(other, weight, eps) if x is None else norm.add_rms_norm(x, other, weight, eps)
    terms = linear.linear_terms(normed, down)
    expected = latents.norm_latents(terms, *norms, *rest, wanted, slots, quantised is not None, scale)
    assert torch.equal(residual.view(torch.int16), other.view(torch.int16))
    assert torch.equal(pages.view(torch.uint8), wanted.view(torch.uint8))
    if isinstance(found, QuantisedRows):
        assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(found.scales.view(torch.int32), expected.scales.view(torch.int32))
    else:
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("static", [None, 0.0625])
def test_both_in_fp8(static: float | None) -> None:
    """Rows that the norm quantises, and a NaN among them."""
    count, width, scale = 17, 1024, None if static is None else torch.full((1,), static)
    down = in_fp8(quantise(random(width + R + 2 * F, K), "fp8", BF16, (128, 128)), scale)
    up = in_fp8(quantise(random(H * (NOPE + 2 * F), width), "fp8", BF16, (128, 128)), scale)
    norms, weight, w_uk = (
        (random(width).to(BF16), random(R).to(BF16)),
        random(K, seed=1).to(BF16),
        random(H, R, NOPE),
    )
    slots, angles = torch.arange(count), tables(count)
    pages, wanted = (torch.zeros(count, 1, R + 2 * F, dtype=BF16) for _ in range(2))
    residual, other = (rows(count, hostile=True) for _ in range(2))
    x, rest = sums_of("experts", count), (EPS, *angles, True)
    assert x is not None
    found = latent_products.latents_of(x, residual, weight, EPS, down, *norms, *rest, pages, slots, True, scale)
    terms = linear.linear_terms(norm.add_rms_norm_fp8(x, other, weight, EPS, scale), down)
    expected = latents.norm_latents(terms, *norms, *rest, wanted, slots, True, scale)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scales.view(torch.int32), expected.scales.view(torch.int32))
    assert torch.equal(pages.view(torch.int16), wanted.view(torch.int16))
    got = latent_products.absorbed_queries(found, up, w_uk, *angles, True, None)
    ours = latents.rotate_and_absorb(linear.linear_terms(expected, up), w_uk, *angles, True, None)
    assert torch.equal(got.view(torch.int16), ours.view(torch.int16))
