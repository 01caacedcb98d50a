"""How tensors and weights are handed to C."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous, as the kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()
