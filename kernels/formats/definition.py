"""Packing and unpacking in plain torch: the definition, slow, that the C++ packer equals bit for bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, PACKED_FORMATS
from cierzo.kernels.formats.packed import Matrix, PackedMatrix, from_panels, panel_bytes, to_panels


def refused(weight: Tensor, format: str) -> int | None:
    """Where in weight.flatten() the first value stands that `format` cannot hold: NaN, infinite or too large."""
    largest = NUMBER_FORMATS[format].codec().LARGEST
    if largest == math.inf:
        return None
    bad = ~(weight.flatten().float().abs() <= largest)
    return int(bad.nonzero()[0]) if bad.any() else None


def pack(weight: Tensor, format: str, paired: bool) -> Tensor:
    """weight [E,n,k] -> its packed bytes, uint8 [E * expert_bytes]."""
    return NUMBER_FORMATS[format].codec().encode(to_panels(_whole_groups(weight, format), paired)).flatten()


def unpack(packed: PackedMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised weights, in the shape that was packed, in packed.dtype unless another is asked for."""
    *_, n, k = packed.shape
    panels = packed.data.view(-1, panel_bytes(packed.format, k))
    rows = NUMBER_FORMATS[packed.format].codec().decode(panels)
    return from_panels(rows, n, packed.paired)[..., :k].reshape(packed.shape).to(dtype or packed.dtype)


def as_tensor(matrix: Matrix) -> Tensor:
    """A door's argument as a plain tensor, dequantised, in the activations' dtype, if it is another kind."""
    if isinstance(matrix, DeviceMatrix):
        return dequantise(matrix).to(matrix.dtype)
    return unpack(matrix) if isinstance(matrix, PackedMatrix) else matrix


def _whole_groups(weight: Tensor, format: str) -> Tensor:
    """k padded to whole groups: with zeros, or with the last column where a zero would stretch a group's range."""
    experts, n, k = weight.shape
    panels = PACKED_FORMATS[format]
    missing = -k % panels.group_k
    padding = weight[..., -1:] if panels.repeats_last else torch.zeros(1, dtype=weight.dtype)
    return torch.cat([weight, padding.expand(experts, n, missing)], -1) if missing else weight
