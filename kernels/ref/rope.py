"""Rotary position embedding in plain torch."""

from __future__ import annotations

from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See ops/rope.py."""
    angles = positions.float()[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None) -> None:
    """See ops/rope.py."""
    turned = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(rotated)
    if scale is not None:
        x.mul_(scale[:, None, None])
