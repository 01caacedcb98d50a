"""The order of outputs in a packed matrix: panels of 32, gate beside up in a paired one (see packed.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.formats.packed import PANEL, num_panels


def to_panels(weight: Tensor, paired: bool) -> Tensor:
    """[E,n,k] -> new [E * panels, 32, k]; outputs past n are zero."""
    experts, n, k = weight.shape
    sections = 2 if paired else 1
    count, height = num_panels(n, paired), PANEL // sections
    padded = torch.zeros(experts, sections, count * height, k, dtype=weight.dtype)
    padded[:, :, : n // sections] = weight.unflatten(1, (sections, n // sections))
    return padded.unflatten(2, (count, height)).transpose(1, 2).reshape(experts * count, PANEL, k)


def from_panels(panels: Tensor, n: int, paired: bool) -> Tensor:
    """The reverse: [E * panels, 32, k] -> [E,n,k]."""
    sections = 2 if paired else 1
    count, height = num_panels(n, paired), PANEL // sections
    halves = panels.unflatten(0, (-1, count)).unflatten(2, (sections, height)).transpose(1, 2)
    return halves.flatten(2, 3)[:, :, : n // sections].flatten(1, 2)
