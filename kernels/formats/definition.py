"""Packing and unpacking in plain torch: the definition, slow, that the C++ packer equals bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels.formats import int4, int8, nvfp4, plain
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.packed import GROUP_K, Matrix, PackedMatrix, from_panels, panel_bytes, to_panels


@dataclass(frozen=True, slots=True)
class Format:
    """encode: rows [P,32,k], k a multiple of the group, -> uint8 [P, bytes of a panel]; decode: back, to float32.

    largest: the greatest |weight| that it holds; infinity: it holds anything, NaN too. weight_error: a bound on the
    root mean square of its errors, relative to that of normally distributed float32 weights. row_error: the same of
    activations, which the CPU kernels round to bf16, or to 8 bits in groups of k (cpu/quant.h). A product has both,
    added as independent errors are.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    largest: float
    weight_error: float
    row_error: float


FORMATS = {
    "float32": Format(plain.encode_float32, plain.decode_float32, math.inf, 0.0, 0.0),
    "bf16": Format(plain.encode_bf16, plain.decode_bf16, math.inf, 0.002, 0.002),
    "int8": Format(int8.encode, int8.decode, int8.LARGEST, 0.006, 0.006),
    "int4": Format(int4.encode, int4.decode, int4.LARGEST, 0.071, 0.0055),
    "nvfp4": Format(nvfp4.encode, nvfp4.decode, nvfp4.LARGEST, 0.098, 0.0055),
}


def refused(weight: Tensor, format: str) -> int | None:
    """Where in weight.flatten() the first value stands that `format` cannot hold: NaN, infinite or too large."""
    largest = FORMATS[format].largest
    if largest == math.inf:
        return None
    bad = ~(weight.flatten().float().abs() <= largest)
    return int(bad.nonzero()[0]) if bad.any() else None


def pack(weight: Tensor, format: str, paired: bool) -> Tensor:
    """weight [E,n,k] -> its packed bytes, uint8 [E * expert_bytes]."""
    return FORMATS[format].encode(to_panels(_whole_groups(weight, format), paired)).flatten()


def unpack(packed: PackedMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised weights, in the shape that was packed, in packed.dtype unless another is asked for."""
    *_, n, k = packed.shape
    panels = packed.data.view(-1, panel_bytes(packed.format, k))
    rows = FORMATS[packed.format].decode(panels)
    return from_panels(rows, n, packed.paired)[..., :k].reshape(packed.shape).to(dtype or packed.dtype)


def as_tensor(matrix: Matrix) -> Tensor:
    """A door's argument as a plain tensor, dequantised, in the activations' dtype, if it is another kind."""
    if isinstance(matrix, DeviceMatrix):
        return dequantise(matrix).to(matrix.dtype)
    return unpack(matrix) if isinstance(matrix, PackedMatrix) else matrix


def _whole_groups(weight: Tensor, format: str) -> Tensor:
    """k padded to whole groups: with zeros; with the last column in int4, whose range a zero would stretch."""
    experts, n, k = weight.shape
    missing = -k % GROUP_K[format]
    padding = weight[..., -1:] if format == "int4" else torch.zeros(1, dtype=weight.dtype)
    return torch.cat([weight, padding.expand(experts, n, missing)], -1) if missing else weight
