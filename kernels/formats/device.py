"""`DeviceMatrix`: weights in few bits, in the order in which the GPU kernels read them: rows of k, as stored.

    format   codes                                             scales                                  row_scales
    fp8      e4m3 [E,n,k]                                      float32 [E, n/b, k/c], one a block      none
    nvfp4    uint8 [E,n,k/2]: column 2j in the low half of     e4m3 [E,n,k/16]                         float32 [E,n]
             byte j, column 2j + 1 in the high half
    mxfp4    uint8 [E,n,k/2], the same                         uint8 [E,n,k/32], the exponent of two   none
                                                               plus 127

    value    fp8: e4m3(code) * scale.  nvfp4: e2m1(code) * scale * row scale.  mxfp4: e2m1(code) * 2^(scale - 127)

The order is that of the published checkpoints, whose tensors are taken over as they are. Kernels widen a code to
the activations' bf16, which holds every e4m3 number and every product of an e2m1 number and its scale exactly;
scales of whole rows or blocks multiply fp32 sums. Matrices of bf16 or float32 stay plain tensors.

An fp8 matrix may ask for activations in fp8 too (`in_fp8`, activations.py): codes are then multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
GROUP = {"nvfp4": 16, "mxfp4": 32}  # weights of a row that share a scale
FORMATS = ("fp8", *GROUP)
SMALLEST = 2.0**-100  # what is smaller becomes zero: its scale would leave fp32's normal range
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Root mean square of the errors of `quantise`, relative to that of normally distributed weights: bounds, which
# tests check. e4m3 keeps four significant bits; e2m1 has the steps 0.5, 1 and 2 below 6, and its group's peak
# becomes 6; mxfp4's power of two wastes up to half of that range.
WEIGHT_ERROR = {"fp8": 0.028, "nvfp4": 0.1, "mxfp4": 0.13}


class DeviceFormatError(ValueError):
    """Tensors do not make a matrix of that format, or a weight does not fit it."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """Weights [n,k] or [E,n,k] in one of the formats above; E is 1 in the tensors of the former. Never written.

    dtype: of the activations that it is multiplied with. block: (rows, columns) of one scale. activations: "plain",
    as they come; "fp8": quantised before the product, by the static activation_scales, fp32 [E], where a checkpoint
    has them, else row by row. `shape` and `dtype` are there so that a door can check it like a tensor.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None
    block: tuple[int, int]
    activations: Literal["plain", "fp8"] = "plain"
    activation_scales: Tensor | None = None

    def __getitem__(self, expert: int) -> DeviceMatrix:
        """One expert's [n,k], in the same memory."""
        one = slice(expert, expert + 1)
        whole = (self.codes, self.scales, self.row_scales, self.activation_scales)
        codes, scales, row_scales, activation_scales = (None if t is None else t[one] for t in whole)
        assert codes is not None
        assert scales is not None
        return replace(
            self,
            shape=self.shape[1:],
            codes=codes,
            scales=scales,
            row_scales=row_scales,
            activation_scales=activation_scales,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        tensors = (self.codes, self.scales, self.row_scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> DeviceMatrix:
        """A copy there."""
        whole = (self.row_scales, self.activation_scales)
        row_scales, activation_scales = (None if t is None else t.to(device) for t in whole)
        codes, scales = self.codes.to(device), self.scales.to(device)
        return replace(self, codes=codes, scales=scales, row_scales=row_scales, activation_scales=activation_scales)


def fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None) -> DeviceMatrix:
    """A checkpoint's own codes, e4m3 [n,k] or [E,n,k], and the multipliers of their blocks, of any float dtype.

    scales: [n/b, k/c], or [E, n/b, k/c], rounded up, for blocks of (b, c), such as (128, 128); without `block`,
    their number says it: one a matrix (0-d, [1], [E], [1,1], [E,1,1]), one a row ([n], [n,1], [E,n], [E,n,1]), or
    one for each of the equal parts stacked in a matrix ([E,2,1]: gate and up). Raises DeviceFormatError.
    """
    if codes.dtype != E4M3 or codes.dim() not in (2, 3):
        raise DeviceFormatError(f"fp8: codes are e4m3 [n,k] or [E,n,k], got {codes.dtype} {list(codes.shape)}")
    experts, n, k = _three(codes).shape
    if block is None:
        per_expert = scales.numel() // experts
        if scales.numel() != experts * per_expert or per_expert == 0 or n % per_expert:
            raise DeviceFormatError(f"fp8: scales {list(scales.shape)} do not fit {list(codes.shape)}")
        block = (n // per_expert, k)
    wanted = (experts, -(-n // block[0]), -(-k // block[1]))
    if scales.numel() != wanted[0] * wanted[1] * wanted[2]:
        raise DeviceFormatError(f"fp8: scales {list(scales.shape)} are not {list(wanted)} for blocks {block}")
    scales = scales.float().reshape(wanted).contiguous()
    return DeviceMatrix("fp8", tuple(codes.shape), dtype, _three(codes).contiguous(), scales, None, block)


def nvfp4(codes: Tensor, scales: Tensor, row_scales: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """A checkpoint's own: uint8 [n,k/2] or [E,n,k/2], e4m3 [.., n, k/16], and multipliers.

    row_scales: of rows [.., n], of matrices [E], or one. That of compressed-tensors is 1 / weight_global_scale.
    Raises DeviceFormatError.
    """
    shape = _four_bits("nvfp4", codes, scales, E4M3)
    experts, n = (1, *shape)[-3], shape[-2]
    whole = row_scales.float()
    if whole.numel() in (1, experts) and whole.numel() != experts * n:
        whole = whole.reshape(-1, 1).expand(experts, n)
    if whole.numel() != experts * n:
        raise DeviceFormatError(f"nvfp4: row_scales {list(row_scales.shape)} do not fit {list(shape)}")
    whole = whole.reshape(experts, n).contiguous()
    codes, scales = _three(codes).contiguous(), _three(scales).contiguous()
    return DeviceMatrix("nvfp4", shape, dtype, codes, scales, whole, (1, GROUP["nvfp4"]))


def mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> DeviceMatrix:
    """A checkpoint's own: uint8 [n,k/2] or [E,n,k/2], and uint8 (e8m0) [.., n, k/32]. Raises DeviceFormatError."""
    shape = _four_bits("mxfp4", codes, scales, torch.uint8)
    codes, scales = _three(codes).contiguous(), _three(scales).contiguous()
    return DeviceMatrix("mxfp4", shape, dtype, codes, scales, None, (1, GROUP["mxfp4"]))


def in_fp8(matrix: DeviceMatrix, scales: Tensor | None = None) -> DeviceMatrix:
    """The same matrix, multiplied with activations in fp8. scales: static ones, multipliers of codes, of any float
    dtype, one an expert, or one of [n,k]. Raises DeviceFormatError for other formats, numbers and values."""
    if matrix.format != "fp8":
        raise DeviceFormatError(f"activations in fp8 meet weights in fp8 alone, got {matrix.format}")
    if scales is None:
        return replace(matrix, activations="fp8", activation_scales=None)
    if scales.numel() != len(matrix.codes):
        raise DeviceFormatError(f"fp8: activation scales {list(scales.shape)} do not fit {list(matrix.shape)}")
    scales = scales.float().flatten().contiguous()
    if not bool(((scales >= SMALLEST) & (scales <= 1 / SMALLEST)).all()):
        raise DeviceFormatError("fp8: an activation scale is not in 2^-100 .. 2^100")
    return replace(matrix, activations="fp8", activation_scales=scales)


def quantise(
    weight: Tensor, format: str, dtype: torch.dtype | None = None, block: tuple[int, int] | None = None
) -> DeviceMatrix:
    """weight [n,k] or [E,n,k] of any float dtype -> the nearest codes under the scale that takes each peak in.

    Errors: WEIGHT_ERROR. dtype: of the activations, the weight's by default. block: (rows, columns) of fp8's
    scales; one scale a row by default. Experts are converted one by one, in the memory of one. Raises
    DeviceFormatError for an unknown format, a k that is not whole groups, and weights that are not finite.
    """
    if format not in FORMATS:
        raise DeviceFormatError(f"unknown number format {format!r}; known: {', '.join(FORMATS)}")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise DeviceFormatError(f"weights are [n,k] or [E,n,k], got {list(weight.shape)}")
    dtype = dtype or weight.dtype
    if weight.dim() == 2:
        return _quantise(weight, format, dtype, block)
    return stack([_quantise(expert, format, dtype, block) for expert in weight])


def stack(matrices: Sequence[DeviceMatrix]) -> DeviceMatrix:
    """[n,k] matrices of one format and size -> [E,n,k]."""
    first = matrices[0]
    if any((one.format, one.shape, one.block) != (first.format, first.shape, first.block) for one in matrices):
        raise DeviceFormatError(f"{first.format} {list(first.shape)}: matrices that are stacked must be alike")
    if any(one.activations != "plain" for one in matrices):
        raise DeviceFormatError("matrices are stacked before their activations are said to be in fp8")

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        kind = tensors[0].dtype
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(kind)

    row_scales = [one.row_scales for one in matrices if one.row_scales is not None]
    return DeviceMatrix(
        first.format,
        (len(matrices), *first.shape),
        first.dtype,
        joined([one.codes for one in matrices]),
        joined([one.scales for one in matrices]),
        joined(row_scales) if row_scales else None,
        first.block,
    )


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32, of the matrix's shape; each rounded once, and not at all where float32 holds it."""
    if matrix.format == "fp8":
        return (matrix.codes.float() * _spread(matrix.scales, matrix.block, matrix.codes)).view(matrix.shape)
    codes = torch.stack([matrix.codes & 15, matrix.codes >> 4], -1).flatten(2)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)[codes.long()]
    if matrix.format == "mxfp4":
        exponents = matrix.scales.float() - 127
        scales = torch.where(matrix.scales == 255, torch.nan, torch.exp2(exponents))
    else:
        scales = matrix.scales.float()
    values = values.unflatten(2, (-1, matrix.block[1])) * scales[..., None]
    if matrix.row_scales is not None:
        values = values * matrix.row_scales[..., None, None]
    return values.reshape(matrix.shape)


def _quantise(weight: Tensor, format: str, dtype: torch.dtype, block: tuple[int, int] | None) -> DeviceMatrix:
    """weight [n,k]."""
    if not bool(weight.isfinite().all()):
        raise DeviceFormatError(f"{format} cannot hold weights that are not finite")
    if format == "fp8":
        return _quantise_fp8(weight.float(), block or (1, weight.shape[1]), dtype)
    return _quantise_e2m1(weight.float(), format, dtype)


def _quantise_fp8(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> DeviceMatrix:
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    padded = weight.new_zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    peaks = padded.view(rows, block[0], columns, block[1]).amax((1, 3))
    scales = torch.where(peaks >= SMALLEST, peaks / LARGEST_E4M3, 1.0)
    quotients = weight / _spread(scales[None], block, weight[None])[0]
    return fp8(quotients.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3), scales, dtype, block)


def _quantise_e2m1(weight: Tensor, format: str, dtype: torch.dtype) -> DeviceMatrix:
    if weight.shape[1] % GROUP[format]:
        raise DeviceFormatError(f"{format}: {weight.shape[1]} columns are not whole groups of {GROUP[format]}")
    groups = weight.unflatten(1, (-1, GROUP[format]))
    peaks = groups.abs().amax(-1)
    if format == "mxfp4":  # the least power of two under which the peak is at most 6
        exponents = torch.ceil(torch.log2(peaks.clamp_min(2.0**-126) / LARGEST_E2M1)).clamp(-126, 127)
        scales, steps, whole = (exponents + 127).to(torch.uint8), torch.exp2(exponents), None
    else:
        highest = peaks.amax(-1)
        whole = torch.where(highest >= SMALLEST, highest / (LARGEST_E2M1 * LARGEST_E4M3), 1.0)
        scales = (peaks / (LARGEST_E2M1 * whole[..., None])).clamp_max(LARGEST_E4M3).to(E4M3)
        steps = scales.float() * whole[..., None]
    codes = _e2m1(torch.where(steps[..., None] > 0, groups / steps[..., None], 0.0)).flatten(1)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    if whole is None:
        return mxfp4(packed, scales, dtype)
    return nvfp4(packed, scales, whole, dtype)


def _e2m1(values: Tensor) -> Tensor:
    """The nearest codes, ties to the even one; beyond 6 the code of 6."""
    size, codes = values.abs(), torch.zeros_like(values, dtype=torch.uint8)
    for number, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        codes += size >= middle if number % 2 else size > middle
    return torch.where(values < 0, codes + 8, codes)


def _four_bits(format: str, codes: Tensor, scales: Tensor, kind: torch.dtype) -> tuple[int, ...]:
    """The shape of the matrix that these make."""
    if codes.dtype != torch.uint8 or scales.dtype != kind or codes.dim() not in (2, 3):
        raise DeviceFormatError(f"{format} is uint8 and {kind}, got {codes.dtype} and {scales.dtype}")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if shape[-1] % GROUP[format] or tuple(scales.shape) != (*shape[:-1], shape[-1] // GROUP[format]):
        raise DeviceFormatError(f"{format}: codes {list(codes.shape)} do not fit scales {list(scales.shape)}")
    return shape


def _three(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor[None]


def _spread(scales: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    """scales [E, n/b, k/c] -> [E,n,k]."""
    wide = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return wide[:, : like.shape[1], : like.shape[2]]
