"""Attention of an image's patches, and GELU, in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch

from cierzo.kernels.ref import vision as ref
from cierzo.kernels.triton import vision

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("count", "heads", "width"), [(1, 1, 16), (131, 2, 24), (64, 3, 64)])
def test_attention_is_the_references(count: int, heads: int, width: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(count)
    qkv = torch.randn(count, 3 * heads, width, generator=random).to(dtype)
    q, keys, values = qkv.split(heads, dim=1)
    expected = ref.image_attention(q.float(), keys.float(), values.float(), width**-0.5)
    found = vision.image_attention(q, keys, values, width**-0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 16, 1030])
def test_gelu_is_the_references(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).mul(3).to(dtype)
    found = vision.gelu(x)
    torch.testing.assert_close(found, ref.gelu(x), rtol=TOLERANCE[dtype], atol=1e-6)
    assert torch.equal(vision.gelu(x[3:4].clone())[0], found[3])
