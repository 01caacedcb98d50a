"""NVFP4: e2m1 codes, an e4m3 scale for each 16 weights of a row, and a float32 multiplier for each row.

    weight = e2m1(code) * scale * multiplier

Checkpoints come in this format, with one multiplier a matrix; their values are taken over unchanged. The
library compressed-tensors ("nvfp4-pack-quantized") stores a matrix X, [n,k], as three tensors:

    X.weight_packed         uint8 [n, k/2]: column 2j in the low half of byte j, column 2j + 1 in the high half
    X.weight_scale          e4m3 [n, k/16]
    X.weight_global_scale   float32 [1], a divisor: the multiplier is 1 / global scale

(X.input_global_scale, for activations in 4 bits, is not used: ours have 8.) Each of an expert's gate, up and down
has a global scale of its own; here every row has one, so that gate and up may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cierzo.kernels.formats import e2m1, four_bit
from cierzo.kernels.formats.device import (
    E4M3,
    LARGEST_E4M3,
    SMALLEST,
    DeviceFormatError,
    DeviceMatrix,
    as_experts,
    four_bit_shape,
)
from cierzo.kernels.formats.int4 import join, split
from cierzo.kernels.formats.packed import to_panels

GROUP = 16
PANEL_GROUP = 32  # two scales
LARGEST = 2.0**127  # a row's scales times its codes must not overflow
LARGEST_SCALE_CODE = 0x7E  # NaN is above, as are negative numbers
HEADER_BYTES = 128
# On a GPU a scale is five bits of exponent and three of mantissa, which are those of a bf16 number 2^119 times as
# large: it takes a code's number, e2m1 * 2^-126, to 2^-7 of the weight, and the row's multiplier holds the rest.
SCALE_STEP, SCALE_BASE = 16, 0x6F80  # scale * step + base are the bits of the bf16 number
ROW_FACTOR = 2.0**7


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k], k a multiple of 32, |.| <= LARGEST, -> uint8 [P, bytes of a panel]."""
    groups = rows.float().unflatten(2, (-1, GROUP))
    scales, whole, steps = _grid(groups)
    quotients = groups * torch.where(steps > 0, 1 / steps, 0.0)[..., None]
    return _assemble(e2m1.nearest(quotients).flatten(2), scales, whole)


