"""FP8: e4m3 codes, and a float32 scale for each block of a matrix, or each row: weight = e4m3(code) * scale.

Woven rows, for products with bf16, hold the codes of each 64 columns in the order in which a thread of the GPU
kernels takes them up (triton/eight_bit.py):

    place     | c  c | j  j | h | p |      6 bits of the place within the 64
    column    | j  j | h | c  c | p |
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cierzo.kernels.formats.device import E4M3, LARGEST_E4M3, SMALLEST, DeviceFormatError, DeviceMatrix, as_experts

WOVEN = 64  # columns that are woven
WORD = 4  # codes
NAN = 0x7F  # the code, but for its sign


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
    codes = _unwoven(matrix.codes) if matrix.woven else matrix.codes
    return codes.float() * _spread(matrix.scales, matrix.block, codes)


def weave(matrix: DeviceMatrix) -> DeviceMatrix:
    """An fp8 matrix with woven rows, a copy: whoever loads many experts weaves each before it stacks them. Itself
    where it is multiplied otherwise: with activations in fp8 or fp32, or in columns that are no multiple of 64.
    Raises DeviceFormatError for a code that stands for NaN."""
    plain = matrix.activations == "plain" and matrix.dtype == torch.bfloat16
    if matrix.format != "fp8" or matrix.woven or not plain or matrix.shape[-1] % WOVEN:
        return matrix
    experts, n, k = matrix.codes.shape
    words = torch.empty(experts, n, k // WORD, dtype=torch.int32, device=matrix.codes.device)
    if words.is_meta:
        return replace(matrix, codes=words, woven=True)
    for stored, woven in zip(matrix.codes, words, strict=True):
        if bool((stored.view(torch.uint8) & NAN == NAN).any()):
            raise DeviceFormatError("fp8: a code is NaN")
        woven.copy_(_woven(stored))
    return replace(matrix, codes=words, woven=True)


def _woven(codes: Tensor) -> Tensor:
    return codes.view(torch.int16).unflatten(-1, (-1, 4, 2, 4)).movedim(-1, -3).flatten(-4).view(torch.int32)


def _unwoven(words: Tensor) -> Tensor:
    return words.view(torch.int16).unflatten(-1, (-1, 4, 4, 2)).movedim(-3, -1).flatten(-4).view(E4M3)


def _spread(scales: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    """scales [E, n/b, k/c] -> [E,n,k]."""
    wide = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return wide[:, : like.shape[1], : like.shape[2]]
