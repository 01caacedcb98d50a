"""bf16: weights as they are, or rounded to nearest even, in the order of the panels.

NaN and infinity are kept: they show in the outputs that they belong to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = math.inf


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k], k even, -> uint8 [P, bytes of a panel]: two k a group, the operands of a dot product."""
    values = rows if rows.dtype == torch.bfloat16 else narrow(rows)
    return values.unflatten(2, (-1, 2)).transpose(1, 2).contiguous().flatten(1).view(torch.uint8)


def decode(panels: Tensor) -> Tensor:
    """The reverse of encode -> float32 [P,32,k]."""
    return panels.view(torch.bfloat16).unflatten(1, (-1, 32, 2)).transpose(1, 2).flatten(2).float()


def narrow(values: Tensor) -> Tensor:
    """float32 -> bf16 to nearest even. Not `.to`: torch's bits of a NaN vary with the CPU and the position."""
    bits = values.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return torch.where(values.isnan(), quiet, rounded).to(torch.int16).view(torch.bfloat16)
