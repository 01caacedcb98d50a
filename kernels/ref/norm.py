"""RMS normalisation in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    return functional.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)  # fp32 inside, rounded before the weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)
