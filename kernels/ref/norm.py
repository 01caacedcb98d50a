"""RMS normalisation in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cierzo.kernels.formats.activations import QuantisedRows, quantise_rows
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.ref.terms import rows_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    return functional.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)  # fp32 inside, rounded before the weight


def add_rms_norm(x: Summands, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    residual.add_(rows_of(x))
    return rms_norm(residual, weight, eps)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> QuantisedRows:
    """See ops/norm.py."""
    return quantise_rows(rms_norm(x, weight, eps), scale)


def add_rms_norm_fp8(
    x: Summands, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None
) -> QuantisedRows:
    """See ops/norm.py."""
    return quantise_rows(add_rms_norm(x, residual, weight, eps), scale)
