"""Attention of an image's patches, and GELU, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def image_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """See ops/vision.py."""
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    attended = functional.scaled_dot_product_attention(q, keys, values, scale=scale)
    return attended[0].transpose(0, 1).contiguous()


def gelu(x: Tensor) -> Tensor:
    """See ops/vision.py."""
    return functional.gelu(x)
