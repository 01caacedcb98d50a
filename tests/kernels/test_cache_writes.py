"""Writes that norm and rotate on the way: the bits of the single operations, in the same implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import attention, norm, rope
from cierzo.kernels.registry import bind, reference

KINDS = ["torch", *(f"native-{name}" for name in native.available())]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """All operations of one implementation, so that a composition and its fused form compute alike."""
    kind, _, instruction_set = request.param.partition("-")
    if kind == "torch":
        bind(KernelsConfig(implementations=reference()), "cpu")
    else:
        native.select(instruction_set)
        native.set_threads(2)
        bind(KernelsConfig(), "cpu")
    yield request.param
    if native.available():
        native.select()
        native.set_threads(0)


def strided(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    wide = torch.full((rows, width + 3), math.nan, dtype=dtype)
    wide[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return wide[:, :width]


def tables(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, pairs, generator=torch.Generator().manual_seed(1)) * 7
    return angles.cos(), angles.sin()


def new_pages(int8: bool, dtype: torch.dtype, blocks: int, *entry: int, scales: int) -> Tensor:
    """Unwritten memory: NaN, or 255 in INT8 pages."""
    if int8:
        return torch.full((blocks, 4, *entry[:-1], entry[-1] + 4 * scales), 255, dtype=torch.uint8)
    return torch.full((blocks, 4, *entry), math.nan, dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "rank", "turned"), [(1, 10, 4), (9, 256, 64), (1400, 67, 34)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_latents_are_normed_and_keys_rotated(
    rows: int, rank: int, turned: int, interleaved: bool, dtype: torch.dtype, int8: bool
) -> None:
    kv, weight = strided(rows, rank + turned, dtype), torch.rand(rank).to(dtype) + 0.5
    before = kv.clone()
    cos, sin = tables(rows, turned // 2)
    pages, expected = (new_pages(int8, dtype, rows // 2 + 1, rank + turned, scales=2) for _ in range(2))
    slots = torch.randperm(pages.shape[0] * 4, generator=torch.Generator().manual_seed(2))[:rows]
    attention.write_normed_latents(pages, slots, kv, weight, EPS, cos, sin, interleaved)
    assert torch.equal(kv, before)
    rope_keys = kv[:, rank:].clone()
    rope.apply_rope(rope_keys[:, None], cos, sin, interleaved)
    attention.write_latents(expected, slots, norm.rms_norm(kv[:, :rank], weight, EPS), rope_keys)
    assert same(pages, expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "shared", "width"), [(1, 4, 2, 128), (400, 6, 2, 34)])
def test_queries_are_rotated_and_keys_and_values_written(
    rows: int, heads: int, shared: int, width: int, dtype: torch.dtype, int8: bool
) -> None:
    qkv = strided(rows, (heads + 2 * shared) * width, dtype)
    q, k, v = qkv.clone().unflatten(1, (-1, width)).split((heads, shared, shared), dim=1)
    cos, sin = tables(rows, width // 2)
    blocks = rows // 2 + 1
    pages = [new_pages(int8, dtype, blocks, shared, width, scales=1) for _ in range(4)]
    slots = torch.randperm(blocks * 4, generator=torch.Generator().manual_seed(2))[:rows]
    attention.rotate_and_write_keys_values(*pages[:2], slots, qkv, cos, sin, False)
    rope.apply_rope(q, cos, sin, False)
    rope.apply_rope(k, cos, sin, False)
    attention.write_keys_values(*pages[2:], slots, k, v)
    assert same(pages[0], pages[2])
    assert same(pages[1], pages[3])
    assert torch.equal(qkv[:, : heads * width], q.flatten(1))
    assert torch.equal(qkv[:, -shared * width :], v.flatten(1))


def test_a_step_without_rows_writes_nothing() -> None:
    latents, keys = torch.ones(1, 4, 14), torch.ones(1, 4, 1, 4)
    slots, table = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2)
    attention.write_normed_latents(latents, slots, torch.zeros(0, 14), torch.ones(10), EPS, table, table, True)
    attention.rotate_and_write_keys_values(keys, keys, slots, torch.zeros(0, 16), table, table, False)
    assert torch.equal(latents, torch.ones(1, 4, 14))
    assert torch.equal(keys, torch.ones(1, 4, 1, 4))


def test_misuse_is_refused() -> None:
    pages, slots, table = torch.zeros(2, 4, 14), torch.tensor([0]), torch.zeros(1, 2)
    with pytest.raises(ArgumentError, match=r"kv \[1, 13\] is not R\+P wide"):
        attention.write_normed_latents(pages, slots, torch.zeros(1, 13), torch.ones(10), EPS, table, table, True)
    with pytest.raises(ArgumentError, match=r"pages \[2, 4, 14\] must be 13 wide"):
        attention.write_normed_latents(pages, slots, torch.zeros(1, 13), torch.ones(9), EPS, table, table, True)
    keys = torch.zeros(2, 4, 2, 4)
    with pytest.raises(ArgumentError, match=r"qkv \[1, 16\] is not \(Hq\+2Hk\)d wide"):
        attention.rotate_and_write_keys_values(keys, keys.clone(), slots, torch.zeros(1, 16), table, table, True)
