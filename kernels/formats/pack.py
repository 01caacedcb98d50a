"""Weights into packed matrices and back: `pack`, `pack_into`, `unpack`; and a door's `Matrix` as another kind."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import registry
from cierzo.kernels.cpu.launch import pack as launch
from cierzo.kernels.formats import definition
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.packed import (
    ALIGNMENT,
    GROUP_K,
    Matrix,
    PackedMatrix,
    empty_packed,
    packed_bytes,
    view_packed,
)

FORMAT_OF = {torch.float32: "float32", torch.bfloat16: "bf16"}  # what keeps a tensor's values


class PackError(ValueError):
    """A weight cannot be packed: a format, shape or dtype that does not exist, or a value that does not fit."""


def pack(weight: Tensor, format: str, dtype: torch.dtype | None = None, paired: bool = False) -> PackedMatrix:
    """weight [n,k] or [E,n,k], float32 or bf16, any strides, -> its packed form, in new memory.

    dtype: of the activations that it will meet; the weight's by default. Raises PackError as pack_into does.
    """
    _check(weight, format, paired)
    *experts, n, k = weight.shape
    count = experts[0] if experts else 1
    data = empty_packed(count * packed_bytes(format, n, k, paired))
    pack_into(weight, format, paired, data)
    return view_packed(format, tuple(weight.shape), dtype or weight.dtype, paired, data)


def pack_into(weight: Tensor, format: str, paired: bool, target: Tensor) -> None:
    """Write weight's packed form to target, uint8 [E * packed_bytes(format, n, k, paired)], 64-byte aligned.

    Experts may come in slices, each to its part of the whole. The bytes are the same on every machine.
    Raises PackError if the target has another size, or if the format cannot hold a weight: int8, int4 and nvfp4
    take neither NaN nor infinity, nor what is too large for their scales.
    """
    _check(weight, format, paired)
    weight = weight if weight.dim() == 3 else weight[None]
    experts, n, k = weight.shape
    wanted = experts * packed_bytes(format, n, k, paired)
    if target.dtype != torch.uint8 or target.numel() != wanted or target.data_ptr() % ALIGNMENT:
        raise PackError(f"{format} {list(weight.shape)} takes {wanted} aligned bytes, target has {target.numel()}")
    if registry.has_native():
        refused = launch.pack(weight, format, paired, target)
    else:
        refused = definition.refused(weight, format)
        if refused is None:
            target.copy_(definition.pack(weight, format, paired))
    if refused is not None:
        place = [int(i) for i in torch.unravel_index(torch.tensor(refused), weight.shape)]
        raise PackError(f"{format} cannot hold the weight at {place}: {weight[tuple(place)].item()}")


def unpack(packed: PackedMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised weights, in the shape that was packed, in packed.dtype unless another is asked for."""
    return definition.unpack(packed).to(dtype or packed.dtype)


def as_packed(matrix: Matrix, paired: bool = False) -> PackedMatrix:
    """A door's argument in packed form: a plain tensor is packed, exactly, in its own dtype."""
    if isinstance(matrix, PackedMatrix):
        return matrix
    if isinstance(matrix, DeviceMatrix):
        raise PackError(f"a matrix of format {matrix.format} is for a GPU: the CPU kernels have another order")
    if matrix.dtype not in FORMAT_OF:
        raise PackError(f"weights are float32 or bfloat16, got {matrix.dtype}")
    return pack(matrix, FORMAT_OF[matrix.dtype], paired=paired)


def as_tensor(matrix: Matrix) -> Tensor:
    """A door's argument as a plain tensor, dequantised, in the activations' dtype, if it is another kind."""
    if isinstance(matrix, DeviceMatrix):
        return dequantise(matrix).to(matrix.dtype)
    return unpack(matrix) if isinstance(matrix, PackedMatrix) else matrix


def _check(weight: Tensor, format: str, paired: bool) -> None:
    if format not in GROUP_K:
        raise PackError(f"unknown number format {format!r}; known: {', '.join(GROUP_K)}")
    if weight.dtype not in FORMAT_OF:
        raise PackError(f"weights are float32 or bfloat16, got {weight.dtype}")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise PackError(f"weights are [n,k] or [experts,n,k], got {list(weight.shape)}")
    if paired and weight.shape[-2] % 2:
        raise PackError(f"a paired matrix has an even number of rows, got {weight.shape[-2]}")
