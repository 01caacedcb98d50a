"""int4: a half-precision scale and minimum for each 32 weights of a row; weight = code * scale + minimum.

Weights that lie on such a grid are reproduced exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.formats.int8 import inverse

GROUP = 32
STEPS = 15
LARGEST = 65504.0  # a minimum beyond is beyond half precision
RELATIVE_RMS = 0.085  # root of mean square, against that of normally distributed weights
SMALLEST_SCALE = 2.0**-24


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k], k a multiple of 32, |.| <= LARGEST, -> uint8 [P, bytes of a panel]."""
    groups = rows.float().unflatten(2, (-1, GROUP))  # [P,32,G,32]
    lowest, highest = groups.amin(-1), groups.amax(-1)
    scale = ((highest - lowest) / STEPS).half()
    scale = torch.where(highest > lowest, scale.clamp_min(SMALLEST_SCALE), 0.0).half()
    minimum = lowest.half()
    codes = ((groups - minimum.float()[..., None]) * inverse(scale)[..., None]).round().clamp_(0, STEPS)
    ends = torch.stack([scale, minimum]).permute(1, 3, 0, 2).flatten(2)  # [P, G, 2 x 32]
    return torch.cat([join(codes.to(torch.uint8)), ends.contiguous().view(torch.uint8)], -1).flatten(1)


def decode(panels: Tensor) -> Tensor:
    """The reverse -> float32 [P,32,k]."""
    groups = panels.unflatten(1, (-1, GROUP * 16 + 128))
    ends = groups[..., GROUP * 16 :].contiguous().view(torch.float16).float().unflatten(2, (2, 32))
    scale, minimum = ends.permute(2, 0, 3, 1)[..., None]
    return (split(groups[..., : GROUP * 16]) * scale + minimum).flatten(2)


def join(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [P,32,G,32] -> bytes [P, G, 4 x 32 x 4], in the layout that packed.py draws."""
    low, high = codes.unflatten(3, (-1, 2, 4)).unbind(4)  # of each octet
    return (low | high << 4).permute(0, 2, 3, 1, 4).flatten(2)


def split(octets: Tensor) -> Tensor:
    """The reverse -> uint8 [P,32,G,32]."""
    octets = octets.unflatten(2, (-1, 32, 4)).permute(0, 3, 1, 2, 4)
    return torch.stack([octets & 15, octets >> 4], 4).flatten(3)
