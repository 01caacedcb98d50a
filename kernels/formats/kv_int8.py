"""INT8 rows of cached latents, keys and values: codes, then what they are multiplied with.

    latents       uint8 [..., R+P+8]: int8 latent [R], int8 rope key [P], float scale of each
    keys, values  uint8 [..., d+4]:   int8 values [d], float scale

Symmetric, one scale for each latent, rope key, key or value: value = code * scale, scale = largest magnitude / 127,
codes to nearest, ties to even. Error: half a scale, 0.4 % of the largest magnitude. What holds a NaN or an
infinity gets the scale NaN and reads as NaN throughout: poison stays seen, and in its own sequence.
kernels/cpu/kv.h does the same in C++, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
PAGES_DTYPE = torch.uint8  # the dtype by which a door knows INT8 pages


def quantise(x: Tensor) -> Tensor:
    """x [..., n], float32 or bfloat16 -> uint8 [..., n+4]: codes, scale."""
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peak.isfinite(), peak / 127, torch.nan)
    codes = (x / scale).round().clamp(-127, 127)
    codes = torch.where(scale > 0, codes, 0)  # a scale of zero or NaN says it all
    scale = scale.clone(memory_format=torch.contiguous_format)  # amax leaves strides that a view of bytes refuses
    return torch.cat((codes.to(torch.int8).view(torch.uint8), scale.view(torch.uint8)), -1)


def dequantise(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., n+4] -> [..., n], computed in fp32, rounded to `dtype`."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    scale = scale.clone(memory_format=torch.contiguous_format)  # aligned, as a row's own bytes need not be
    return (codes.view(torch.int8) * scale.view(torch.float32)).to(dtype)


def quantise_latents(latents: Tensor, rope_keys: Tensor) -> Tensor:
    """latents [..., R], rope_keys [..., P] -> uint8 [..., R+P+8]."""
    latent, rope_key = quantise(latents), quantise(rope_keys)
    parts = [row[..., :-SCALE_BYTES] for row in (latent, rope_key)]
    return torch.cat((*parts, latent[..., -SCALE_BYTES:], rope_key[..., -SCALE_BYTES:]), -1)


def dequantise_latents(rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """uint8 [..., R+P+8] -> [..., R+P]."""
    latent, rope_key, *scales = rows.tensor_split((rank, -2 * SCALE_BYTES, -SCALE_BYTES), -1)
    parts = [torch.cat(pair, -1) for pair in zip((latent, rope_key), scales, strict=True)]
    return torch.cat([dequantise(part, dtype) for part in parts], -1)
