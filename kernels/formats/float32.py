"""float32: weights as they are, in the order of the panels. NaN and infinity are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = math.inf


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k] -> uint8 [P, bytes of a panel]: one k a group."""
    return rows.float().transpose(1, 2).contiguous().flatten(1).view(torch.uint8)


def decode(panels: Tensor) -> Tensor:
    """The reverse of encode -> float32 [P,32,k]."""
    return panels.view(torch.float32).unflatten(1, (-1, 32)).transpose(1, 2)
