"""Dense products in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ops/linear.py."""
    return functional.linear(x, weight)


def lm_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """See ops/linear.py."""
    return functional.linear(hidden, weight).float()


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See ops/linear.py."""
    activation = functional.silu(functional.linear(x, gate), inplace=True)
    return functional.linear(activation.mul_(functional.linear(x, up)), down)
