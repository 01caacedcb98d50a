"""Rows of activations in eight bits: what FP8 tensor cores multiply with FP8 weights.

    code [T,K]   e4m3 of clamp(x / scale of the row, -448, 448), to nearest, ties to even
    scale [T]    static: the checkpoint's, one of a matrix, or of an expert's; else the row's: its largest |x| / 448
    product      (code . weight's code) * scale * weight's scale, in fp32

A row's codes are a function of the row, and of the static scale where there is one. NaN stays NaN, and its row's
products are NaN; an infinity becomes 448 under a static scale, and makes NaN of its row under its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels.formats.device import E4M3, LARGEST_E4M3, SMALLEST, DeviceMatrix
from cierzo.kernels.formats.packed import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedRows:
    """codes: e4m3 [T,K], contiguous. scales: fp32 [T]. dtype: of the rows that were quantised, and of what products
    with them give. `shape`, `dtype` and `device` are there so that a door can check it like a tensor."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[T,K]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where both lie."""
        return self.codes.device


Rows = Tensor | QuantisedRows  # what a product takes as activations


def takes_fp8(matrix: Matrix) -> bool:
    """Whether the activations that a matrix is multiplied with are quantised first."""
    return isinstance(matrix, DeviceMatrix) and matrix.activations == "fp8"


def static_scales(matrix: Matrix | None) -> Tensor | None:
    """The scales of a matrix's activations, fp32 [E]; None: each row has its own, or none."""
    return matrix.activation_scales if isinstance(matrix, DeviceMatrix) else None


def quantise_rows(x: Tensor, scale: Tensor | None) -> QuantisedRows:
    """x [T,K], any float dtype. scale: the static one, fp32 [1]; None: each row's own, 1 for a row of zeros."""
    values = x.float()
    if scale is None:
        peaks = values.abs().nan_to_num(0.0, posinf=torch.inf).amax(1)
        scales = torch.where(peaks >= SMALLEST, peaks / LARGEST_E4M3, 1.0)
    else:
        scales = scale.float().expand(len(x)).contiguous()
    codes = (values / scales[:, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)
    return QuantisedRows(codes, scales, x.dtype)
