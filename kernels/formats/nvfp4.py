"""NVFP4: e2m1 codes, an e4m3 scale for each 16 weights of a row, and a float32 scale for each row.

    e2m1: sign, then 0 0.5 1 1.5 2 3 4 6        weight = e2m1(code) * scale * global scale

Checkpoints come in this format, with one global scale a matrix; their codes and scales are taken over unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.formats.int4 import join, split

GROUP = 32  # two scales
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LARGEST_SCALE = 448.0  # of e4m3
LARGEST = 2.0**127  # a row's scales times its codes must not overflow
SMALLEST = 2.0**-100  # rows below it become zero
HEADER_BYTES = 128


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k], k a multiple of 32, |.| <= LARGEST, -> uint8 [P, bytes of a panel]."""
    groups = rows.float().unflatten(2, (-1, 16))
    peaks = groups.abs().amax(-1)  # [P,32,2G]
    highest = peaks.amax(-1)
    whole = torch.where(highest >= SMALLEST, highest / (6 * LARGEST_SCALE), 1.0)
    scales = (peaks / (6 * whole[..., None])).clamp_max(LARGEST_SCALE).to(torch.float8_e4m3fn)
    steps = scales.float() * whole[..., None]
    quotients = groups * torch.where(steps > 0, 1 / steps, 0.0)[..., None]
    return assemble(e2m1(quotients).flatten(2), scales, whole)


def assemble(codes: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """uint8 [P,32,k], e4m3 [P,32,k/16], float32 global scales [P,32] -> uint8 [P, bytes of a panel]."""
    octets = join(codes.unflatten(2, (-1, GROUP)))
    pairs = scales.view(torch.uint8).unflatten(2, (-1, 2)).permute(0, 2, 3, 1).flatten(2)
    return torch.cat([whole.contiguous().view(torch.uint8), torch.cat([octets, pairs], -1).flatten(1)], -1)


def decode(panels: Tensor) -> Tensor:
    """The reverse -> float32 [P,32,k]."""
    whole = panels[:, :HEADER_BYTES].contiguous().view(torch.float32)
    groups = panels[:, HEADER_BYTES:].unflatten(1, (-1, GROUP * 16 + 64))
    codes = split(groups[..., : GROUP * 16]).flatten(2)
    scales = groups[..., GROUP * 16 :].unflatten(2, (2, 32)).permute(0, 3, 1, 2).flatten(2)
    steps = scales.contiguous().view(torch.float8_e4m3fn).float() * whole[..., None]
    signs = torch.where(codes >= 8, -1.0, 1.0)
    return ((VALUES[(codes & 7).long()] * signs).unflatten(2, (-1, 16)) * steps[..., None]).flatten(2)


def e2m1(values: Tensor) -> Tensor:
    """The nearest codes, ties to the even one; beyond 6 the code of 6."""
    size = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for number, middle in enumerate((VALUES[1:] + VALUES[:-1]) / 2):
        codes += size >= middle if number % 2 else size > middle
    return torch.where(values < 0, codes + 8, codes)
