"""Rotary position embedding in plain torch."""

from __future__ import annotations

from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See ops/rope.py."""
    angles = positions.float()[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """See ops/rope.py."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(rotated)