def encode_stored(octets: Tensor, scales: Tensor, whole: Tensor, paired: bool) -> Tensor:
    """A checkpoint's codes uint8 [n, k/2], scales uint8 [n, k/16] and multipliers float32 [n] -> packed, uint8."""
    missing = -2 * octets.shape[1] % PANEL_GROUP
    rows = to_panels(pad(e2m1.split(octets), (0, missing))[None], paired)
    scale_rows = to_panels(pad(scales, (0, missing // GROUP))[None], paired)
    return _assemble(rows, scale_rows, to_panels(whole[None, :, None], paired)[..., 0]).flatten()


def decode(panels: Tensor) -> Tensor:
    """The reverse of encode -> float32 [P,32,k]."""
    whole = panels[:, :HEADER_BYTES].contiguous().view(torch.float32)
    groups = panels[:, HEADER_BYTES:].unflatten(1, (-1, PANEL_GROUP * 16 + 64))
    codes = split(groups[..., : PANEL_GROUP * 16]).flatten(2)
    scales = groups[..., PANEL_GROUP * 16 :].unflatten(2, (2, 32)).permute(0, 3, 1, 2).flatten(2)
    steps = scales.contiguous().view(E4M3).float() * whole[..., None]
    return (e2m1.SIGNED[codes.long()].unflatten(2, (-1, GROUP)) * steps[..., None]).flatten(2)


def stored_values(octets: Tensor, scales: Tensor, divisor: float) -> Tensor:
    """The weights, float32 [n,k], of a checkpoint's codes and e4m3 scales, rounded as compressed-tensors rounds:
    scale / divisor, and code times this. Packed, the multiplier is rounded instead: 2^-23 apart at most."""
    steps = (scales.float() / torch.tensor([divisor], device=scales.device))[..., None]
    return (e2m1.widen(octets).unflatten(1, (-1, GROUP)) * steps).flatten(1)


def from_codes(codes: Tensor, scales: Tensor, row_scales: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """A checkpoint's own: uint8 [n,k/2] or [E,n,k/2], e4m3 [.., n, k/16], and multipliers.

    row_scales: of rows [.., n], of matrices [E], or one. Raises DeviceFormatError.
    """
    shape = four_bit_shape("nvfp4", codes, scales, E4M3)
    experts, n = (1, *shape)[-3], shape[-2]
    whole = row_scales.float()
    if whole.numel() in (1, experts) and whole.numel() != experts * n:
        whole = whole.reshape(-1, 1).expand(experts, n)
    if whole.numel() != experts * n:
        raise DeviceFormatError(f"nvfp4: row_scales {list(row_scales.shape)} do not fit {list(shape)}")
    stored = as_experts(scales.view(torch.uint8))
    if not stored.is_meta and int(stored.max()) > LARGEST_SCALE_CODE:
        raise DeviceFormatError("nvfp4: a scale is NaN or negative, must be in 0 .. 448")
    octets = as_experts(codes).unflatten(2, (-1, GROUP // 2))
    octets = torch.where(stored[..., None] > 0, octets, 0).flatten(2)  # no scale on a GPU is zero: its codes are
    filled = pad(
        _FIVE_BITS.to(stored.device)[stored.int()], (0, (four_bit.stretched(shape[-1]) - shape[-1]) // GROUP)
    )
    whole = whole.reshape(experts, n) * ROW_FACTOR
    return DeviceMatrix(
        "nvfp4", shape, dtype, four_bit.to_words(octets), filled.view(torch.int16), whole, (1, GROUP)
    )


def quantise(weight: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """float32 [n,k] -> the nearest codes under scales that take the peak of each group and row in."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales, whole, steps = _grid(groups)
    codes = e2m1.nearest(torch.where(steps[..., None] > 0, groups / steps[..., None], 0.0)).flatten(1)
    return from_codes(e2m1.join(codes), scales, whole, dtype)


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32 [E,n,k], each rounded once."""
    assert matrix.row_scales is not None
    k = matrix.shape[-1]
    bits = matrix.scales.view(torch.uint8)[..., : k // GROUP].int() * SCALE_STEP + SCALE_BASE
    values = four_bit.codes_as_numbers(matrix.codes, k).unflatten(2, (-1, GROUP))
    return (values * four_bit.bf16_numbers(bits)[..., None] * matrix.row_scales[..., None, None]).flatten(2)


def _grid(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """groups [..., G, 16] -> scales e4m3 [..., G], multipliers of rows [...], and the steps, scale * multiplier."""
    peaks = groups.abs().amax(-1)
    highest = peaks.amax(-1)
    whole = torch.where(highest >= SMALLEST, highest / (e2m1.LARGEST * LARGEST_E4M3), 1.0)
    scales = (peaks / (e2m1.LARGEST * whole[..., None])).clamp_max(LARGEST_E4M3).to(E4M3)
    return scales, whole, scales.float() * whole[..., None]


def _assemble(codes: Tensor, scales: Tensor, whole: Tensor) -> Tensor:
    """uint8 [P,32,k], e4m3 [P,32,k/16], float32 multipliers [P,32] -> uint8 [P, bytes of a panel]."""
    octets = join(codes.unflatten(2, (-1, PANEL_GROUP)))
    pairs = scales.view(torch.uint8).unflatten(2, (-1, 2)).permute(0, 2, 3, 1).flatten(2)
    return torch.cat([whole.contiguous().view(torch.uint8), torch.cat([octets, pairs], -1).flatten(1)], -1)


def _five_bits() -> Tensor:
    """The scale on a GPU, uint8, of each e4m3 scale, 0 .. 448; 0 of others and of zero."""
    scales = torch.arange(1, LARGEST_SCALE_CODE + 1, dtype=torch.uint8).view(E4M3).float()
    bits = (scales * 2.0**119).view(torch.int32) >> 16
    return pad((bits - SCALE_BASE) // SCALE_STEP, (1, 255 - LARGEST_SCALE_CODE)).to(torch.uint8)


_FIVE_BITS = _five_bits()
