"""MXFP4: e2m1 codes, and a power of two for each 32 weights of a row: weight = e2m1(code) * 2^(scale - 127)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cierzo.kernels.formats import e2m1, four_bit
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix, as_experts, four_bit_shape

GROUP = 32
# On a GPU the largest scale of a row is 2^127, the others are as far below it as they were, and the row has a
# multiplier. A scale is the exponent of a bf16 number, which takes a code's, e2m1 * 2^-126, to 12 at most, and to
# 2^-126 at least where no scale is less than 2^-126 of the row's largest. NaN is none.
SCALE_STEP, SCALE_BASE = 128, 0  # scale * step + base are the bits of the bf16 number
TOP, BOTTOM = 254, 128
LEAST_TOP = 27  # of a row as stored: 2^-100


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """A checkpoint's own: uint8 [n,k/2] or [E,n,k/2], and uint8 (e8m0) [.., n, k/32]. Raises DeviceFormatError."""
    shape = four_bit_shape("mxfp4", codes, scales, torch.uint8)
    octets, stored = as_experts(codes), as_experts(scales).int()
    if not stored.is_meta and int(stored.max()) > TOP:
        raise DeviceFormatError("mxfp4: a scale is NaN")
    used = ((octets & 0x77) != 0).unflatten(2, (-1, GROUP // 2)).any(-1)
    tops = torch.where(used, stored, LEAST_TOP).amax(-1).clamp_min(LEAST_TOP)
    moved = torch.where(used, stored - tops[..., None] + TOP, TOP)
    if not moved.is_meta and int(moved.min()) < BOTTOM:
        raise DeviceFormatError("mxfp4: a row's scales differ by more than 2^126")
    filled = pad(moved.to(torch.uint8), (0, (four_bit.stretched(shape[-1]) - shape[-1]) // GROUP))
    whole = torch.exp2((tops - TOP // 2 - 1).double()).float()
    return DeviceMatrix("mxfp4", shape, dtype, four_bit.to_words(octets), filled, whole, (1, GROUP))


def quantise(weight: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """float32 [n,k] -> the nearest codes under the least power of two under which a group's peak is at most 6."""
    groups = weight.unflatten(1, (-1, GROUP))
    peaks = groups.abs().amax(-1)
    exponents = torch.ceil(torch.log2(peaks.clamp_min(2.0**-126) / e2m1.LARGEST)).clamp(-126, 127)
    steps = torch.exp2(exponents)[..., None]
    codes = e2m1.nearest(torch.where(steps > 0, groups / steps, 0.0)).flatten(1)
    return from_codes(e2m1.join(codes), (exponents + 127).to(torch.uint8), dtype)


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32 [E,n,k]."""
    assert matrix.row_scales is not None
    k = matrix.shape[-1]
    steps = four_bit.bf16_numbers(matrix.scales[..., : k // GROUP].int() * SCALE_STEP + SCALE_BASE)
    values = four_bit.codes_as_numbers(matrix.codes, k).unflatten(2, (-1, GROUP))
    return (values * steps[..., None] * matrix.row_scales[..., None, None]).flatten(2)
