"""FP8: e4m3 codes, and a float32 scale for each block of a matrix, or each row: weight = e4m3(code) * scale."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.formats.device import E4M3, LARGEST_E4M3, SMALLEST, DeviceFormatError, DeviceMatrix, as_experts


def from_codes(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> DeviceMatrix:
    """A checkpoint's own codes, e4m3 [n,k] or [E,n,k], and the multipliers of their blocks, of any float dtype.

    scales: [n/b, k/c], or [E, n/b, k/c], rounded up, for blocks of (b, c), such as (128, 128); without `block`,
    their number says it: one a matrix (0-d, [1], [E], [1,1], [E,1,1]), one a row ([n], [n,1], [E,n], [E,n,1]), or
    one for each of the equal parts stacked in a matrix ([E,2,1]: gate and up). Raises DeviceFormatError.
    """
    if codes.dtype != E4M3 or codes.dim() not in (2, 3):
        raise DeviceFormatError(f"fp8: codes are e4m3 [n,k] or [E,n,k], got {codes.dtype} {list(codes.shape)}")
    experts, n, k = (1, *codes.shape)[-3:]
    if block is None:
        per_expert = scales.numel() // experts
        if scales.numel() != experts * per_expert or per_expert == 0 or n % per_expert:
            raise DeviceFormatError(f"fp8: scales {list(scales.shape)} do not fit {list(codes.shape)}")
        block = (n // per_expert, k)
    wanted = (experts, -(-n // block[0]), -(-k // block[1]))
    if scales.numel() != wanted[0] * wanted[1] * wanted[2]:
        raise DeviceFormatError(f"fp8: scales {list(scales.shape)} are not {list(wanted)} for blocks {block}")
    scales = scales.float().reshape(wanted).contiguous()
    return DeviceMatrix("fp8", tuple(codes.shape), dtype, as_experts(codes), scales, None, block)


def quantise(weight: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None) -> DeviceMatrix:
    """float32 [n,k] -> the nearest codes under the scale that takes each block's peak in."""
    block = block or (1, weight.shape[1])
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
    padded = weight.new_zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    peaks = padded.view(rows, block[0], columns, block[1]).amax((1, 3))
    scales = torch.where(peaks >= SMALLEST, peaks / LARGEST_E4M3, 1.0)
    quotients = weight / _spread(scales[None], block, weight[None])[0]
    return from_codes(quotients.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3), scales, dtype, block)


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32 [E,n,k]."""
    return matrix.codes.float() * _spread(matrix.scales, matrix.block, matrix.codes)


def _spread(scales: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    """scales [E, n/b, k/c] -> [E,n,k]."""
    wide = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return wide[:, : like.shape[1], : like.shape[2]]
