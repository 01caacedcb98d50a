"""`DeviceMatrix`: weights in few bits, in the order in which the GPU kernels read them: rows of k.

    format   codes                            scales                                         row_scales
    fp8      e4m3 [E,n,k], or woven           float32 [E, n/b, k/c], one a block             none
             int32 [E,n,k/4] (fp8.py)
    nvfp4    int32 [E,n,K/8], words of 8      int16 [E,n,K/32]: of columns 32i .. 32i + 15   float32 [E,n]
             codes (four_bit.py)              in the low half of number i, of the next 16
                                              in the high half (nvfp4.py)
    mxfp4    int32 [E,n,K/8], the same        uint8 [E,n,K/32] (mxfp4.py)                    float32 [E,n]

    value    fp8: e4m3(code) * scale.  4 bits: code's bf16 number * scale's bf16 number * row scale

K is k filled up to a multiple of 128. The codes and scales of published checkpoints are taken over, and put into
these orders once, while they are loaded; fp8's only where they do not meet activations in fp8. Kernels widen a code
to the activations' bf16, which holds every e4m3 number and every product of an e2m1 number and its scale exactly;
scales of whole rows or blocks multiply fp32 sums. Matrices of bf16 or float32 stay plain tensors.

An fp8 matrix may ask for activations in fp8 too (`in_fp8`, activations.py): codes are then multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cierzo.kernels.formats.number_formats import DEVICE_FORMATS, NUMBER_FORMATS

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
GROUP = {name: group for name in DEVICE_FORMATS if (group := NUMBER_FORMATS[name].group)}  # columns of one scale
SMALLEST = 2.0**-100  # what is smaller becomes zero: its scale would leave fp32's normal range


class DeviceFormatError(ValueError):
    """Tensors do not make a matrix of that format, or a weight does not fit it."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DeviceMatrix:
    """Weights [n,k] or [E,n,k] in one of the formats above; E is 1 in the tensors of the former. Never written.

    dtype: of the activations that it is multiplied with. block: (rows, columns) of one scale. activations: "plain",
    as they come; "fp8": quantised before the product, by the static activation_scales, fp32 [E], where a checkpoint
    has them, else row by row. woven: codes of fp8 lie in the order of `fp8.weave`. `shape` and `dtype` are there so
    that a door can check it like a tensor.
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
    woven: bool = False

    @property
    def layout(self) -> str:
        """The format, with the order of its codes if that is not the usual one."""
        return f"{self.format} woven" if self.woven else self.format

    def __getitem__(self, expert: int) -> DeviceMatrix:
        """The [n,k] of one expert, in the same memory."""
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


def in_fp8(matrix: DeviceMatrix, scales: Tensor | None = None) -> DeviceMatrix:
    """A copy of the matrix that is multiplied with activations in fp8.

    scales: static ones, multipliers of codes, of any float dtype, one an expert, or one of [n,k]. Raises
    DeviceFormatError for other formats, numbers and values.
    """
    if "fp8" not in NUMBER_FORMATS[matrix.format].activations:
        raise DeviceFormatError(f"activations in fp8 meet weights in fp8 alone, got {matrix.format}")
    if matrix.woven:
        raise DeviceFormatError("activations in fp8 meet codes in their natural order")
    if scales is None:
        return replace(matrix, activations="fp8", activation_scales=None)
    if scales.numel() != len(matrix.codes):
        raise DeviceFormatError(f"fp8: activation scales {list(scales.shape)} do not fit {list(matrix.shape)}")
    scales = scales.float().flatten().contiguous()
    if not (scales.is_meta or bool(((scales >= SMALLEST) & (scales <= 1 / SMALLEST)).all())):
        raise DeviceFormatError("fp8: an activation scale is not in 2^-100 .. 2^100")
    return replace(matrix, activations="fp8", activation_scales=scales)


def quantise(
    weight: Tensor, format: str, dtype: torch.dtype | None = None, block: tuple[int, int] | None = None
) -> DeviceMatrix:
    """weight [n,k] or [E,n,k] of any float dtype -> the nearest codes under the scale that takes each peak in.

    dtype: of the activations, the weight's by default. block: (rows, columns) of fp8's scales; one scale a row by
    default. Experts are converted one by one, in the memory of one. Raises DeviceFormatError for an unknown format,
    a k that is not whole groups, and weights that are not finite.
    """
    if format not in DEVICE_FORMATS:
        raise DeviceFormatError(f"unknown number format {format!r}; known: {', '.join(DEVICE_FORMATS)}")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise DeviceFormatError(f"weights are [n,k] or [E,n,k], got {list(weight.shape)}")
    dtype = dtype or weight.dtype
    if weight.dim() == 3:
        return stack((quantise(expert, format, dtype, block) for expert in weight), len(weight))
    if not (weight.is_meta or bool(weight.isfinite().all())):
        raise DeviceFormatError(f"{format} cannot hold weights that are not finite")
    chosen = NUMBER_FORMATS[format]
    if chosen.group and weight.shape[1] % chosen.group:
        raise DeviceFormatError(f"{format}: {weight.shape[1]} columns are not whole groups of {chosen.group}")
    return chosen.codec().quantise(weight.float(), dtype, *([] if block is None else [block]))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype one after another along their first axis; by bytes: torch joins no 8-bit floats."""
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)


def dequantise(matrix: DeviceMatrix) -> Tensor:
    """The values, float32, of the matrix's shape; each rounded once, and not at all where float32 holds it."""
    return NUMBER_FORMATS[matrix.format].codec().dequantise(matrix).view(matrix.shape)


def stack(matrices: Iterable[DeviceMatrix], count: int) -> DeviceMatrix:
    """`count` [n,k] matrices of one format and size -> [E,n,k]. Of those that an iterator makes, two at most are
    held beside the result."""
    first, whole = None, {}
    for number, one in enumerate(matrices):
        if one.activations != "plain":
            raise DeviceFormatError("matrices are stacked before their activations are said to be in fp8")
        tensors = {name: t for name in ("codes", "scales", "row_scales") if (t := getattr(one, name)) is not None}
        if first is None:
            first = replace(one, codes=one.codes[:0], scales=one.scales[:0], row_scales=None)
            whole = {name: t.new_empty(count, *t.shape[1:]) for name, t in tensors.items()}
        if (one.layout, one.shape, one.block) != (first.layout, first.shape, first.block):
            raise DeviceFormatError(f"{first.format} {list(first.shape)}: matrices that are stacked must be alike")
        for name, tensor in tensors.items():
            whole[name][number : number + 1].view(torch.uint8).copy_(tensor.view(torch.uint8))
    assert first is not None
    return replace(first, shape=(count, *first.shape), **whole)


def four_bit_shape(format: str, codes: Tensor, scales: Tensor, kind: torch.dtype) -> tuple[int, ...]:
    """The shape of the matrix that codes of 4 bits and scales of dtype `kind` make. Raises DeviceFormatError."""
    if codes.dtype != torch.uint8 or scales.dtype != kind or codes.dim() not in (2, 3):
        raise DeviceFormatError(f"{format} is uint8 and {kind}, got {codes.dtype} and {scales.dtype}")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if shape[-1] % GROUP[format] or tuple(scales.shape) != (*shape[:-1], shape[-1] // GROUP[format]):
        raise DeviceFormatError(f"{format}: codes {list(codes.shape)} do not fit scales {list(scales.shape)}")
    return shape


def as_experts(tensor: Tensor) -> Tensor:
    """[n,k] or [E,n,k] -> [E,n,k], contiguous."""
    return (tensor if tensor.dim() == 3 else tensor[None]).contiguous()
