"""Rotations and cache writes in Triton, against the reference, bit for bit where nothing is summed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import kv_fp8
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.ref import rope as ref_rope
from cierzo.kernels.triton import cache_write, norm, rope

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
ROWS = 9


def strided(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A view of rows that start at multiples of 16 bytes, NaN behind each."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.full((*shape[:-1], shape[-1] + 8), math.nan, dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(shape, generator=random).to(dtype)
    return wide[..., : shape[-1]]


def tables(pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(ROWS, pairs, generator=torch.Generator().manual_seed(1)) * 7
    return angles.cos(), angles.sin()


def new_pages(kind: torch.dtype, *entry: int) -> Tensor:
    """Unwritten memory: NaN."""
    return torch.full((5, 4, *entry), math.nan).to(kind)


def slots() -> Tensor:
    return torch.randperm(20, generator=torch.Generator().manual_seed(2))[:ROWS]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def kinds(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return dtype, kv_fp8.PAGES_DTYPE


def test_tables_are_rounded_once_at_any_position() -> None:
    """The angle is an fp32 product; its sine is right to the last bit, and does not depend on the rows beside."""
    random = torch.Generator().manual_seed(2)
    positions = torch.cat((torch.tensor([0, 1, 262_143]), torch.randint(0, 262_144, (60,), generator=random)))
    for pairs, magnitude in ((32, 1.0), (3, 1.25)):
        inv_freq = torch.rand(pairs, generator=random)
        inv_freq[0] = 1
        angles = (positions.float()[:, None] * inv_freq).double()
        cos, sin = rope.rope_tables(positions, inv_freq, magnitude)
        assert torch.equal(cos, angles.cos().float() * magnitude)
        assert torch.equal(sin, angles.sin().float() * magnitude)
        alone = rope.rope_tables(positions[7:8].clone(), inv_freq, magnitude)
        assert torch.equal(alone[0], cos[7:8])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "width", "turned"), [(1, 6, 6), (3, 11, 6), (2, 128, 64), (20, 90, 70)])
def test_rotations_have_the_bits_of_the_reference(
    heads: int, width: int, turned: int, interleaved: bool, dtype: torch.dtype, scaled: bool
) -> None:
    x = strided(ROWS, heads, width, dtype=dtype)
    expected, base = x.clone(), x._base
    assert base is not None
    around = base.isnan().sum()
    scale = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) + 0.9 if scaled else None
    ref_rope.apply_rope(expected, *tables(turned // 2), interleaved, scale)
    one, row = x[4:5].clone(), slice(4, 5)
    cos, sin = tables(turned // 2)
    rope.apply_rope(
        one, cos[row].clone(), sin[row].clone(), interleaved, None if scale is None else scale[row].clone()
    )
    assert torch.equal(one[0], expected[4])
    rope.apply_rope(x, cos, sin, interleaved, scale)
    assert torch.equal(x, expected)
    assert base.isnan().sum() == around


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "turned"), [(8, 4), (256, 64), (67, 34)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_latents_are_normed_and_keys_rotated(rank: int, turned: int, interleaved: bool, dtype: torch.dtype) -> None:
    kv, weight = strided(ROWS, rank + turned, dtype=dtype), torch.rand(rank).to(dtype) + 0.5
    before = kv.clone()
    cos, sin = tables(turned // 2)
    rope_keys = kv[:, rank:].clone()
    rope.apply_rope(rope_keys[:, None], cos, sin, interleaved, None)
    latents = norm.rms_norm(kv[:, :rank], weight, EPS)
    for kind in kinds(dtype):
        pages, composed, expected = (new_pages(kind, rank + turned) for _ in range(3))
        cache_write.write_normed_latents(pages, slots(), kv, weight, EPS, cos, sin, interleaved)
        assert torch.equal(kv, before)
        cache_write.write_latents(composed, slots(), latents, rope_keys)
        assert same(pages, composed)
        ref.write_latents(expected, slots(), latents, rope_keys)
        assert same(pages, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 2, 128), (6, 3, 34)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_are_rotated_and_keys_and_values_written(
    heads: int, shared: int, width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    cos, sin = tables(width // 2)
    for kind in kinds(dtype):
        qkv = strided(ROWS, (heads + 2 * shared) * width, dtype=dtype)
        other = qkv.clone()
        pages = [new_pages(kind, shared, width) for _ in range(4)]
        cache_write.rotate_and_write_keys_values(pages[0], pages[1], slots(), qkv, cos, sin, interleaved)
        ref.rotate_and_write_keys_values(pages[2], pages[3], slots(), other, cos, sin, interleaved)
        assert same(pages[0], pages[2])
        assert same(pages[1], pages[3])
        assert torch.equal(qkv[:, : heads * width], other[:, : heads * width])
        assert torch.equal(qkv[:, -shared * width :], other[:, -shared * width :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_or_too_large_is_written_as_the_reference_does(dtype: torch.dtype) -> None:
    heads, width = 3, 24
    values = strided(ROWS, heads * width, dtype=dtype)
    values[1] = 0
    values[2] *= 1e-4
    values[3] *= 1e30
    values[4, 5], values[5, 0], values[6, 7] = math.nan, math.inf, -math.inf
    values[7] = torch.arange(heads * width) - 36.5  # ties
    values[8] = torch.linspace(440, 480, heads * width)
    keys = values.unflatten(1, (heads, width))
    for kind in kinds(dtype):
        pages = [new_pages(kind, heads, width) for _ in range(4)]
        cache_write.write_keys_values(pages[0], pages[1], slots(), keys, keys)
        ref.write_keys_values(pages[2], pages[3], slots(), keys, keys)
        assert torch.equal(pages[0].float().nan_to_num(7e7), pages[2].float().nan_to_num(7e7))
        assert torch.equal(pages[1].float().nan_to_num(7e7), pages[3].float().nan_to_num(7e7))


def test_a_step_without_rows_writes_nothing() -> None:
    latents, keys = torch.ones(1, 4, 14), torch.ones(1, 4, 1, 4)
    none, table = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2)
    cache_write.write_normed_latents(latents, none, torch.zeros(0, 14), torch.ones(10), EPS, table, table, True)
    cache_write.rotate_and_write_keys_values(keys, keys, none, torch.zeros(0, 16), table, table, False)
    cache_write.write_latents(latents, none, torch.zeros(0, 10), torch.zeros(0, 4))
    rope.apply_rope(torch.zeros(0, 2, 4), table, table, True, None)
    assert torch.equal(latents, torch.ones(1, 4, 14))
    assert torch.equal(keys, torch.ones(1, 4, 1, 4))


def test_int8_pages_are_refused_by_name() -> None:
    pages = torch.zeros(1, 4, 22, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"write_latents: pages has dtype torch.uint8; on a GPU pages are "):
        cache_write.write_latents(pages, torch.tensor([0]), torch.zeros(1, 10), torch.zeros(1, 4))
