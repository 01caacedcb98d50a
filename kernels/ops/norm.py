"""RMS normalisation. Letters: T tokens, D hidden width."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.registry import bound


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, row by row -> new [T,D], in x's dtype.

    x [T,D] bf16 or fp32, rows may be strided; weight [D] of the same dtype. The statistics are fp32; the
    normalised row is rounded to x's dtype before it meets the weight (transformers' order). T may be 0.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    """
    check.sizes("rms_norm", x=(x, "T D"), weight=(weight, "D"))
    check.same_dtype("rms_norm", x=x, weight=weight)
    return bound.rms_norm(x, weight, eps)


def add_rms_norm(x: Summands, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; then rms_norm(residual, weight, eps) -> new [T,D].

    x, residual [T,D] and weight [D] of one dtype, bf16 or fp32; the sum is rounded to it before it is
    normalised. `residual` must not overlap x. x may be terms (terms.py), whose sum is rounded before it is added.
    """
    check.sizes("add_rms_norm", x=(x, "T D"), residual=(residual, "T D"), weight=(weight, "D"))
    check.same_dtype("add_rms_norm", x=x, residual=residual, weight=weight)
    return bound.add_rms_norm(x, residual, weight, eps)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> QuantisedRows:
    """rms_norm, then formats/activations.py quantise_rows, to the bit -> new [T,D].

    For a product that takes its activations in FP8. scale: fp32 [1], static; None: each row has its own.
    """
    check.sizes("rms_norm_fp8", x=(x, "T D"), weight=(weight, "D"))
    check.same_dtype("rms_norm_fp8", x=x, weight=weight)
    _check_scale("rms_norm_fp8", scale)
    return bound.rms_norm_fp8(x, weight, eps, scale)


def add_rms_norm_fp8(
    x: Summands, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None
) -> QuantisedRows:
    """add_rms_norm, then quantise_rows, to the bit -> new [T,D]. The residual keeps its dtype."""
    check.sizes("add_rms_norm_fp8", x=(x, "T D"), residual=(residual, "T D"), weight=(weight, "D"))
    check.same_dtype("add_rms_norm_fp8", x=x, residual=residual, weight=weight)
    _check_scale("add_rms_norm_fp8", scale)
    return bound.add_rms_norm_fp8(x, residual, weight, eps, scale)


def _check_scale(operation: str, scale: Tensor | None) -> None:
    if scale is not None:
        check.sizes(operation, scale=(scale, "1"))
        check.dtype(operation, torch.float32, scale=scale)
