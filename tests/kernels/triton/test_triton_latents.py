"""MLA's norms, rotations, cache entries and absorbed queries in two launches, in Triton's interpreter: bit for bit
what the operations give that they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.ops.terms import Summands, Terms
from cierzo.kernels.ref import latents as ref
from cierzo.kernels.ref import terms as ref_terms
from cierzo.kernels.triton import cache_write, latents, norm, rope

T, H, EPS = 5, 3, 1e-5
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(48, 32, 8, 16), (40, 24, 6, 24)]  # Q, R, F, nope; then none that is a power of two


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows(width: int, dtype: torch.dtype, terms: bool) -> Summands:
    return Terms(random(3, T, width), None, dtype) if terms else random(T, width).to(dtype)


def tables(pairs: int, count: int = T) -> tuple[Tensor, Tensor]:
    angles = random(count, pairs) * 6
    return angles.cos(), angles.sin()


def pages_of(width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((4, 4, width), torch.nan).to(dtype)


SLOTS = torch.tensor([3, 0, 9, 14, 5])


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "cached"), [(DTYPES[0], DTYPES[0]), (DTYPES[1],) * 2, (DTYPES[1], torch.float8_e4m3fn)]
)
def test_norm_latents(
    sizes: tuple[int, ...], dtype: torch.dtype, cached: torch.dtype, interleaved: bool, terms: bool
) -> None:
    width, rank, pairs, _ = sizes
    x = rows(width + rank + 2 * pairs, dtype, terms)
    whole = x if isinstance(x, Tensor) else ref_terms.sum_terms(x)
    weights = random(width).to(dtype), random(rank).to(dtype)
    pages, wanted, theirs = (pages_of(rank + 2 * pairs, cached) for _ in range(3))
    angles = tables(pairs)
    for scale in (None, torch.full((1,), 0.0625)):
        for quantised in (False, True):
            found = latents.norm_latents(x, *weights, EPS, *angles, interleaved, pages, SLOTS, quantised, scale)
            aligned = whole[:, :width].clone()
            if quantised:
                expected = norm.rms_norm_fp8(aligned, weights[0], EPS, scale)
                assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
                assert torch.equal(found.scales, expected.scales)
            else:
                assert torch.equal(found, norm.rms_norm(aligned, weights[0], EPS))
    kv = whole[:, width:].clone()
    cache_write.write_normed_latents(wanted, SLOTS, kv, weights[1], EPS, *angles, interleaved)
    assert torch.equal(pages.view(torch.uint8), wanted.view(torch.uint8))
    near = ref.norm_latents(x, *weights, EPS, *angles, interleaved, theirs, SLOTS, False, None)
    torch.testing.assert_close(
        latents.norm_latents(x, *weights, EPS, *angles, interleaved, pages, SLOTS, False, None),
        near,
        rtol=1e-2,
        atol=1e-5,
    )


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_and_absorb(
    sizes: tuple[int, ...], dtype: torch.dtype, interleaved: bool, scaled: bool, terms: bool
) -> None:
    _, rank, pairs, nope = sizes
    q, weight = rows(H * (nope + 2 * pairs), dtype, terms), random(H, rank, nope).to(dtype)
    angles = tables(pairs, T + 2)
    scale = random(T + 2).abs() if scaled else None
    found = latents.rotate_and_absorb(q, weight, *angles, interleaved, scale)
    whole = (q if isinstance(q, Tensor) else ref_terms.sum_terms(q)).clone()
    heads = whole.view(T, H, -1)
    own = [table[2:].clone() for table in angles]
    rope.apply_rope(heads, *own, interleaved, None if scale is None else scale[2:].clone())
    assert torch.equal(found[..., rank:], heads[..., nope:])
    expected = torch.einsum("thn,hrn->thr", heads[..., :nope].double(), weight.double())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[..., :rank].double(), expected, rtol=tolerance, atol=tolerance)
    near = ref.rotate_and_absorb(rows(H * (nope + 2 * pairs), dtype, terms), weight, *angles, interleaved, scale)
    torch.testing.assert_close(found, near, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_in_company_and_as_terms(dtype: torch.dtype) -> None:
    count, (_, rank, pairs, nope) = 40, SIZES[0]
    q, weight = random(count, H * (nope + 2 * pairs)).to(dtype), random(H, rank, nope).to(dtype)
    angles, scale = tables(pairs, count), random(count).abs()
    together = latents.rotate_and_absorb(q, weight, *angles, True, scale)
    as_terms = latents.rotate_and_absorb(Terms(q.float()[None], None, dtype), weight, *angles, True, scale)
    assert torch.equal(together, as_terms)
    for row in (0, 16, count - 1):
        alone = [table[: row + 1] for table in (*angles, scale)]
        found = latents.rotate_and_absorb(q[row : row + 1].clone(), weight, *alone[:2], True, alone[2])
        assert torch.equal(found[0], together[row])


def test_no_rows_and_weights_that_are_packed() -> None:
    weight = torch.zeros(H, 16, 16)
    angles = torch.zeros(0, 4), torch.zeros(0, 4)
    assert latents.rotate_and_absorb(torch.zeros(0, H * 24), weight, *angles, True, None).shape == (0, H, 24)
    with pytest.raises(ArgumentError, match="w_uk_t is packed; on a GPU it must be a tensor"):
        latents.rotate_and_absorb(torch.zeros(0, H * 24), object(), *angles, True, None)  # type: ignore[arg-type]
