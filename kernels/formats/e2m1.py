"""e2m1, the codes of NVFP4 and MXFP4: a sign, then 0 0.5 1 1.5 2 3 4 6.

Checkpoints and GPU kernels have two of them in a byte: column 2j in its low half, column 2j + 1 in its high half.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0
SIGNED = torch.tensor([*VALUES, *(-value for value in VALUES)])  # by code
_VALUES_OF_BYTE = torch.stack([SIGNED.repeat(16), SIGNED.repeat_interleave(16)], 1)  # [byte, low and high half]


def nearest(values: Tensor) -> Tensor:
    """The nearest codes, uint8, ties to the even one; beyond 6 the code of 6."""
    size, codes = values.abs(), torch.zeros_like(values, dtype=torch.uint8)
    for number, (low, high) in enumerate(pairwise(VALUES)):
        middle = (low + high) / 2
        codes += size >= middle if number % 2 else size > middle
    return torch.where(values < 0, codes + 8, codes)


def join(codes: Tensor) -> Tensor:
    """Codes [..., k] -> bytes [..., k/2]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def split(octets: Tensor) -> Tensor:
    """Bytes [..., k/2] -> codes [..., k]."""
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)


def widen(octets: Tensor) -> Tensor:
    """Bytes [..., k/2] -> what their codes stand for, float32 [..., k]."""
    table = _VALUES_OF_BYTE.to(octets.device)
    return table.index_select(0, octets.flatten().int()).view(*octets.shape[:-1], -1)
