"""MXFP4: e2m1 codes, and a power of two for each 32 weights of a row: weight = e2m1(code) * 2^(scale - 127)."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.formats import e2m1
from cierzo.kernels.formats.device import DeviceMatrix, as_experts, four_bit_shape

GROUP = 32


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """A checkpoint's own: uint8 [n,k/2] or [E,n,k/2], and uint8 (e8m0) [.., n, k/32]. Raises DeviceFormatError."""
    shape = four_bit_shape("mxfp4", codes, scales, torch.uint8)
    return DeviceMatrix("mxfp4", shape, dtype, as_experts(codes), as_experts(scales), None, (1, GROUP))


def quantise(weight: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """float32 [n,k] -> the nearest codes under the least power of two under which a group's peak is at most 6."""
    groups = weight.unflatten(1, (-1, GROUP))
    peaks = groups.abs().amax(-1)
    exponents = torch.ceil(torch.log2(peaks.clamp_min(2.0**-126) / e2m1.LARGEST)).clamp(-126, 127)
    steps = torch.exp2(exponents)[..., None]
    codes = e2m1.nearest(torch.where(steps > 0, groups / steps, 0.0)).flatten(1)
    return from_codes(e2m1.join(codes), (exponents + 127).to(torch.uint8), dtype)


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32 [E,n,k]; a scale of 255 makes NaN."""
    scales = torch.where(matrix.scales == 255, torch.nan, torch.exp2(matrix.scales.float() - 127))
    return (e2m1.widen(matrix.codes).unflatten(2, (-1, GROUP)) * scales[..., None]).flatten(2)
