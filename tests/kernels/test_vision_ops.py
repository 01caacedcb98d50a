"""Attention of an image's patches, and GELU: every implementation and instruction set against formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import vision
from cierzo.kernels.registry import bind, implementations

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SIZES = [(1, 1, 8), (5, 2, 16), (33, 3, 64), (128, 1, 20), (300, 2, 64), (257, 5, 36)]


def patches(count: int, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, keys, values as one projection gives them: strided rows, NaN behind the last one."""
    random = torch.Generator().manual_seed(seed)
    qkv = torch.full((count + 1, 3 * heads, width), math.nan, dtype=dtype)
    qkv[:count] = torch.randn(count, 3 * heads, width, generator=random).to(dtype)
    return qkv[:count].split(heads, dim=1)


def attended(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q.double(), keys.double()) * scale
    return torch.einsum("hts,shd->thd", scores.softmax(-1), values.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "heads", "width"), SIZES)
@pytest.mark.parametrize("implementation", [row.name for row in implementations("image_attention", "cpu")])
def test_every_patch_sees_every_other(
    implementation: str, count: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    bind(KernelsConfig(implementations={"image_attention": implementation}), "cpu")
    given = patches(count, heads, width, dtype)
    found = vision.image_attention(*given, 0.3)
    assert (found.dtype, found.is_contiguous()) == (dtype, True)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), attended(*given, 0.3), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "heads", "width"), SIZES)
def test_attention_in_every_instruction_set(
    instruction_set: str, count: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    given, found = patches(count, heads, width, dtype), []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        found.append(vision.image_attention(*given, 0.3))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found[0].double(), attended(*given, 0.3), **tolerance)


def test_rows_of_queries_keys_and_values_are_each_their_own_way_apart(instruction_set: str) -> None:
    apart = [
        torch.cat((x, torch.full((300, more, 16), math.nan)), dim=1)[:, :2]
        for more, x in enumerate(patches(300, 2, 16, torch.float32), start=1)
    ]
    assert len({x.stride(0) for x in apart}) == 3
    found = vision.image_attention(*apart, 0.3)
    torch.testing.assert_close(found.double(), attended(*apart, 0.3), rtol=2e-6, atol=2e-6)


def test_a_patch_has_the_same_bits_wherever_it_stands(instruction_set: str) -> None:
    """A query beside the same keys gets the same bits, whatever queries are around it."""
    q, keys, values = patches(200, 2, 64, torch.bfloat16)
    whole = vision.image_attention(q, keys, values, 0.125)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vision.image_attention(q[order], keys, values, 0.125), whole[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37, 1000])
@pytest.mark.parametrize("implementation", [row.name for row in implementations("gelu", "cpu")])
def test_gelu_is_the_exact_one(implementation: str, width: int, dtype: torch.dtype) -> None:
    bind(KernelsConfig(implementations={"gelu": implementation}), "cpu")
    x = torch.randn(7, width + 3, generator=torch.Generator().manual_seed(width)).mul(3).to(dtype)[:, 1 : width + 1]
    found = vision.gelu(x)
    expected = x.double() / 2 * (1 + torch.erf(x.double() / math.sqrt(2)))
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    if implementation == "native":
        assert torch.equal(vision.gelu(x[3:4])[0], found[3])


def test_misuse_is_refused() -> None:
    bind(KernelsConfig(), "cpu")
    q, keys, values = patches(4, 2, 8, torch.float32)
    with pytest.raises(ArgumentError, match=r"image_attention: keys \[T H d\] needs T = 4"):
        vision.image_attention(q, keys[:3], values, 1.0)
    with pytest.raises(ArgumentError, match="there are no rows"):
        vision.image_attention(q[:0], keys[:0], values[:0], 1.0)
    with pytest.raises(ArgumentError, match="heads of keys must lie side by side"):
        vision.image_attention(q, keys.transpose(1, 2).contiguous().transpose(1, 2), values, 1.0)
    with pytest.raises(ArgumentError, match=r"gelu: x must have 2 axes"):
        vision.gelu(torch.zeros(3))
